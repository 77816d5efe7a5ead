"""kernels/patch_embed.py under the interpreter, against the registered op's CPU path and, in fp16, against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smaug import ops
from smaug.kernels import launch
from smaug.kernels.patch_embed import patch_embed, patch_embed_backward
from smaug.testing import relative_error, surrounded

MEAN, STD = (0.48, 0.45, 0.40), (0.22, 0.23, 0.25)


def inputs(
    patch, last=False, pixels=torch.uint8, dtype=torch.float32, d=24, clips=2, grid=(2, 2, 3), keep=5, **options
):
    """The op's arguments; rows of patches and columns differ, so that a swap shows."""
    bias, position, prefixes, per_frame, uniform = (
        options.get(name, default)
        for name, default in dict(bias=True, position="full", prefixes=2, per_frame=False, uniform=False).items()
    )
    t, ph, pw = patch
    tubes, rows, columns = grid
    video = torch.randint(0, 256, (clips, tubes * t, 3, rows * ph, columns * pw), dtype=torch.uint8)
    if last:
        video = video.permute(0, 1, 3, 4, 2).contiguous()
    if pixels != torch.uint8:
        video = surrounded((video / 255).to(pixels))
    kind = "tube" if uniform else "random"
    ids, _ = ops.random_mask(torch.arange(clips), grid, max(1, keep), seed=3, kind=kind)
    ids = ids[:, :keep]
    p = 3 * t * ph * pw
    weight = (torch.randn(d, p) / p**0.5).to(dtype)
    table = (
        None if position is None else torch.randn(tubes * rows * columns if position == "full" else rows * columns, d)
    )
    return (
        video, ids, weight, torch.randn(d).to(dtype) if bias else None, table if table is None else table.to(dtype),
        torch.randn(prefixes, d).to(dtype) if prefixes else None, list(patch), MEAN, STD, per_frame, uniform, dtype,
    )  # fmt: skip


def backward_arguments(args, video_grad=False):
    video, ids, weight, _, position, prefix, *rest, dtype = args
    rows = torch.ops.smaug.patch_embed(*args)[0].shape
    return (
        surrounded(torch.randn(rows).to(dtype)), video, ids, weight, 0 if position is None else position.shape[0],
        0 if prefix is None else prefix.shape[0], *rest, video_grad,
    )  # fmt: skip


def agree(got, want, tolerance):
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    for a, b in zip(got, want, strict=True):
        if a.dtype == torch.int32:
            assert torch.equal(a, b)
        elif b.numel():
            assert a.isfinite().all() and relative_error(a, b) < tolerance, (a - b).abs().max()


def check(args, video_grad=False, tolerance=None):
    tolerance = tolerance or (2e-6 if args[-1] == torch.float32 else 2e-3)  # fp16: CPU rounds products and tables too
    agree(patch_embed(*args), torch.ops.smaug.patch_embed(*args), tolerance)
    args = backward_arguments(args, video_grad)
    agree(patch_embed_backward(*args), torch.ops.smaug.patch_embed_backward(*args), tolerance)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch", [(1, 4, 4), (2, 4, 4), (1, 8, 4)])
def test_layouts_and_pixels(patch, pixels, last):
    check(inputs(patch, last, pixels), video_grad=pixels != torch.uint8)


@pytest.mark.parametrize(
    ("patch", "last"), [((1, 14, 14), False), ((2, 14, 14), True), ((2, 16, 16), False), ((2, 16, 16), True)]
)
def test_patches_of_models(patch, last):
    """P = 588, 1,176 and 1,536; the first two are no multiples of a block."""
    check(inputs(patch, last))


@settings(max_examples=6)
@given(
    patch=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    last=st.booleans(),
    pixels=st.sampled_from([torch.uint8, torch.float32]),
    d=st.integers(1, 70),
    clips=st.integers(1, 3),
    keep=st.integers(1, 12),
    prefixes=st.integers(0, 2),
    per_frame=st.booleans(),
)
def test_any_patch(patch, last, pixels, d, clips, keep, prefixes, per_frame):
    args = inputs(patch, last, pixels, d=d, clips=clips, keep=keep, prefixes=prefixes, per_frame=per_frame)
    check(args, video_grad=pixels != torch.uint8)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float16])
def test_fp16(last, pixels):
    check(inputs((1, 16, 16), last, pixels, torch.float16), video_grad=pixels != torch.uint8)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("position", ["full", "frame"])
@pytest.mark.parametrize("prefixes", [0, 3])
def test_a_prefix_for_each_frame(prefixes, position, uniform):
    args = inputs((1, 4, 4), prefixes=prefixes, position=position, per_frame=True, uniform=uniform, keep=6)
    check(args)


