"""Which patches stay: numbers of the kept and of the removed, ascending.

    pytest benchmarks/bench_random_mask.py --benchmark-only [--full]

`eager` is MAE's: noise, two argsorts, a gather of a mask. It draws from the global generator, so a mask depends on the
batch it was drawn in; ours is a function of sample, seed and epoch alone, and comes sorted.
"""

import pytest
import torch

from benchmarks.timing import compiled
from smaug import ops

GRID = (8, 14, 14)
N = 8 * 196


def smaug(samples, keep):
    return ops.random_mask(samples, GRID, keep, seed=0)


def eager(samples, keep):
    noise = torch.rand(len(samples), N, device=samples.device)
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    mask = torch.ones(len(samples), N, device=samples.device)
    mask[:, :keep] = 0
    return shuffle[:, :keep], mask.gather(1, restore)


@pytest.mark.parametrize("provider", ["smaug", "eager", "eager_compiled"])
@pytest.mark.parametrize("ratio", [0.6, pytest.param(0.9, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [8, 64, pytest.param(512, marks=pytest.mark.full)])
def test_random_mask(timed, device, batch, ratio, provider):
    samples, keep = torch.arange(batch, device=device), ops.keep_count(N, ratio)
    function = {"smaug": smaug, "eager": eager}.get(provider) or compiled(eager)
    kept = function(samples, keep)[0]
    assert kept.shape == (batch, keep) and (kept.sort(1).values.diff(dim=1) > 0).all()
    shape = f"{batch} clips, {keep} of {N} kept"
    timed(
        *(lambda: function(samples, keep), shape, torch.int32),
        least_bytes=8 * batch + 4 * batch * N,
        countable=provider != "eager_compiled",
    )
