"""A step for which there is too little memory, and steps whose numbers are not finite, in real processes."""

import json
import re

import pytest

pytestmark = pytest.mark.slow

# Activations have to be large beside what else a process asks for.
LARGER = [
    "--data.shapes", 64, 16, 16, "--optim.steps", 8, "--data.batch=32", "--video-mask.ratio=0",
    "--model.video.width=64", "--model.video.depth=2", "--model.video.frames=8",
]  # fmt: skip

# In step 5 the system gives three quarters of what the first step has taken.
TIGHT = """
import resource, sys
from smaug import loop, train

def bytes_of(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

step, needed = loop.Loop._step, []

def tight(self, batch):
    before = bytes_of("VmSize")
    if self.number == 4:
        resource.setrlimit(resource.RLIMIT_AS, (before + needed[0] * 3 // 4, -1))
    out = step(self, batch)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    needed.append(bytes_of("VmPeak") - before)
    return out

loop.Loop._step = tight
sys.exit(train.main())
"""


def test_too_little_memory_for_one_batch(run, undisturbed, monkeypatch):
    """PyTorch's own allocator refuses; the step is done again in halves, said, and computes the same."""
    whole = undisturbed(*LARGER)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system, or a step needs none
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # a thread's first allocation would reserve 128 MB
    one = run("run", *LARGER, program=("-c", TIGHT)).finish()
    assert one.said.count("out of memory with 32 pairs at once; going on with 16 (--micro-batch 16)") == 1, one.said
    assert one.said.count("out of memory") == 1 and one.said.index("step 4 ") < one.said.index("out of memory")
    one.near(whole)


SHAPES = ["--data.shapes", 64, 16, 16, "--optim.steps", 12]

# Around one step, a weight is not a number, as after a bit of memory has flipped; or that step is plainly undone.
POISON = """
import copy, sys
import torch
from smaug import loop, train

step = loop.Loop._step

def disturbed(self, batch):
    if self.number != 4:
        return step(self, batch)
    weight = self.update.parameters[0]
    if {poison}:
        was = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] = float("nan")
        out = step(self, batch)
        with torch.no_grad():
            weight.view(-1)[0] = was.view(-1)[0]
        return out
    model, optimizer = self.step.model, self.update.optimizer
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    out = step(self, batch)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    return out

loop.Loop._step = disturbed
sys.exit(train.main())
"""


def test_one_step_that_is_not_finite(run):
    """It is skipped as if it had never been: weights, moments and AdamW's count are those of a run that undid it."""
    poisoned = run("poisoned", *SHAPES, program=("-c", POISON.format(poison=True))).finish()
    undone = run("undone", *SHAPES, program=("-c", POISON.format(poison=False))).finish()
    assert "step 5: 1 steps so far were left out" in poisoned.said
    assert [row["nonfinite_steps"] for row in poisoned.rows()] == [0] * 4 + [1] * 8
    assert {row["nonfinite_steps"] for row in undone.rows()} == {0}
    assert poisoned.files(12).keys() == undone.files(12).keys()
    for name, data in poisoned.files(12).items():
        assert data == undone.files(12)[name] or name == "state.json", name
    mine, theirs = ([row["loss"] for row in one.rows()] for one in (poisoned, undone))
    assert mine[:4] + mine[5:] == theirs[:4] + theirs[5:]


def test_steps_that_stay_not_finite_end_the_run(run, undisturbed):
    """A learning rate far too high; what was saved stays whole, and the samples of the last batches are named."""
    one = run("run", *SHAPES, "--optim.lr=1e20", "--max-nonfinite=3")
    line = one.refuse()
    named = json.loads((one.folder / "nonfinite.json").read_text())
    steps = [int(step) for step in named]
    assert len(steps) == 3 and steps == list(range(steps[0], steps[0] + 3))
    assert f"3 steps in a row, up to step {steps[-1]}" in line and str(one.folder / "nonfinite.json") in line
    for names in named.values():
        assert len(names) == 16 and all(re.fullmatch(r"train/\d{5}\.webm", name) for name in names)
    assert all(weight.isfinite().all() for weight in one.weights().values())
