"""Two processes under torchrun: one dies and both begin again where the last checkpoint is; both are asked to stop."""

import os
import re
import signal

import pytest

pytestmark = pytest.mark.slow
SHAPES = ["--data.shapes", 64, 16, 16, "--optim.steps", 12]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_is_killed(two, undisturbed, rank):
    """The first writes, the second does not; torchrun ends the one that is left, and starts both once more."""
    whole, one = undisturbed(*SHAPES, two=True), two("run", *SHAPES)
    one.start()
    one.until(lambda: len(one.rows()) >= 5)
    os.kill(one.workers()[rank], signal.SIGKILL)
    assert one.wait() == 0, one.said
    (resumed,) = re.findall(r"^resuming at step (\d+)$", one.said, re.M)
    assert 2 <= int(resumed) < 12
    one.near(whole)
    print("the same to the bit:", one.untimed() == whole.untimed())


@pytest.mark.parametrize("who", ["a worker", "torchrun", "all"])
def test_asked_to_stop(two, undisturbed, who):
    """By SIGTERM: to one, to torchrun, which hands it on, or as Slurm does it to all, so that workers get it twice."""
    whole, one = undisturbed(*SHAPES, two=True), two("run", *SHAPES)
    one.start()
    one.until(lambda: len(one.rows()) >= 3)
    if who == "all":
        one.signal(signal.SIGTERM)
    else:
        os.kill(one.workers()[1] if who == "a worker" else one.process.pid, signal.SIGTERM)
    code = one.wait()
    (stopped,) = re.findall(r"^stopped at step (\d+) and saved", one.said, re.M)
    assert one.saved() == int(stopped) < 12
    # torchrun's own end is an exception of its own whenever a signal reaches it, whatever its workers say.
    assert code == 0 if who == "a worker" else "SignalException" in one.said
    if who == "all":
        one.finish().near(whole)


def test_two_are_as_good_as_one(undisturbed):
    undisturbed(*SHAPES, two=True).near(undisturbed(*SHAPES))
