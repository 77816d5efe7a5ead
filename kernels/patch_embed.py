"""patch_embed: pixels of the kept patches, straight from the uint8 video, to embedded tokens and back.

With R = B * K kept patches, P = 3 * t * p * p numbers a patch, S sequences and n prefix rows a sequence:

forward   1 launch, 2 R P D FLOPs. ceil(R / BLOCK_M) x ceil(D / BLOCK_D) programs, those of one tile of patches next to
          each other, so the pixels come from memory once and then from the L2 cache; after them programs that write
          cu_seqlens and the prefix rows. Reads R P bytes of video (uint8), R ids, P D weights a tile of patches (they
          stay in L2: 2.4 MB for ViT-B, tubelet 2, bf16); writes (R + S n) rows of D, their ids and sizes.
backward  2 launches, one more where a float video wants a gradient; 2 R P D FLOPs, and as many for the video.
          1. dweight: ceil(D / BLOCK_D) x ceil(P / BLOCK_P) tiles times `splits` of the rows. Pixels are read again, so
             the forward keeps nothing. Writes splits * P D fp32; the first tile of P also sums the bias.
          2. sums the splits in ascending order; a program a row of the position table finds its patch in each clip's
             ascending ids and sums what is there; a program a prefix row sums over the sequences.
          3. dvideo: kept patches are products, the others are found by search and written as zeros: each pixel once.

No atomics: every sum has a fixed order, which depends on shapes alone, not on the device.
Pixels are normalised as fp32 in registers and rounded once to the type of the product. Channels-last video walks the
reduction in memory order, 3 * p bytes at a time, and the weight's index is permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import architecture, configured, launch

# Chosen offline, from registers, spills and shared memory (tests/kernels/test_compiled_pixels.py); not measured.
# Products in 16 bits; sm_86, 89 have 99 KB of shared memory, where sm_80 has 163.
_EMBED = {
    80: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=64, num_warps=8, num_stages=4),
    86: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=64, num_warps=8, num_stages=3),
    90: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=64, num_warps=8, num_stages=4),
}
_EMBED_LAST = {  # the weight is read two bytes at a time, and waits in registers
    80: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=32, num_warps=8, num_stages=4),
    # 168 registers a thread: left alone, the assembler takes 128 and spills
    86: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=32, num_warps=8, num_stages=3, maxnreg=168),
    90: dict(BLOCK_M=128, BLOCK_D=64, BLOCK_K=32, num_warps=8, num_stages=4),
}
_DWEIGHT = {
    80: dict(BLOCK_D=128, BLOCK_P=64, BLOCK_M=32, num_warps=8, num_stages=4),
    90: dict(BLOCK_D=128, BLOCK_P=64, BLOCK_M=64, num_warps=8, num_stages=3),
}
_DVIDEO = {
    80: dict(BLOCK_M=64, BLOCK_P=64, BLOCK_K=32, num_warps=4, num_stages=3),
}
# fp32 in fp32, without tensor cores: the accumulator and both operands are in registers.
_FP32 = dict(num_warps=8, num_stages=2)
_EMBED_FP32 = {
    80: dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=32, **_FP32),
    90: dict(BLOCK_M=64, BLOCK_D=64, BLOCK_K=32, **_FP32, maxnreg=168),  # left alone 128, and spills
}
_DWEIGHT_FP32 = {80: dict(BLOCK_D=64, BLOCK_P=64, BLOCK_M=32, **_FP32)}
_DVIDEO_FP32 = {
    80: dict(BLOCK_M=64, BLOCK_P=64, BLOCK_K=32, **_FP32),
    100: dict(BLOCK_M=64, BLOCK_P=64, BLOCK_K=32, **_FP32, maxnreg=128),
}
_TABLES = dict(BLOCK=1024, BLOCK_S=128, BLOCK_D=64, num_warps=4)

_SPLIT_ROWS = 512  # rows of a split, at least: below that the second stage costs more than it gives
_PROGRAMS = 528  # four for each of 132 multiprocessors; a constant, so that the order of sums is the same everywhere


@triton.jit
def patch_start(clip, patch, frames, height, width, T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST):
    """Where a patch begins in the video, in elements. int64: 1,024 clips of 16 x 3 x 224 x 224 pass 2^31."""
    columns = width // PW
    patches = height // PH * columns
    frame = clip.to(tl.int64) * frames + patch // patches * T
    place = patch % patches
    inside = place // columns * PH * width + place % columns * PW
    if LAST:
        inside *= 3
    return frame * (3 * height * width) + inside


@triton.jit
def _pixel_offset(k, height, width, T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr):
    """Where the k-th number of a patch lies after its first, k in memory order."""
    if LAST:
        line = k // (3 * PW)  # (frame, row)
        return (line // PH * height + line % PH) * (3 * width) + k % (3 * PW)
    line = k // PW  # (channel, frame, row)
    z = line // PH % T * 3 + line // (T * PH)
    return (z * height + line % PH) * width + k % PW


@triton.jit
def _weight_offset(k, T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr):
    """The weight's column of the k-th number of a patch."""
    if LAST:
        return k % 3 * (T * PH * PW) + k // 3
    return k


