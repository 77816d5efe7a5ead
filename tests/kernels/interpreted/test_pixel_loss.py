"""kernels/pixel_loss.py under the interpreter, against the registered op's CPU path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smaug import ops
from smaug.kernels import launch
from smaug.kernels import pixel_loss as kernel
from smaug.kernels.pixel_loss import pixel_loss, pixel_loss_backward
from smaug.testing import relative_error, surrounded


def inputs(patch, last=False, pixels=torch.uint8, dtype=torch.float32, removed=4, clips=2, grid=(1, 2, 4)):
    t, ph, pw = patch
    tubes, rows, columns = grid
    video = torch.randint(0, 256, (clips, tubes * t, 3, rows * ph, columns * pw), dtype=torch.uint8)
    if last:
        video = video.permute(0, 1, 3, 4, 2).contiguous()
    if pixels != torch.uint8:
        video = surrounded((video / 255).to(pixels))
    _, ids = ops.random_mask(torch.arange(clips), grid, tubes * rows * columns - removed, seed=3)
    pred = surrounded(torch.randn(clips, removed, 3 * t * ph * pw).to(dtype))
    return pred, video, ids, list(patch)


def check(pred, video, ids, patch, normalise):
    got = pixel_loss(pred, video, ids, patch, normalise, True)
    want = torch.ops.smaug.pixel_loss(pred, video, ids, patch, normalise, True)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # 16 bits: both round the same fp32 number once, but not always to the same side
        assert relative_error(a, b) < (2e-4 if b.dtype == torch.float16 else 2e-6)
    grad = torch.tensor(3.0)
    a, b = pixel_loss_backward(grad, want[1]), torch.ops.smaug.pixel_loss_backward(grad, want[1])
    assert (a.dtype, a.shape) == (b.dtype, b.shape) and relative_error(a, b) < 1e-6


@pytest.mark.parametrize("normalise", ["patch", "patch_channel", ""])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("patch", "pixels"),
    [
        ((1, 4, 4), torch.uint8),
        ((2, 8, 4), torch.float32),
        ((1, 14, 14), torch.float32),
        ((2, 16, 16), torch.uint8),
        ((1, 2, 1), torch.uint8),
    ],
)
def test_patches_layouts_and_pixels(patch, pixels, last, normalise):
    check(*inputs(patch, last, pixels), normalise)


@settings(max_examples=8)
@given(
    patch=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 9)),
    last=st.booleans(),
    pixels=st.sampled_from([torch.uint8, torch.float32]),
    removed=st.integers(1, 7),
    clips=st.integers(1, 3),
    normalise=st.sampled_from(["patch", "patch_channel", ""]),
)
def test_any_patch(patch, last, pixels, removed, clips, normalise):
    check(*inputs(patch, last, pixels, removed=removed, clips=clips), normalise)


@pytest.mark.parametrize("normalise", ["patch", "patch_channel", ""])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float16])
def test_fp16(pixels, normalise):
    check(*inputs((1, 14, 14), False, pixels, torch.float16), normalise)


@pytest.mark.parametrize("removed", [1, 7])
def test_one_patch_removed_and_one_kept(removed):
    check(*inputs((1, 4, 4), removed=removed), "patch")


@pytest.mark.parametrize("last", [False, True])
def test_runs_of_patches_in_every_order(in_every_order, monkeypatch, last):
    """14 patches in programs of 3, the last one of 2, and the last launch's block smaller than the number of sums."""
    monkeypatch.setattr("smaug.kernels.pixel_loss._PROGRAMS", 6)
    monkeypatch.setitem(kernel._SUM, "BLOCK", 4)
    pred, video, ids, patch = inputs((1, 8, 4), last, removed=7)
    check(pred, video, ids, patch, "patch_channel")
    ids = ids.long()
    loss, difference = in_every_order(lambda: pixel_loss(pred, video, ids, patch, "patch", True))
    want = torch.ops.smaug.pixel_loss(pred, video, ids, patch, "patch", True)
    assert relative_error(loss, want[0]) < 1e-6 and relative_error(difference, want[1]) < 1e-6
    in_every_order(lambda: pixel_loss_backward(loss, difference))


def test_nothing_removed_and_no_clips():
    pred, video, ids, patch = inputs((1, 4, 4))
    for clips in (2, 0):
        loss, difference = pixel_loss(pred[:clips, :0], video[:clips], ids[:clips, :0], patch, "patch", True)
        assert loss == 0 and loss.dtype == torch.float32 and difference.shape == (clips, 0, 48)
        assert pixel_loss_backward(loss, difference).shape == (clips, 0, 48)


def test_no_gradient_keeps_nothing():
    args = inputs((1, 4, 4))
    assert pixel_loss(*args, "patch", False)[1].shape == (0,)


def test_a_flat_patch_is_exactly_zero_and_a_perfect_prediction_loses_nothing():
    pred, video, ids, patch = inputs((1, 14, 14))
    flat = torch.full_like(video, 201)
    for normalise in ("patch", "patch_channel"):
        assert pixel_loss(torch.zeros_like(pred), flat, ids, patch, normalise, False)[0] == 0
    assert pixel_loss(torch.full_like(pred, 201 / 255), flat, ids, patch, "", False)[0] < 1e-12


def test_kept_patches_are_not_read():
    pred, video, ids, patch = inputs((1, 4, 4), pixels=torch.float32)
    mask = torch.zeros(2, 8, dtype=torch.bool).scatter_(1, ids.long(), True).view(2, 1, 1, 2, 4)
    poisoned = video.masked_fill(~mask.repeat_interleave(4, 3).repeat_interleave(4, 4), torch.nan)
    check(pred, poisoned, ids, patch, "patch")


def test_strided_inputs():
    pred, video, ids, patch = inputs((1, 4, 4))
    check(pred.transpose(0, 1).contiguous().transpose(0, 1), video.repeat_interleave(2, 1)[:, ::2], ids, patch, "patch")


def test_launches():
    args = inputs((1, 4, 4))
    with launch.record() as launches:
        _, difference = pixel_loss(*args, "patch", True)
        pixel_loss_backward(torch.tensor(1.0), difference)
    assert [x.name for x in launches] == ["_differences", "_mean", "_scale"]


def test_fp64_is_refused():
    pred, *rest = inputs((1, 4, 4))
    with pytest.raises(ValueError, match="float64"):
        pixel_loss(pred.double(), *rest, "patch", True)
