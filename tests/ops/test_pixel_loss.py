"""pixel_loss: patches cut out by reshaping, in fp64, as MAE and VideoMAE do."""

import importlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smaug import ops
from smaug.testing import HostReads, relative_error


def _patches(video, ids, patch, normalise):
    if video.shape[2] != 3:
        video = video.permute(0, 1, 4, 2, 3)
    x = video.double() / (255 if video.dtype == torch.uint8 else 1)
    (b, f, c, h, w), (t, ph, pw) = x.shape, patch
    x = x.reshape(b, f // t, t, c, h // ph, ph, w // pw, pw).permute(0, 1, 4, 6, 3, 2, 5, 7)
    x = x.reshape(b, -1, c, t * ph * pw)
    if normalise == "patch":
        x = x.flatten(2)
    if normalise:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    return x.reshape(b, x.shape[1], -1).gather(1, ids.long()[..., None].expand(-1, -1, 3 * t * ph * pw))


def _truth(pred, video, ids, patch, normalise):
    return (pred.double() - _patches(video, ids, patch, normalise)).square().mean()


def _inputs(patch, last=False, uint8=True, dtype=torch.float32, b=3, removed=None):
    torch.manual_seed(0)
    f, h, w = 4, 24, 12
    video = torch.randint(0, 256, (b, f, 3, h, w), dtype=torch.uint8)
    if uint8:
        video[:, :, :, :12, :6] = 77  # flat patches: variance 0
    if last:
        video = video.permute(0, 1, 3, 4, 2).contiguous()
    if not uint8:
        video = video / 255
    grid = (f // patch[0], (h // patch[1]) * (w // patch[2]))
    total = grid[0] * grid[1]
    _, ids = ops.random_mask(torch.arange(b), grid, total - (removed or total * 3 // 4), seed=3)
    pred = torch.randn(b, ids.shape[1], 3 * patch[0] * patch[1] * patch[2]).to(dtype).requires_grad_()
    return pred, video, ids


@pytest.mark.parametrize("normalise", ["patch", "patch_channel", None])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("patch", "removed"), [((1, 8, 4), None), ((2, 4, 4), 1), ((4, 6, 3), None), ((1, 1, 2), 500)])
def test_is_the_formula(patch, removed, last, uint8, normalise):
    _is_the_formula(patch, removed, last, uint8, normalise)


@given(
    patch=st.tuples(*map(st.sampled_from, ([1, 2, 4], [2, 3, 4, 6, 8, 12, 24], [1, 2, 3, 4, 6, 12]))),
    removed=st.integers(1, 8),
    b=st.integers(1, 4),
    last=st.booleans(),
    uint8=st.booleans(),
    normalise=st.sampled_from(["patch", "patch_channel", None]),
)
def test_is_the_formula_for_any_patch(patch, removed, b, last, uint8, normalise):
    patches = 4 // patch[0] * (24 // patch[1]) * (12 // patch[2])
    assume(patches > 1)  # of one, random_mask keeps it
    _is_the_formula(patch, min(removed, patches - 1), last, uint8, normalise, b)


def _is_the_formula(patch, removed, last, uint8, normalise, b=3):
    pred, video, ids = _inputs(patch, last, uint8, b=b, removed=removed)
    got = ops.pixel_loss(pred, video, ids, patch=patch, normalise=normalise)
    truth = _truth(pred, video, ids, patch, normalise)
    assert got.dtype == torch.float32 and got.shape == ()
    assert relative_error(got, truth) < 1e-6
    (dx,), (tx,) = (torch.autograd.grad(3 * x, pred) for x in (got, truth))
    assert relative_error(dx, tx) < 1e-5


def test_more_than_one_chunk(monkeypatch):
    pred, video, ids = _inputs((1, 8, 4))
    kw = dict(patch=(1, 8, 4))
    whole = ops.pixel_loss(pred, video, ids, **kw)
    monkeypatch.setattr(importlib.import_module("smaug.ops.pixel_loss"), "_CHUNK", 5 * 96)
    parts = ops.pixel_loss(pred, video, ids, **kw)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, pred), torch.autograd.grad(whole, pred))


@pytest.mark.parametrize("normalise", ["patch", "patch_channel", None])
def test_bf16_is_as_good_as_eager(normalise):
    """Eager: a bf16 target, and F.mse_loss."""
    patch = (1, 8, 4)
    pred, video, ids = _inputs(patch, dtype=torch.bfloat16)
    truth = _truth(pred, video, ids, patch, normalise)
    got = ops.pixel_loss(pred, video, ids, patch=patch, normalise=normalise)
    target = _patches(video, ids, patch, normalise)
    eager = torch.nn.functional.mse_loss(pred, target.bfloat16())
    exact = 2 / pred.numel() * (pred.double() - target)
    (dx,), (de,) = (torch.autograd.grad(x, pred) for x in (got, eager))
    assert dx.dtype == torch.bfloat16
    assert relative_error(got, truth) < 1e-6
    assert relative_error(dx, exact) <= 2 * relative_error(de, exact)


def test_kept_patches_are_not_read():
    pred, video, ids = _inputs((1, 4, 4), uint8=False)
    grid = torch.zeros(3, 4 * 18, dtype=torch.bool).scatter_(1, ids.long(), True).view(3, 4, 1, 6, 3)
    mask = grid.repeat_interleave(4, 3).repeat_interleave(4, 4)
    poisoned = video.masked_fill(~mask, torch.nan)
    assert torch.equal(ops.pixel_loss(pred, poisoned, ids, patch=4), ops.pixel_loss(pred, video, ids, patch=4))


def test_strided_video_and_channels_last_memory():
    pred, video, ids = _inputs((1, 4, 4))
    want = ops.pixel_loss(pred, video, ids, patch=4)
    other = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(ops.pixel_loss(pred, other, ids, patch=4), want)
    every = video.repeat_interleave(2, 1)
    torch.testing.assert_close(ops.pixel_loss(pred, every[:, ::2], ids, patch=4), want)
    strided = pred.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = ops.pixel_loss(strided, video, ids, patch=4)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, strided), torch.autograd.grad(want, pred))
    # three rows of pixels under a channels-first shape, stored channels last: the shape alone would not tell
    low = torch.rand(1, 1, 3, 3, 6)
    stored = low.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    p, i = torch.randn(1, 2, 27), torch.tensor([[0, 1]])
    assert torch.equal(ops.pixel_loss(p, stored, i, patch=3), ops.pixel_loss(p, low, i, patch=3))


