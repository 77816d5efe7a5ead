"""kill -9 at any moment: at most the steps since the last checkpoint are done again, and the end is the same."""

import random
import re
import signal
import time

import pytest

pytestmark = pytest.mark.slow
STEPS = 40
EVERY = 2  # steps from a checkpoint to the next, as in conftest.py; one is written while the next steps are taken
FLAGS = ["--data.shapes", 64, 16, 16, "--optim.steps", STEPS]


def new_write(one, files=1):
    """Whether a checkpoint is being written that has so many files now; not one that an earlier process left."""
    left = {path.stat().st_ino for path in one.writing()}

    def begun():
        try:
            return any(p.stat().st_ino not in left and len(list(p.rglob("*.*"))) >= files for p in one.writing())
        except FileNotFoundError:  # it has just got its name
            return False

    return begun


def wait_for(one, moment, rng):
    if moment == "start":
        time.sleep(rng.uniform(0, 2))  # Python, torch
    elif moment == "set-up":
        lines = rng.randint(1, 8)  # data, model, weights, the run folder: a line each
        one.until(lambda: one.said.count("\n") >= lines)
    elif moment == "step":
        steps = rng.randint(1, 5)
        one.until(lambda: len(re.findall(r"^step \d", one.said, re.M)) >= steps)
        time.sleep(rng.uniform(0, 0.04))
    elif moment == "writing":
        one.until(new_write(one))
        time.sleep(rng.uniform(0, 0.02))
    else:
        one.until(lambda: one.saved() == STEPS)
        time.sleep(rng.uniform(0, 0.3))


def test_at_twenty_moments_of_one_run(run, undisturbed):
    rng, whole, one = random.Random(20), undisturbed(*FLAGS), run("run", *FLAGS)
    moments = ["start"] * 2 + ["set-up"] * 3 + ["step"] * 8 + ["writing"] * 4
    rng.shuffle(moments)
    seen, lost = [], []
    for moment in [*moments, *["evaluation"] * 3]:
        saved = one.saved()
        one.start()
        wait_for(one, moment, rng)
        assert one.process.poll() is None, f"it ended before the moment {moment!r} came: {one.said}"
        one.kill()
        if resumed := re.findall(r"^resuming at step (\d+)", one.said, re.M):
            assert resumed == [str(saved)], one.said
        done = max((int(row["step"]) for row in one.rows()), default=0)
        lost.append(done - one.saved())
        seen.append((moment, done, one.saved(), len(one.writing())))
    print(*seen, sep="\n")
    assert max(lost) <= 2 * EVERY and one.saved() == STEPS, seen
    assert sum(0 < done < STEPS for _, done, _, _ in seen) >= 8, seen  # most were killed in the midst of training
    one.finish()
    one.equals(whole)


def test_while_a_checkpoint_is_written(run, undisturbed):
    """Stopped first, to be sure that the checkpoint is half there when the process is killed."""
    rng, whole, one = random.Random(1), undisturbed(*FLAGS), run("run", *FLAGS)
    for files in (1, 2, 3, 3):
        before = one.saved() + rng.choice((0, EVERY))  # at once, or after a checkpoint that goes well
        one.start()
        one.until(lambda before=before: one.saved() >= before)
        while True:
            one.until(new_write(one, files))
            one.signal(signal.SIGSTOP)
            if one.writing():
                break
            one.signal(signal.SIGCONT)
        saved = one.saved()
        one.kill()
        assert one.writing() and one.saved() == saved >= before
        assert max(int(row["step"]) for row in one.rows()) - saved <= 2 * EVERY
    one.finish()
    assert f"resuming at step {saved}" in one.said and not one.writing()
    one.equals(whole)
