"""pixel_loss: predicted pixels against those of the removed patches; forward in two launches, backward in one.

With R = B * removed patches and P = 3 * t * p * p numbers a patch:

forward   1. A program takes a run of patches, one after the other, each whole in registers as (3 channels, t * p * p):
             pixels are read once, in the weight's order, their mean and variance taken in two passes over registers,
             and pred - target is written where a backward will want it. One fp32 sum a program, at most 4,096.
             Reads R P (pred's bytes + 1 for uint8) and writes R P of pred's bytes. 8 R P FLOPs, 3 without statistics.
          2. One program adds those sums in a fixed order.
backward  (pred - target) * grad * 2 / (R P): reads and writes R P of pred's bytes, R P FLOPs.

No atomics. Channels-last pixels are read 3 bytes apart, so that pred and the difference, the larger streams, keep
their 16-byte accesses; a patch's pixels come from memory once, and twice more from the L1 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import configured, launch
from smaug.kernels.patch_embed import geometry, patch_start

_PROGRAMS = 4096  # sums left to the second launch, at most
_PER_THREAD = 16  # numbers of a patch: enough loads in flight, and no spills
_SUM = dict(BLOCK=1024, num_warps=8)
_SCALE = dict(BLOCK=2048, num_warps=4)


@triton.jit(do_not_specialize=["rows", "chunk", "removed", "frames"])
def _differences(
    pred, video, ids_removed, difference, partial, rows, chunk, removed, frames, height, width,
    T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr,
    NORMALISE: tl.constexpr, WANTS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = T * PH * PW
    channel = tl.arange(0, 4)[:, None]
    q = tl.arange(0, BLOCK)[None, :]
    inside = (channel < 3) & (q < PIXELS)
    column = channel * PIXELS + q
    z, y, across = q // (PH * PW), q // PW % PH, q % PW
    if LAST:
        offset = ((z * height + y) * width + across) * 3 + channel
    else:
        offset = ((z * 3 + channel) * height + y) * width + across
    begin = tl.program_id(0) * chunk
    total = 0.0
    for row in range(begin, tl.minimum(begin + chunk, rows)):
        patch = tl.load(ids_removed + row).to(tl.int32)
        start = video + patch_start(row // removed, patch, frames, height, width, T, PH, PW, LAST)
        raw = tl.load(start + offset, mask=inside, other=0)
        bytes_ = raw.dtype == tl.uint8
        target = raw.to(tl.float32)
        if NORMALISE != "":
            # On the scale of bytes: their sums are exact, and the division is rounded, so a flat patch is exactly 0.
            if NORMALISE == "patch":
                mean = tl.div_rn(tl.sum(tl.sum(target, 1), 0), 3.0 * PIXELS)
                target = tl.where(inside, target - mean, 0.0)
                variance = tl.sum(tl.sum(target * target, 1), 0) / (3 * PIXELS - 1)
                target *= tl.rsqrt(variance + (1e-6 * 255 * 255 if bytes_ else 1e-6))
            else:
                sums = tl.sum(target, 1)
                mean = tl.div_rn(sums, tl.full(sums.shape, PIXELS, tl.float32))
                target = tl.where(inside, target - mean[:, None], 0.0)
                variance = tl.sum(target * target, 1) / (PIXELS - 1)
                target *= tl.rsqrt(variance + (1e-6 * 255 * 255 if bytes_ else 1e-6))[:, None]
        elif bytes_:
            target *= 1 / 255
        at = tl.cast(row, tl.int64) * (3 * PIXELS) + column
        x = tl.load(pred + at, mask=inside, other=0).to(tl.float32) - target
        if WANTS_GRAD:
            tl.store(difference + at, x.to(difference.dtype.element_ty), mask=inside)
        total += tl.sum(tl.sum(x * x, 1), 0)
    tl.store(partial + tl.program_id(0), total)


@triton.jit(do_not_specialize=["count"])
def _mean(partial, loss, count, numel, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(partial + i, mask=i < count, other=0)
    tl.store(loss, tl.sum(acc, 0) / numel)


@triton.jit(do_not_specialize=["rows"])
def _scale(grad, difference, out, rows, width, factor, BLOCK: tl.constexpr):
    count = rows.to(tl.int64) * width  # not one argument: that 16 divides the width makes 16-byte accesses
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(grad).to(tl.float32) * factor
    x = tl.load(difference + i, mask=i < count, other=0).to(tl.float32) * by
    tl.store(out + i, x.to(out.dtype.element_ty), mask=i < count)


def _refuse_fp64(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError("pixel_loss on a GPU sums in fp32 and takes no float64 predictions; use float32, or the CPU.")


def pixel_loss(
    pred: Tensor, video: Tensor, ids_removed: Tensor, patch: Sequence[int], normalise: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    _refuse_fp64(pred.dtype)
    difference = pred.new_empty(pred.shape if wants_grad else (0,))
    loss = pred.new_empty((), dtype=torch.float32)
    pred, video, ids_removed = pred.contiguous(), video.contiguous(), ids_removed.contiguous()
    rows = ids_removed.numel()
    chunk = max(1, triton.cdiv(rows, _PROGRAMS))
    programs = triton.cdiv(rows, chunk)
    partial = pred.new_empty((programs,), dtype=torch.float32)
    block, width = triton.next_power_of_2(patch[0] * patch[1] * patch[2]), pred.shape[-1]
    warps = configured(
        _differences, dict(num_warps=min(16, max(1, 4 * block // (32 * _PER_THREAD)))), pred.dtype, width
    )
    launch(
        _differences, (programs,), pred, video, ids_removed, difference, partial,
        rows=rows, chunk=chunk, removed=ids_removed.shape[1], **geometry(video, patch),
        NORMALISE=normalise, WANTS_GRAD=wants_grad, BLOCK=block, **warps,
    )  # fmt: skip
    sum_ = configured(_mean, _SUM, pred.dtype, width)
    launch(_mean, (1,), partial, loss, count=programs, numel=float(max(pred.numel(), 1)), **sum_)
    return loss, difference


def pixel_loss_backward(grad: Tensor, difference: Tensor) -> Tensor:
    _refuse_fp64(difference.dtype)
    out = difference.new_empty(difference.shape)
    count = difference.numel()
    width = difference.shape[-1]
    blocks = configured(_scale, _SCALE, difference.dtype, width)
    programs = triton.cdiv(count, blocks["BLOCK"])
    rows = count // max(width, 1)
    launch(_scale, (programs,), grad, difference, out, rows=rows, width=width, factor=2 / max(count, 1), **blocks)
    return out


torch.library.register_kernel("smaug::pixel_loss", "cuda", pixel_loss)
torch.library.register_kernel("smaug::pixel_loss_backward", "cuda", pixel_loss_backward)