@triton.jit
def _weights(row, k0, in_d, T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr):
    """K columns of a tile of the weight, those of the numbers from k0 on."""
    k = k0 + tl.arange(0, K)
    at = row[:, None] + _weight_offset(k, T, PH, PW, LAST)[None, :]
    if 3 * T * PH * PW % K == 0 and not LAST:
        return tl.load(at, mask=in_d[:, None], other=0)
    return tl.load(at, mask=in_d[:, None] & (k < 3 * T * PH * PW)[None, :], other=0)


@triton.jit
def _of_channel(k, a, b, c, T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr):
    """a, b or c: what belongs to the channel of the k-th number."""
    channel = k % 3 if LAST else k // (T * PH * PW)
    return tl.where(channel == 0, a, tl.where(channel == 1, b, c))


@triton.jit
def _normalised(x, scale, shift):
    if x.dtype == tl.uint8:
        # 2^23 + x, then minus 2^23: exact, and four times the rate of the conversion instruction
        x = (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return x.to(tl.float32) * scale + shift


@triton.jit
def _before(ids, clip, limit, kept, steps, mask):
    """How many of a clip's ascending ids are below limit: binary search, `steps` = bits of kept."""
    base = ids + clip * kept
    low = tl.zeros_like(clip)
    high = low + kept
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = mask & (low < high)
        below = tl.load(base + middle, mask=open_, other=0).to(tl.int32) < limit
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit
def _row(m, clip, tube, each, tubes, prefixes, EVEN: tl.constexpr):
    """The packed row of kept patch m: a prefix stands before its sequence and before each one before it."""
    sequence = m // each if EVEN else clip * tubes + tube
    return m + (sequence + 1).to(tl.int64) * prefixes


@triton.jit
def _sequence_start(s, ids, kept, each, tubes, patches, prefixes, steps, mask, EVEN: tl.constexpr):
    """The packed row where sequence s begins, int64."""
    if EVEN:
        return s.to(tl.int64) * (each + prefixes)
    clip, tube = s // tubes, s % tubes
    return clip.to(tl.int64) * kept + _before(ids, clip, tube * patches, kept, steps, mask) + s.to(tl.int64) * prefixes


_SIZES = ["rows", "kept", "each", "tubes", "sequences", "prefixes", "frames", "steps"]


@triton.jit(do_not_specialize=_SIZES)
def _embed(
    video, ids_keep, weight, bias, position, prefix, values, cu_seqlens, ids, size,
    rows, kept, each, tubes, sequences, prefixes, frames, height, width, d, steps,
    scale0, scale1, scale2, shift0, shift1, shift2,
    T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    SHARED_POSITION: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 3 * T * PH * PW
    tiles_d = tl.cdiv(d, BLOCK_D)
    tile = tl.program_id(0) // tiles_d
    first = tl.program_id(0) % tiles_d == 0  # of the programs of these rows, the one that writes ids and sizes
    column = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = column < d
    patches = (height // PH) * (width // PW)
    dtype = values.dtype.element_ty
    if tile < tl.cdiv(rows, BLOCK_M):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < rows
        patch = tl.load(ids_keep + m, mask=in_m, other=0).to(tl.int32)
        start = video + patch_start(m // kept, patch, frames, height, width, T, PH, PW, LAST)
        weight_row = weight + column * P
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        # A channels-last thread holds 16 numbers of alternating channels: cheaper to scale the weight, which passes
        # through registers there, than the pixels.
        FOLD: tl.constexpr = LAST and video.dtype.element_ty == tl.uint8
        constant = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
        k1 = 0  # k0 under another name: the pipeline would carry each k in registers from its load to its use
        w_next = _weights(weight_row, 0, in_d, T, PH, PW, LAST, BLOCK_K)
        for k0 in range(0, P, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            offset = _pixel_offset(k, height, width, T, PH, PW, LAST)
            if P % BLOCK_K == 0:
                x = tl.load(start[:, None] + offset[None, :], mask=in_m[:, None], other=0)
            else:
                x = tl.load(start[:, None] + offset[None, :], mask=in_m[:, None] & (k < P)[None, :], other=0)
            if LAST:
                w = w_next
                w_next = _weights(weight_row, k0 + BLOCK_K, in_d, T, PH, PW, LAST, BLOCK_K)
            else:
                w = _weights(weight_row, k0, in_d, T, PH, PW, LAST, BLOCK_K)
            k = k1 + tl.arange(0, BLOCK_K)
            scale = _of_channel(k, scale0, scale1, scale2, T, PH, PW, LAST)[None, :]
            shift = _of_channel(k, shift0, shift1, shift2, T, PH, PW, LAST)[None, :]
            k1 += BLOCK_K
            if FOLD:
                middle = -128.0
                if APART:
                    # The same, as a row: a constant lets the compiler carry the layout of wgmma's operand back through
                    # the arithmetic to the copy, whose pieces are then 8 bytes. Now they are 16, for 24 KB of shared
                    # memory where there were 16. Scaling pixels does it too, with twice the instructions in the loop.
                    middle = tl.where(k >= 0, middle, 0.0)[None, :]
                x = _normalised(x, 1.0, middle)  # exact in bf16
                constant += w.to(tl.float32) * (128 * scale + shift)
                w = w.to(tl.float32) * scale
            else:
                x = _normalised(x, scale, shift)
            acc = tl.dot(x.to(dtype), tl.trans(w.to(dtype)), acc, input_precision="ieee")
        if FOLD:
            acc += tl.sum(constant, 1)[None, :]
        if bias is not None:
            acc += tl.load(bias + column, mask=in_d, other=0).to(tl.float32)[None, :]
        inside = in_m[:, None] & in_d[None, :]
        if position is not None:
            at = patch % patches if SHARED_POSITION else patch
            table = position + at.to(tl.int64)[:, None] * d + column[None, :]
            acc += tl.load(table, mask=inside, other=0).to(tl.float32)
        row = _row(m, m // kept, patch // patches, each, tubes, prefixes, EVEN)
        tl.store(values + row[:, None] * d + column[None, :], acc.to(dtype), mask=inside)
        tl.store(ids + row, patch, mask=in_m & first)
        tl.store(size + row, tl.full((BLOCK_M,), 1.0, tl.float32), mask=in_m & first)
    else:
        s = (tile - tl.cdiv(rows, BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_s = s < sequences
        row = _sequence_start(s, ids_keep, kept, each, tubes, patches, prefixes, steps, in_s, EVEN)
        tl.store(cu_seqlens + s, row.to(tl.int32), mask=(s <= sequences) & first)
        if prefix is not None:
            for i in range(prefixes):
                x = tl.load(prefix + i * d + column, mask=in_d, other=0).to(dtype)
                x = tl.broadcast_to(x[None, :], (BLOCK_M, BLOCK_D))
                tl.store(values + (row + i)[:, None] * d + column[None, :], x, mask=in_s[:, None] & in_d[None, :])
                tl.store(ids + row + i, tl.full((BLOCK_M,), -1, tl.int32), mask=in_s & first)
                tl.store(size + row + i, tl.full((BLOCK_M,), 1.0, tl.float32), mask=in_s & first)


@triton.jit(do_not_specialize=["split_rows", *_SIZES])
def _dweight(
    grad, video, ids_keep, dweight, dbias,
    split_rows, rows, kept, each, tubes, prefixes, frames, height, width, d,
    scale0, scale1, scale2, shift0, shift1, shift2,
    T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 3 * T * PH * PW
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile_p = tl.program_id(0) % TILES_P
    tile_d = tl.program_id(0) // TILES_P % tl.cdiv(d, BLOCK_D)
    split = tl.program_id(0) // (TILES_P * tl.cdiv(d, BLOCK_D))
    column = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    in_d, in_k = column < d, k < P
    patches = (height // PH) * (width // PW)
    dtype = grad.dtype.element_ty
    offset = _pixel_offset(k, height, width, T, PH, PW, LAST)
    scale = _of_channel(k, scale0, scale1, scale2, T, PH, PW, LAST)
    shift = _of_channel(k, shift0, shift1, shift2, T, PH, PW, LAST)
    end = tl.minimum((split + 1) * split_rows, rows)
    acc = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    for m0 in range(split * split_rows, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        in_m = m < end
        patch = tl.load(ids_keep + m, mask=in_m, other=0).to(tl.int32)
        row = _row(m, m // kept, patch // patches, each, tubes, prefixes, EVEN)
        g = tl.load(grad + row[:, None] * d + column[None, :], mask=in_m[:, None] & in_d[None, :], other=0)
        start = video + patch_start(m // kept, patch, frames, height, width, T, PH, PW, LAST)
        x = tl.load(start[:, None] + offset[None, :], mask=in_m[:, None] & in_k[None, :], other=0)
        x = _normalised(x, scale[None, :], shift[None, :])
        acc = tl.dot(tl.trans(g), x.to(dtype), acc, input_precision="ieee")
    inside = in_d[:, None] & in_k[None, :]
    out = dweight + (split.to(tl.int64) * d + column[:, None]) * P + _weight_offset(k, T, PH, PW, LAST)[None, :]
    tl.store(out, acc, mask=inside)
    if tile_p == 0:  # these rows of grad once more, from L2: as a sum inside the loop every tile would pay for it
        total = tl.zeros((BLOCK_D,), tl.float32)
        for m0 in range(split * split_rows, end, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            patch = tl.load(ids_keep + m, mask=m < end, other=0).to(tl.int32)
            row = _row(m, m // kept, patch // patches, each, tubes, prefixes, EVEN)
            g = tl.load(grad + row[:, None] * d + column[None, :], mask=(m < end)[:, None] & in_d[None, :], other=0)
            total += tl.sum(g.to(tl.float32), 0)
        tl.store(dbias + split.to(tl.int64) * d + column, total, mask=in_d)


@triton.jit
def _sum_splits(partial, out, block, count, splits, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    at = partial + i
    for _ in range(splits):
        acc += tl.load(at, mask=i < count, other=0)
        at += count
    tl.store(out + i, acc, mask=i < count)


@triton.jit(do_not_specialize=["splits", "blocks", "bias_blocks", "clips", "positions", "repeats", *_SIZES])
def _tables(
    grad, ids_keep, partial, partial_bias, dweight, dbias, dposition, dprefix,
    splits, blocks, bias_blocks, clips, positions, repeats,
    kept, each, tubes, sequences, prefixes, patches, d, p, steps,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_d = tl.cdiv(d, BLOCK_D)
    if program < blocks:
        _sum_splits(partial, dweight, program, d * p, splits, BLOCK)
    elif program < blocks + bias_blocks:
        _sum_splits(partial_bias, dbias, program - blocks, d, splits, BLOCK)
    else:
        program -= blocks + bias_blocks
        target = program // tiles_d
        column = program % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = column < d
        acc = tl.zeros((BLOCK_D,), tl.float32)
        if target < positions:
            for first in range(0, clips * repeats, BLOCK_S):
                s = first + tl.arange(0, BLOCK_S)
                inside = s < clips * repeats
                clip, patch = s // repeats, target + s % repeats * patches
                at = _before(ids_keep, clip, patch, kept, steps, inside)
                inside = inside & (at < kept)
                m = clip * kept + at  # rows fit in 32 bits, as cu_seqlens does
                found = inside & (tl.load(ids_keep + m, mask=inside, other=0).to(tl.int32) == patch)
                row = _row(m, clip, patch // patches, each, tubes, prefixes, EVEN)
                g = tl.load(grad + row[:, None] * d + column[None, :], mask=found[:, None] & in_d[None, :], other=0)
                acc += tl.sum(g.to(tl.float32), 0)
            tl.store(dposition + target.to(tl.int64) * d + column, acc, mask=in_d)
        else:
            for first in range(0, sequences, BLOCK_S):
                s = first + tl.arange(0, BLOCK_S)
                in_s = s < sequences
                row = _sequence_start(s, ids_keep, kept, each, tubes, patches, prefixes, steps, in_s, EVEN)
                row += target - positions
                g = tl.load(grad + row[:, None] * d + column[None, :], mask=in_s[:, None] & in_d[None, :], other=0)
                acc += tl.sum(g.to(tl.float32), 0)
            tl.store(dprefix + (target - positions) * d + column, acc, mask=in_d)


@triton.jit(do_not_specialize=["clips", *_SIZES])
def _dvideo(
    grad, ids_keep, weight, dvideo,
    clips, rows, kept, each, tubes, prefixes, frames, height, width, d, steps, scale0, scale1, scale2,
    T: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 3 * T * PH * PW
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile = tl.program_id(0) // TILES_P
    k = tl.program_id(0) % TILES_P * BLOCK_P + tl.arange(0, BLOCK_P)
    in_k = k < P
    patches = (height // PH) * (width // PW)
    dtype = grad.dtype.element_ty
    out_dtype = dvideo.dtype.element_ty
    offset = _pixel_offset(k, height, width, T, PH, PW, LAST)
    if tile < tl.cdiv(rows, BLOCK_M):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < rows
        patch = tl.load(ids_keep + m, mask=in_m, other=0).to(tl.int32)
        row = _row(m, m // kept, patch // patches, each, tubes, prefixes, EVEN)
        w_offset = _weight_offset(k, T, PH, PW, LAST)
        acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for c0 in range(0, d, BLOCK_K):
            column = c0 + tl.arange(0, BLOCK_K)
            in_d = column < d
            g = tl.load(grad + row[:, None] * d + column[None, :], mask=in_m[:, None] & in_d[None, :], other=0)
            w = tl.load(weight + column[:, None] * P + w_offset[None, :], mask=in_d[:, None] & in_k[None, :], other=0)
            acc = tl.dot(g, w.to(dtype), acc, input_precision="ieee")
        acc *= _of_channel(k, scale0, scale1, scale2, T, PH, PW, LAST)[None, :]
        start = dvideo + patch_start(m // kept, patch, frames, height, width, T, PH, PW, LAST)
        tl.store(start[:, None] + offset[None, :], acc.to(out_dtype), mask=in_m[:, None] & in_k[None, :])
    else:
        place = (tile - tl.cdiv(rows, BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < clips * tubes * patches
        clip, patch = place // (tubes * patches), place % (tubes * patches)
        at = _before(ids_keep, clip, patch, kept, steps, inside)
        found = inside & (at < kept)
        same = found & (tl.load(ids_keep + clip * kept + at, mask=found, other=0).to(tl.int32) == patch)
        start = dvideo + patch_start(clip, patch, frames, height, width, T, PH, PW, LAST)
        zero = tl.zeros((BLOCK_M, BLOCK_P), out_dtype)
        tl.store(start[:, None] + offset[None, :], zero, mask=(inside & (same == 0))[:, None] & in_k[None, :])


def _blocks(table: dict[int, dict[str, int]], fp32: dict[int, dict[str, int]], dtype: torch.dtype) -> dict[str, int]:
    chosen = fp32 if dtype == torch.float32 else table
    return chosen[max(known for known in chosen if known <= architecture())]


def geometry(video: Tensor, patch: Sequence[int]) -> dict[str, Any]:
    """What the kernels want to know of a video; the patch is constant, so that its divisions are multiplications."""
    last = video.shape[2] != 3
    height, width = (video.shape[2], video.shape[3]) if last else (video.shape[3], video.shape[4])
    t, ph, pw = patch
    return dict(frames=video.shape[1], height=height, width=width, T=t, PH=ph, PW=pw, LAST=last)


def _normalisation(video: Tensor, mean: Sequence[float], std: Sequence[float]) -> dict[str, float]:
    """(x / 255 - mean) / std = x * scale + shift; a float video is not divided by 255."""
    unit = 255 if video.dtype == torch.uint8 else 1
    scale = {f"scale{c}": 1 / (unit * s) for c, s in enumerate(std)}
    return {**scale, **{f"shift{c}": -m / s for c, (m, s) in enumerate(zip(mean, std, strict=True))}}


def _refuse_fp64(*dtypes: torch.dtype) -> None:
    if torch.float64 in dtypes:
        raise ValueError("patch_embed on a GPU sums in fp32 and takes no float64 weights; use float32, or the CPU.")


def _sequences(
    ids_keep: Tensor, where: dict[str, Any], prefixes: int, per_frame: bool, uniform: bool
) -> dict[str, Any]:
    """How kept patches are cut into sequences. EVEN: the host knows each one's length, and nothing is searched."""
    b, kept = ids_keep.shape
    tubes = where["frames"] // where["T"]
    even = uniform or not per_frame
    each = kept // tubes if per_frame and uniform else kept
    sequences = b * tubes if per_frame else b
    return dict(kept=kept, each=each, tubes=tubes, sequences=sequences, prefixes=prefixes, EVEN=even)


def patch_embed(
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_fp64(weight.dtype, dtype)
    video, ids_keep, weight = video.contiguous(), ids_keep.contiguous(), weight.contiguous()
    bias, position, prefix = (x if x is None else x.contiguous() for x in (bias, position, prefix))
    where = geometry(video, patch)
    cut = _sequences(ids_keep, where, 0 if prefix is None else prefix.shape[0], per_frame, uniform)
    rows, d, sequences = ids_keep.numel(), weight.shape[0], cut["sequences"]
    total = rows + sequences * cut["prefixes"]
    values = weight.new_empty((total, d), dtype=dtype)
    cu_seqlens = weight.new_empty((sequences + 1,), dtype=torch.int32)
    ids = weight.new_empty((total,), dtype=torch.int32)
    size = weight.new_empty((total,), dtype=torch.float32)
    patches = (where["height"] // where["PH"]) * (where["width"] // where["PW"])
    blocks = _blocks(_EMBED_LAST if where["LAST"] else _EMBED, _EMBED_FP32, dtype)
    if video.is_floating_point():
        # fp32 pixels and weights in three do not fit sm_86; left alone, the assembler takes 128 registers and spills
        blocks = {**blocks, "num_stages": 2, "maxnreg": 224}
    blocks = configured(_embed, blocks, dtype, d)
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) + triton.cdiv(sequences + 1, blocks["BLOCK_M"])
    launch(
        _embed, (tiles * triton.cdiv(d, blocks["BLOCK_D"]),),
        video, ids_keep, weight, bias, position, prefix, values, cu_seqlens, ids, size,
        rows=rows, d=d, steps=cut["kept"].bit_length(),
        SHARED_POSITION=position is not None and position.shape[0] == patches,
        APART=where["LAST"] and where["PW"] % 16 == 0 and 90 <= architecture() < 100,
        **cut, **where, **_normalisation(video, mean, std), **blocks,
    )  # fmt: skip
    return values, cu_seqlens, ids, size


def patch_embed_backward(
    grad: Tensor,
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    positions: int,
    prefixes: int,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    video_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_fp64(weight.dtype, grad.dtype)
    grad, video = grad.contiguous(), video.contiguous()
    ids_keep, weight = ids_keep.contiguous(), weight.contiguous()
    where = geometry(video, patch)
    cut = _sequences(ids_keep, where, prefixes, per_frame, uniform)
    sequences = cut.pop("sequences")
    numbers = _normalisation(video, mean, std)
    (clips, kept), (d, p) = ids_keep.shape, weight.shape
    rows, steps = clips * kept, kept.bit_length()
    patches = (where["height"] // where["PH"]) * (where["width"] // where["PW"])
    dweight, dbias, dposition, dprefix = (
        weight.new_empty(shape, dtype=torch.float32) for shape in ((d, p), (d,), (positions, d), (prefixes, d))
    )
    dvideo = video.new_empty(video.shape if video_grad else (0,))

    blocks = configured(_dweight, _blocks(_DWEIGHT, _DWEIGHT_FP32, grad.dtype), grad.dtype, d)
    tiles = triton.cdiv(d, blocks["BLOCK_D"]) * triton.cdiv(p, blocks["BLOCK_P"])
    splits = max(1, min(_PROGRAMS // tiles, rows // _SPLIT_ROWS))
    # whole blocks, so that no split ends inside one; no fewer splits than there are parts to sum
    split_rows = max(1, triton.cdiv(triton.cdiv(rows, splits), blocks["BLOCK_M"])) * blocks["BLOCK_M"]
    splits = max(1, triton.cdiv(rows, split_rows))
    one = splits == 1
    partial = dweight if one else weight.new_empty((splits, d, p), dtype=torch.float32)
    partial_bias = dbias if one else weight.new_empty((splits, d), dtype=torch.float32)
    launch(
        _dweight, (tiles * splits,), grad, video, ids_keep, partial, partial_bias,
        split_rows=split_rows, rows=rows, d=d, **cut, **where, **numbers, **blocks,
    )  # fmt: skip

    if not one or positions or prefixes:
        blocks = dict(maxnreg=128) if grad.dtype == torch.float32 else {}  # left alone 40, and spills
        blocks = configured(_tables, _TABLES | blocks, grad.dtype, d)
        sums = 0 if one else triton.cdiv(d * p, blocks["BLOCK"])
        bias_sums = 0 if one else triton.cdiv(d, blocks["BLOCK"])
        tables = (positions + prefixes) * triton.cdiv(d, blocks["BLOCK_D"])
        launch(
            _tables, (sums + bias_sums + tables,),
            grad, ids_keep, partial, partial_bias, dweight, dbias, dposition, dprefix,
            splits=splits, blocks=sums, bias_blocks=bias_sums, clips=clips, positions=positions,
            repeats=cut["tubes"] if positions == patches else 1, sequences=sequences, patches=patches, d=d, p=p,
            steps=steps, **cut, **blocks,
        )  # fmt: skip

    if video_grad:
        blocks = configured(_dvideo, _blocks(_DVIDEO, _DVIDEO_FP32, grad.dtype), grad.dtype, d)
        tiles = triton.cdiv(rows, blocks["BLOCK_M"]) + triton.cdiv(clips * cut["tubes"] * patches, blocks["BLOCK_M"])
        launch(
            _dvideo, (tiles * triton.cdiv(p, blocks["BLOCK_P"]),), grad, ids_keep, weight, dvideo,
            clips=clips, rows=rows, d=d, steps=steps, **{k: v for k, v in numbers.items() if k.startswith("scale")},
            **cut, **where, **blocks,
        )  # fmt: skip
    return dweight, dbias, dposition, dprefix, dvideo


torch.library.register_kernel("smaug::patch_embed", "cuda", patch_embed)
torch.library.register_kernel("smaug::patch_embed_backward", "cuda", patch_embed_backward)