@pytest.mark.parametrize("per_frame", [False, True])
def test_without_anything_that_may_be_left_out(per_frame):
    check(inputs((1, 4, 4), bias=False, position=None, prefixes=0, per_frame=per_frame))


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("keep", [1, 12])
def test_one_patch_kept_or_all(keep, per_frame):
    check(inputs((1, 4, 4), pixels=torch.float32, keep=keep, per_frame=per_frame), video_grad=True)


@pytest.mark.parametrize(("clips", "keep"), [(2, 0), (0, 5)])
def test_no_patch_kept_and_no_clips(clips, keep):
    """Prefixes alone. Not compared: the CPU path raises."""
    args = inputs((1, 4, 4), pixels=torch.float32, clips=clips, keep=keep)
    video, ids, weight, _, _, prefix, *rest, _ = args
    values, cu_seqlens, out_ids, size = patch_embed(*args)
    assert torch.equal(values, prefix.repeat(clips, 1)) and cu_seqlens.tolist() == [0, 2, 4][: clips + 1]
    assert (out_ids == -1).all() and (size == 1).all()
    *grads, dprefix, dvideo = patch_embed_backward(torch.ones(values.shape), video, ids, weight, 12, 2, *rest, True)
    assert all((g == 0).all() for g in (*grads, dvideo)) and (dprefix == clips).all()


def test_an_empty_frame_has_its_prefix():
    args = list(inputs((1, 4, 4), clips=1, grid=(4, 1, 3), per_frame=True))
    args[1] = torch.tensor([[0, 2, 2 * 3 + 1]], dtype=torch.int32)
    check(args)
    assert patch_embed(*args)[1].tolist() == [0, 4, 6, 9, 11]


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_several_tiles_and_splits_in_every_order(in_every_order, monkeypatch, last, per_frame):
    """Rows, D and P are no multiples of their blocks; ids are int64, as from topk; sums come in a fixed order."""
    monkeypatch.setattr("smaug.kernels.patch_embed._SPLIT_ROWS", 32)
    args = list(inputs((1, 8, 4), last, torch.float32, d=72, clips=6, keep=11, position="frame", per_frame=per_frame))
    args[1] = args[1].long()
    agree(in_every_order(lambda: patch_embed(*args)), torch.ops.smaug.patch_embed(*args), 2e-6)
    args = backward_arguments(args, video_grad=True)
    got = in_every_order(lambda: patch_embed_backward(*args))
    agree(got, torch.ops.smaug.patch_embed_backward(*args), 2e-6)


def test_autocast_and_mixed_types():
    """fp32 weights, fp16 product: as exact as the CPU's product of fp16, judged by fp64."""
    args = list(inputs((1, 8, 4), d=64))
    args[-1] = torch.float16
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args[:-1]]
    truth = torch.ops.smaug.patch_embed(*double, torch.float64)[0]
    got, cpu = patch_embed(*args)[0], torch.ops.smaug.patch_embed(*args)[0]
    assert got.dtype == torch.float16 and relative_error(got, truth) <= relative_error(cpu, truth)
    back = backward_arguments(args)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in back]
    truth = torch.ops.smaug.patch_embed_backward(*exact)[:4]
    got, cpu = patch_embed_backward(*back)[:4], torch.ops.smaug.patch_embed_backward(*back)[:4]
    for a, b, c in zip(got, cpu, truth, strict=True):
        assert a.dtype == torch.float32 and relative_error(a, c) <= max(2 * relative_error(b, c), 1e-6)


def test_masked_patches_are_not_read():
    args = list(inputs((1, 4, 4), pixels=torch.float32))
    video, ids = args[:2]
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, ids.long(), True).view(2, 2, 1, 2, 3)
    args[0] = video.masked_fill(~mask.repeat_interleave(4, 3).repeat_interleave(4, 4), torch.nan)
    check(args)


def test_the_gradient_of_a_sum_and_strided_inputs():
    """grad without memory of its own, a weight that is a transpose, every second frame of a video."""
    args = list(inputs((1, 4, 4)))
    args[0] = args[0].repeat_interleave(2, 1)[:, ::2]
    args[2] = args[2].t().contiguous().t()
    check(args)
    back = list(backward_arguments(args))
    back[0] = torch.ones(()).expand(back[0].shape)
    agree(patch_embed_backward(*back), torch.ops.smaug.patch_embed_backward(*back), 2e-6)


def test_launches():
    args = inputs((1, 4, 4), pixels=torch.float32)
    back = backward_arguments(args, video_grad=True)
    with launch.record() as launches:
        patch_embed(*args)
    assert [x.name for x in launches] == ["_embed"]
    with launch.record() as launches:
        patch_embed_backward(*back)
    assert [x.name for x in launches] == ["_dweight", "_tables", "_dvideo"]


def test_fp64_is_refused():
    args = inputs((1, 4, 4), dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        patch_embed(*args)