def test_a_perfect_prediction_and_a_flat_video():
    pred, video, ids = _inputs((1, 4, 4))
    flat = torch.full_like(video, 200)
    assert ops.pixel_loss(torch.zeros_like(pred), flat, ids, patch=4) < 1e-6
    assert ops.pixel_loss(torch.full_like(pred, 200 / 255), flat, ids, patch=4, normalise=None) < 1e-12


def test_nothing_removed():
    pred, video, ids = _inputs((1, 4, 4))
    none = pred[:, :0].detach().requires_grad_()
    for clips in (3, 0):
        loss = ops.pixel_loss(none[:clips], video[:clips], ids[:clips, :0], patch=4)
        assert loss == 0 and loss.dtype == torch.float32
        assert torch.autograd.grad(loss, none)[0].shape == (3, 0, 48)


@pytest.mark.parametrize("normalise", ["patch", "patch_channel", None])
def test_gradcheck(normalise):
    pred = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True)
    video = torch.rand(2, 2, 3, 4, 4, dtype=torch.double)
    ids = torch.tensor([[0, 2, 5], [1, 3, 7]])
    f = lambda pred: ops.pixel_loss(pred, video, ids, patch=2, normalise=normalise)  # noqa: E731
    assert torch.autograd.gradcheck(f, (pred,))


def test_refusals():
    pred, video, ids = _inputs((1, 4, 4))
    for change, words in (
        ({"patch": 7}, "whole number of patches"),
        ({"patch": (2, 4, 4)}, "pred must be"),
        ({"patch": 4, "normalise": "image"}, "unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.pixel_loss(pred, video, ids, **change)
    with pytest.raises(ValueError, match="ids_removed must be"):
        ops.pixel_loss(pred, video, ids[0], patch=4)
    with pytest.raises(ValueError, match="more than one pixel"):
        ops.pixel_loss(torch.randn(3, 5, 3), video, ids[:, :5], patch=1, normalise="patch_channel")
    with pytest.raises(ValueError, match="uint8 or float"):
        ops.pixel_loss(pred, video.int(), ids, patch=4)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        ops.pixel_loss(pred, video, ids, patch=4, impl="triton")


def test_no_host_read_meta_and_flops():
    pred, video, ids = _inputs((1, 4, 4))
    with HostReads() as reads:
        ops.pixel_loss(pred, video, ids, patch=4).backward()
    assert not reads.found and reads.launched.count("smaug::pixel_loss") == 1
    with HostReads() as reads:
        importlib.import_module("smaug.ops.pixel_loss")._pixel_loss._init_fn(
            pred.detach(), video, ids, [1, 4, 4], "patch", True
        )
    assert not reads.found and len(reads.launched) > 10
    pred = torch.empty(8, 1411, 1536, device="meta", requires_grad=True)
    video = torch.empty(8, 16, 3, 224, 224, dtype=torch.uint8, device="meta")
    ops.register_flops()
    with FlopCounterMode(display=False) as counter:
        loss = ops.pixel_loss(pred, video, torch.empty(8, 1411, dtype=torch.int32, device="meta"), patch=(2, 16, 16))
        assert loss.shape == () and torch.autograd.grad(loss, pred)[0].shape == pred.shape
    assert counter.get_total_flops() == 9 * pred.numel()


def test_no_grad_keeps_nothing():
    pred, video, ids = _inputs((1, 4, 4))
    args = (video, ids, [1, 4, 4], "patch")
    assert torch.ops.smaug.pixel_loss(pred.detach(), *args, False)[1].numel() == 0
    with torch.no_grad():
        assert not ops.pixel_loss(pred, video, ids, patch=4).requires_grad
