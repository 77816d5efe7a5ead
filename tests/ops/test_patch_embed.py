"""patch_embed: a convolution in fp64, at the kept places only."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smaug import ops
from smaug.testing import HostReads, relative_error

MEAN, STD = (0.48, 0.45, 0.40), (0.22, 0.23, 0.25)


def _truth(video, ids, weight, bias, patch, position):
    if video.shape[2] != 3:
        video = video.permute(0, 1, 4, 2, 3)
    x = video.double() / (255 if video.dtype == torch.uint8 else 1)
    mean, std = (torch.tensor(s, dtype=torch.double)[:, None, None] for s in (MEAN, STD))
    x = ((x - mean) / std).transpose(1, 2)
    y = F.conv3d(x, weight.double().view(-1, 3, *patch), bias.double(), stride=patch).flatten(2).transpose(1, 2)
    y = y + position.double().repeat(y.shape[1] // position.shape[0], 1)
    return y.gather(1, ids.long()[..., None].expand(-1, -1, y.shape[2]))


def _inputs(patch, last, uint8, dtype=torch.float32, full_position=False, kind="random", d=24, b=3, keep=None):
    torch.manual_seed(0)
    f, h, w = 4, 24, 12
    video = torch.randint(0, 256, (b, f, 3, h, w), dtype=torch.uint8)
    if last:
        video = video.permute(0, 1, 3, 4, 2).contiguous()
    if not uint8:
        video = (video / 255).requires_grad_()
    grid = (f // patch[0], h // patch[1], w // patch[2])
    n = grid[1] * grid[2]
    ids, _ = ops.random_mask(torch.arange(b), grid, keep or grid[0] * (n // 3), seed=3, kind=kind)
    p = 3 * patch[0] * patch[1] * patch[2]
    weight = (torch.randn(d, p) / p**0.5).to(dtype).requires_grad_()
    bias = torch.randn(d).to(dtype).requires_grad_()
    position = torch.randn(grid[0] * n if full_position else n, d).to(dtype).requires_grad_()
    prefix = torch.randn(2, d).to(dtype).requires_grad_()
    return video, ids, weight, bias, position, prefix


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("patch", "full"), [((1, 8, 4), False), ((2, 4, 4), True), ((1, 6, 6), True)])
def test_is_the_convolution_at_kept_places(patch, full, last, uint8, per):
    _is_the_convolution(patch, full, last, uint8, per)


@given(st.data())
def test_is_the_convolution_for_any_patch(data):
    patch = tuple(data.draw(st.sampled_from(x)) for x in ([1, 2, 4], [2, 3, 4, 6, 8, 12], [1, 2, 3, 4, 6]))
    full, last, uint8 = (data.draw(st.booleans()) for _ in range(3))
    keep = data.draw(st.integers(1, 4 // patch[0] * (24 // patch[1]) * (12 // patch[2])))
    per, d, b = (
        data.draw(st.sampled_from(["clip", "frame"])),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 3)),
    )
    _is_the_convolution(patch, full, last, uint8, per, d=d, b=b, keep=keep)


def _is_the_convolution(patch, full, last, uint8, per, **sizes):
    video, ids, weight, bias, position, prefix = _inputs(patch, last, uint8, full_position=full, **sizes)
    out = ops.patch_embed(
        video, ids, weight, bias, patch=patch, mean=MEAN, std=STD, position=position, prefix=prefix, prefix_per=per
    )
    kept = out.ids >= 0
    truth = _truth(video, ids, weight, bias, patch, position)
    assert torch.equal(out.ids[kept].view_as(ids), ids)
    got = out.values[kept].view_as(truth)
    assert relative_error(got, truth) < 1e-6
    n = weight.shape[0] and (video.shape[2:4] if last else video.shape[3:5])
    n = (n[0] // patch[1]) * (n[1] // patch[2])
    for start, end in zip(out.cu_seqlens[:-1].tolist(), out.cu_seqlens[1:].tolist(), strict=True):
        assert torch.equal(out.values[start : start + 2], prefix)
        assert (out.ids[start : start + 2] == -1).all()
        if per == "frame":
            assert (out.ids[start + 2 : end] // n).unique().numel() <= 1
        assert end - start <= out.max_seqlen
    assert out.cu_seqlens[-1] == out.rows and (out.size == 1).all()
    g = torch.randn_like(out.values)
    wanted = [weight, bias, position] + ([] if uint8 else [video])
    got_grads = torch.autograd.grad(out.values, [*wanted, prefix], g)
    true_grads = torch.autograd.grad(truth, wanted, g[kept].view_as(truth).double())
    for a, b in zip(got_grads, true_grads, strict=False):
        assert relative_error(a, b) < 1e-5
    assert relative_error(got_grads[-1], torch.stack([g[out.cu_seqlens[:-1].long() + i].sum(0) for i in (0, 1)])) < 1e-6


@pytest.mark.parametrize("last", [True, False])
def test_bf16_is_as_good_as_eager(last):
    """At most twice the error of a bf16 convolution on normalised bf16 pixels."""
    patch = (1, 8, 4)
    video, ids, weight, bias, position, _ = _inputs(patch, last, True, torch.bfloat16, d=64)
    truth = _truth(video, ids, weight, bias, patch, position)
    first = video.permute(0, 1, 4, 2, 3) if last else video
    mean, std = (torch.tensor(s)[:, None, None] for s in (MEAN, STD))
    pixels = ((first / 255 - mean) / std).bfloat16().flatten(0, 1)
    eager = F.conv2d(pixels, weight.view(-1, 3, 8, 4), bias, stride=(8, 4)).flatten(2).transpose(1, 2) + position
    eager = eager.reshape(3, -1, 64).gather(1, ids.long()[..., None].expand(-1, -1, 64))
    got = ops.patch_embed(video, ids, weight, bias, patch=patch, mean=MEAN, std=STD, position=position)
    assert got.values.dtype == torch.bfloat16
    assert relative_error(got.values.view_as(truth), truth) <= 2 * relative_error(eager, truth)


def test_uniform_frames_equal_ragged_frames():
    patch = (1, 4, 4)
    video, ids, weight, bias, position, prefix = _inputs(patch, False, True, kind="tube")
    both = []
    for uniform in (True, False):
        out = ops.patch_embed(
            video, ids, weight, bias, patch=patch, mean=MEAN, std=STD, position=position, prefix=prefix,
            prefix_per="frame", uniform=uniform,
        )  # fmt: skip
        grads = torch.autograd.grad(out.values.square().sum(), [weight, bias, position, prefix])
        both.append([out.values, out.cu_seqlens, out.ids, out.size, *grads])
        assert out.lengths == (ids.shape[1] // 4 + 2 if uniform else None)
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frame_without_a_patch_keeps_its_prefix():
    video, _, weight, bias, _, prefix = _inputs((1, 4, 4), False, True, b=1)
    ids = torch.tensor([[0, 3, 2 * 18 + 1]], dtype=torch.int32)
    out = ops.patch_embed(
        video, ids, weight, bias, patch=(1, 4, 4), mean=MEAN, std=STD, prefix=prefix, prefix_per="frame"
    )
    assert out.cu_seqlens.tolist() == [0, 4, 6, 9, 11]
    assert out.ids.tolist() == [-1, -1, 0, 3, -1, -1, -1, -1, 37, -1, -1]
    bare = ops.patch_embed(video, ids, weight, patch=(1, 4, 4), mean=MEAN, std=STD, prefix_per="frame")
    assert bare.cu_seqlens.tolist() == [0, 2, 2, 3, 3]


def test_masked_patches_are_not_read():
    video, ids, weight, bias, _, _ = _inputs((1, 4, 4), False, False)
    grid = torch.zeros(3, 4 * 18, dtype=torch.bool).scatter_(1, ids.long(), True).view(3, 4, 1, 6, 3)
    mask = grid.repeat_interleave(4, 3).repeat_interleave(4, 4)
    poisoned = video.detach().masked_fill(~mask, torch.nan)
    kw = dict(patch=4, mean=MEAN, std=STD)
    assert torch.equal(
        ops.patch_embed(poisoned, ids, weight, bias, **kw).values,
        ops.patch_embed(video, ids, weight, bias, **kw).values,
    )


def test_strided_video_and_channels_last_memory():
    video, ids, weight, bias, _, _ = _inputs((1, 4, 4), False, True)
    kw = dict(patch=4, mean=MEAN, std=STD)
    want = ops.patch_embed(video, ids, weight, bias, **kw).values
    other = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(ops.patch_embed(other, ids, weight, bias, **kw).values, want)
    every = video.repeat_interleave(2, 1)
    torch.testing.assert_close(ops.patch_embed(every[:, ::2], ids, weight, bias, **kw).values, want)


def test_gradcheck():
    video = torch.rand(2, 2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    ids = torch.tensor([[0, 2, 5], [1, 3, 7]])
    leaves = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 12), (3,), (4, 3), (1, 3))]
    for per in ("clip", "frame"):

        def f(video, weight, bias, position, prefix, per=per):
            return ops.patch_embed(
                video, ids, weight, bias, patch=2, mean=MEAN, std=STD, position=position, prefix=prefix, prefix_per=per
            ).values

        assert torch.autograd.gradcheck(f, (video, *leaves))


def test_autocast_keeps_fp32_gradients():
    video, ids, weight, bias, position, prefix = _inputs((1, 4, 4), False, True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.patch_embed(video, ids, weight, bias, patch=4, mean=MEAN, std=STD, position=position, prefix=prefix)
    assert out.values.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.values.float().sum(), [weight, prefix]))


def test_refusals():
    video, ids, weight, bias, _, _ = _inputs((1, 4, 4), False, True)
    kw = dict(mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="whole number of patches"):
        ops.patch_embed(video, ids, weight, bias, patch=7, **kw)
    with pytest.raises(ValueError, match="weight must be"):
        ops.patch_embed(video, ids, weight, bias, patch=(2, 4, 4), **kw)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        ops.patch_embed(video, ids, weight, bias, patch=4, impl="triton", **kw)


def test_no_host_read_and_meta():
    video, ids, weight, bias, position, prefix = _inputs((1, 4, 4), False, True)
    kw = dict(patch=4, mean=MEAN, std=STD, position=position, prefix=prefix)
    for per in ("clip", "frame"):
        with HostReads() as reads:
            ops.patch_embed(video, ids, weight, bias, prefix_per=per, **kw).values.sum().backward()
        assert not reads.found
    meta = lambda *s, **k: torch.empty(*s, device="meta", **k)  # noqa: E731
    leaves = [meta(s, requires_grad=True) for s in ((768, 1536), (768,), (1568, 768), (1, 768))]
    video = meta(8, 16, 3, 224, 224, dtype=torch.uint8)
    for per, rows in (("clip", 8 * 158), ("frame", 8 * (157 + 8))):
        out = ops.patch_embed(
            video, meta(8, 157, dtype=torch.int32), *leaves[:2], patch=(2, 16, 16), mean=MEAN, std=STD,
            position=leaves[2], prefix=leaves[3], prefix_per=per,
        )  # fmt: skip
        assert out.values.shape == (rows, 768)
        grads = torch.autograd.grad(out.values.sum(), leaves)
        assert [g.shape for g in grads] == [x.shape for x in leaves]


@pytest.mark.parametrize("clips,count", [(2, 0), (0, 5)])
def test_no_patch_and_no_clip_give_what_is_left(clips, count):
    video = torch.zeros(clips, 2, 8, 8, 3, dtype=torch.uint8)
    weight, prefix = torch.randn(6, 3 * 16, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    ids = torch.zeros(clips, count, dtype=torch.int32)
    tokens = ops.patch_embed(video, ids, weight, patch=4, mean=(0.5,) * 3, std=(0.25,) * 3, prefix=prefix)
    assert torch.equal(tokens.values, prefix.expand(clips, -1)) and tokens.num_sequences == clips
    tokens.values.sum().backward()
    assert (weight.grad == 0).all() and (prefix.grad == clips).all()
