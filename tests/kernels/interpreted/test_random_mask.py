"""random_mask: the same ids as the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smaug import ops  # noqa: F401  (registers the reference)
from smaug.kernels import random_mask as kernel

SAMPLES = torch.tensor([0, 7, 2**31, 2**40 + 5, -3])


def _same(samples, grid, keep, kind="random", seed=5, draw=0, stream=0):
    args = (samples, torch.tensor(seed), torch.tensor(draw), *grid, keep, kind, stream)
    want = torch.ops.smaug.random_mask(*args)
    got = kernel.random_mask(*args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b)
    return got


@pytest.mark.parametrize("kind", ["random", "tube", "block", "frame"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 8, 8), (4, 3, 5), (3, 9, 7)])
def test_every_kind_and_count(kind, grid):
    frames, patches = grid[0], grid[1] * grid[2]
    unit = {"tube": frames, "frame": patches}.get(kind, 1)
    for keep in sorted({unit, frames * patches, frames * patches // 2 // unit * unit or unit}):
        _same(SAMPLES, grid, keep, kind)


def test_seed_draw_stream_and_strides():
    for seed, draw, stream in ((-1, 3, 2), (2**62 + 1, 2**24 - 1, 1), (2**32, 2**31, 0), (1, -1, 2)):
        _same(SAMPLES, (2, 5, 5), 13, seed=seed, draw=draw, stream=stream)
        _same(SAMPLES, (2, 8, 9), 13, "block", seed=seed, draw=draw, stream=stream)
    _same(torch.arange(6)[::2], (2, 5, 5), 13)
    assert _same(SAMPLES[:0], (2, 5, 5), 13)[0].shape == (0, 13)


@settings(max_examples=10)
@given(st.data())
def test_any_mask(data):
    grid = tuple(data.draw(st.integers(1, most)) for most in (4, 12, 12))
    kind = data.draw(st.sampled_from(["random", "tube", "block", "frame"]))
    unit = {"tube": grid[0], "frame": grid[1] * grid[2]}.get(kind, 1)
    keep = unit * data.draw(st.integers(1, grid[0] * grid[1] * grid[2] // unit))
    seed, draw = (data.draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(2))
    _same(SAMPLES[: data.draw(st.integers(0, 3))], grid, keep, kind, seed, draw, data.draw(st.integers(0, 2)))


def test_a_realistic_clip():
    _same(SAMPLES[:2], (8, 14, 14), 157)
    _same(SAMPLES[:1], (8, 16, 32), 4095)
    _same(SAMPLES[:2], (8, 14, 14), 160, "tube")


def test_ties_go_to_the_lower_patch():
    """All patches of a square share a word in all frames, and the last square may be cut."""
    for grid, keep in (((3, 8, 8), 100), ((5, 9, 4), 7), ((2, 1, 6), 5)):
        _same(SAMPLES[:3], grid, keep, "block")


def test_program_order_changes_nothing(in_every_order):
    in_every_order(lambda: kernel.random_mask(SAMPLES, torch.tensor(1), torch.tensor(2), 2, 6, 6, 20, "block", 0))


def test_refusal():
    with pytest.raises(ValueError, match=r"at most 8192 units a clip, not 25600 \(100 frames of 256"):
        kernel.random_mask(SAMPLES, torch.tensor(1), torch.tensor(2), 100, 16, 16, 5, "random", 0)
    _same(SAMPLES[:1], (100, 16, 16), 500, "tube")
