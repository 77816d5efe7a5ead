"""Random masks on the GPU: one program a clip draws, ranks and writes; nothing is sorted.

Reads 8 bytes a clip (its sample number), writes 4 bytes an id: 4 * F * N bytes a clip, ids_keep and ids_removed
together. Grid (B,). The random words of all units of a clip stay in registers; bisection over their 32 bits finds the
K-th lowest, and a running count over the units, which are in order already, places every id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import configured, launch

MOST_UNITS = 8192  # held by one program; at 16,384 even 32 warps have no registers left for the words and spill
UNITS_A_WARP = 256  # 8 a thread: about 100 registers, so that several clips share a multiprocessor
MOST_WARPS = 32


@triton.jit(do_not_specialize=["samples_stride", "units", "keep", "repeats", "patches", "columns", "side", "stream"])
def _mask(
    samples,
    seed,
    draw,
    ids_keep,
    ids_removed,
    samples_stride,
    units,
    keep,  # of the units
    repeats,  # tube: every frame keeps the same units
    patches,
    columns,
    side,
    stream,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    sample = tl.load(samples + clip * samples_stride)
    key = tl.load(seed)
    word1 = ((tl.load(draw) << 8) | stream).to(tl.int32)
    low, high = sample.to(tl.int32), (sample >> 32).to(tl.int32)
    unit = tl.arange(0, BLOCK)
    real = unit < units
    counter = unit
    if KIND == "frame":
        counter = unit // patches
    elif KIND == "block":
        # id 2^32 - 1 belongs to no patch: its words place the lattice of squares
        offset0, offset1, _, _ = tl.philox(key, tl.full((), -1, tl.int32), word1, low, high)
        modulus = side.to(tl.uint32)
        row, column = unit % patches // columns, unit % columns
        square_row = (row + (offset0 % modulus).to(tl.int32)) // side
        counter = square_row * (columns // side + 2) + (column + (offset1 % modulus).to(tl.int32)) // side
    word, _, _, _ = tl.philox(key, counter, word1, low, high)

    # The highest threshold that at most `keep` words are below, found bit by bit, or sooner any that exactly `keep`
    # are below: words are uniform, so that takes about log2(units) + 2 steps.
    threshold = tl.full((), 0, tl.uint32)
    below = tl.full((), 0, tl.int32)  # how many words are below the threshold
    bit = tl.full((), 1 << 31, tl.uint32)
    while (bit > 0) & (below != keep):
        trial = threshold | bit
        bit = bit >> 1
        count = tl.sum((real & (word < trial)).to(tl.int32), 0)
        below = tl.where(count <= keep, count, below)
        threshold = tl.where(count <= keep, trial, threshold)
    tie = real & (word == threshold)
    stays = (real & (word < threshold)) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= keep - below))
    rank = tl.cumsum(stays.to(tl.int32), 0)

    goes = units - keep
    ids_keep += clip * repeats * keep
    ids_removed += clip * repeats * goes
    for frame in range(repeats):
        tl.store(ids_keep + frame * keep + rank - 1, frame * units + unit, mask=stays)
        tl.store(ids_removed + frame * goes + unit - rank, frame * units + unit, mask=real & ~stays)


def random_mask(
    samples: Tensor,
    seed: Tensor,
    draw: Tensor,
    frames: int,
    rows: int,
    columns: int,
    keep: int,
    kind: str,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """`smaug::random_mask`; bit-equal to the reference. At most 8,192 units: patches of a clip, or tube: of a frame."""
    clips, patches = samples.shape[0], rows * columns
    ids_keep = torch.empty((clips, keep), dtype=torch.int32, device=samples.device)
    ids_removed = torch.empty((clips, frames * patches - keep), dtype=torch.int32, device=samples.device)
    repeats = frames if kind == "tube" else 1
    units = frames * patches // repeats
    if units > MOST_UNITS:
        raise ValueError(
            f"random_mask: the kernel ranks at most {MOST_UNITS} units a clip, not {units} "
            f'({frames} frames of {patches} patches, kind={kind!r}); use impl="reference".'
        )
    block = max(triton.next_power_of_2(units), 32)
    warps = dict(num_warps=min(max(block // UNITS_A_WARP, 1), MOST_WARPS))
    launch(
        _mask,
        (clips,),
        samples,
        seed,
        draw,
        ids_keep,
        ids_removed,
        samples.stride(0),
        units,
        keep // repeats,
        repeats,
        patches,
        columns,
        max(1, min(rows, columns) // 4),
        stream,
        KIND=kind,
        BLOCK=block,
        **configured(_mask, warps, ids_keep.dtype, units),
    )
    return ids_keep, ids_removed


torch.library.register_kernel("smaug::random_mask", "cuda", random_mask)
