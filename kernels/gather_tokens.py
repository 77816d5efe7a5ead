"""Rows out of a grid by their ids, back into it, and the gradient of what fills the holes.

Gather reads and writes T * D elements, scatter reads T * D and writes S * L * D, the fill's gradient reads the holes.
Rows move in pieces of 16 bytes a thread; ids and offsets are read once a tile of rows.

gather     grid (T / rows of a tile,): a tile finds the sequence of each of its rows by binary search in cu_seqlens.
scatter    grid (S * tiles of a grid,): a tile of slots compares itself with all ids of its sequence, so ids of -1 may
           stand anywhere and no slot is written twice; what nobody claims is a hole and gets the fill.
fill_grad  grid (splits, columns): each split sums a fixed run of tiles; a second launch adds the splits in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import configured, launch

ROWS = 16  # of a tile that moves; 16 rows of 128 to 256 columns are two to four 16-byte pieces a thread
COLUMNS = 256  # at most; wider rows take several turns
IDS = 64  # ids compared with a tile of slots at a time
HOLES = 32  # slots of a tile of fill_grad
SPLITS = 256  # partial sums of fill_grad, a number of the shape alone so that the sum is the same on every device
WARPS = 4


@triton.jit
def sequence_of(row, cu_seqlens, cu_stride, sequences, steps):
    """The sequence that each row belongs to, by binary search: how many of cu_seqlens[1:] are not above the row."""
    low = row * 0
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        end = tl.load(cu_seqlens + (middle + 1).to(tl.int64) * cu_stride, mask=searching, other=0)
        beyond = searching & (end <= row)
        low = tl.where(beyond, middle + 1, low)
        high = tl.where(searching & ~beyond, middle, high)
    return low


@triton.jit(do_not_specialize=["rows", "sequences", "steps", "length", "sequence_rows", "each", "cu_stride"])
def _gather(
    x,
    ids,
    cu_seqlens,
    out,
    rows,
    sequences,
    steps,
    length,
    sequence_rows,  # from a sequence's first row in x to the next one's
    each,  # ids of a sequence, where all have as many
    cu_stride,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    if cu_seqlens is None:
        sequence = row // each
        used = real
    else:
        sequence = sequence_of(row, cu_seqlens, cu_stride, sequences, steps)
        used = real & (sequence < sequences)
    patch = tl.load(ids + row, mask=used, other=-1).to(tl.int32)
    used = used & (patch >= 0) & (patch < length)
    source = sequence.to(tl.int64) * sequence_rows + patch
    target = row.to(tl.int64)
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        moved = tl.load(x + source[:, None] * X_STRIDE + column[None, :], mask=used[:, None] & inside, other=0)
        tl.store(out + target[:, None] * D + column[None, :], moved, mask=real[:, None] & inside)


@triton.jit
def source_of(slot, ids, begin, end, IDS: tl.constexpr):
    """The row among begin to end - 1 whose id is the slot, -1 for a hole."""
    source = slot * 0 - 1
    for first in range(begin, end, IDS):
        row = first + tl.arange(0, IDS)
        patch = tl.load(ids + row, mask=row < end, other=-1).to(tl.int32)
        found = tl.where(patch[None, :] == slot[:, None], row[None, :], -1)
        source = tl.maximum(source, tl.max(found, 1))
    return source


@triton.jit
def _ends(sequence, cu_seqlens, cu_stride, each):
    if cu_seqlens is None:
        begin = sequence * each
        end = begin + each
    else:
        at = cu_seqlens + sequence.to(tl.int64) * cu_stride
        begin = tl.load(at).to(tl.int32)
        end = tl.load(at + cu_stride).to(tl.int32)
    return begin, end


@triton.jit(do_not_specialize=["length", "tiles", "each", "cu_stride"])
def _scatter(
    x,
    ids,
    fill,
    cu_seqlens,
    out,
    length,
    tiles,  # of a sequence
    each,
    cu_stride,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    sequence = tl.program_id(0) // tiles
    slot = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    begin, end = _ends(sequence, cu_seqlens, cu_stride, each)
    source = source_of(slot, ids, begin, end, IDS).to(tl.int64)
    taken = (source >= 0)[:, None]
    target = sequence.to(tl.int64) * length + slot
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        moved = tl.load(x + source[:, None] * X_STRIDE + column[None, :], mask=taken & inside, other=0)
        if fill is not None:
            hole = tl.load(fill + column, mask=column < D, other=0).to(moved.dtype)
            moved = tl.where(taken, moved, hole[None, :])
        tl.store(out + target[:, None] * D + column[None, :], moved, mask=(slot < length)[:, None] & inside)


@triton.jit(do_not_specialize=["length", "tiles", "all_tiles", "share", "sequence_rows", "each", "cu_stride"])
def _fill_grad_of_a_split(
    grad,
    ids,
    cu_seqlens,
    partial,
    length,
    tiles,
    all_tiles,
    share,  # tiles of a split
    sequence_rows,
    each,
    cu_stride,
    D: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    HOLES: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((HOLES, COLUMNS), partial.dtype.element_ty)
    start = tl.program_id(0) * share
    for tile in range(start, tl.minimum(start + share, all_tiles)):
        sequence = tile // tiles
        slot = tile % tiles * HOLES + tl.arange(0, HOLES)
        begin, end = _ends(sequence, cu_seqlens, cu_stride, each)
        hole = (source_of(slot, ids, begin, end, IDS) < 0) & (slot < length)
        row = sequence.to(tl.int64) * sequence_rows + slot
        mask = hole[:, None] & (column < D)[None, :]
        total += tl.load(grad + row[:, None] * GRAD_STRIDE + column[None, :], mask=mask, other=0).to(total.dtype)
    at = partial + tl.program_id(0).to(tl.int64) * D + column
    tl.store(at, tl.sum(total, 0), mask=column < D)


@triton.jit(do_not_specialize=["splits"])
def _fill_grad_of_all(partial, out, splits, D: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & (column < D)[None, :]
    part = tl.load(partial + split[:, None] * D + column[None, :], mask=mask, other=0)
    tl.store(out + column, tl.sum(part, 0), mask=column < D)


def even_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x (S, N, D), or a copy of it, whose rows lie a fixed step apart -> x, rows from a sequence to the next, step.

    Views keep their memory: x[:, 1:] (without [CLS]) and a third of a fused projection are read in place.
    """
    step = x.stride(1) if x.shape[1] > 1 else x.shape[2]
    if x.stride(2) != 1 or step < x.shape[2] or (x.shape[0] > 1 and x.stride(0) % step):
        x = x.contiguous()
        step = x.shape[2]
    return x, x.stride(0) // step if x.shape[0] > 1 else x.shape[1], step


def columns_of(d: int, most: int = COLUMNS) -> int:
    return min(triton.next_power_of_2(d), most)


def gather_tokens(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`smaug::gather_tokens`, one launch."""
    sequences, length, d = x.shape
    out = torch.empty((*ids.shape, d), dtype=x.dtype, device=x.device)
    rows = ids.numel()
    if out.numel() == 0:
        return out
    if x.numel() == 0:
        return out.zero_()
    x, sequence_rows, step = even_rows(x)
    blocks = configured(_gather, dict(ROWS=ROWS, COLUMNS=columns_of(d), num_warps=WARPS), x.dtype, d)
    launch(
        _gather,
        (triton.cdiv(rows, blocks["ROWS"]),),
        x,
        ids.contiguous(),
        cu_seqlens,
        out,
        rows,
        sequences,
        sequences.bit_length(),
        length,
        sequence_rows,
        ids.shape[-1],
        0 if cu_seqlens is None else cu_seqlens.stride(0),
        D=d,
        X_STRIDE=step,
        **blocks,
    )
    return out


def scatter_tokens(x: Tensor, ids: Tensor, length: int, fill: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`smaug::scatter_tokens`, one launch. Compares S * length slots with the ids of their sequence."""
    d = x.shape[-1]
    sequences = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty((sequences, length, d), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat, _, step = even_rows(x.reshape(1, ids.numel(), d))
    blocks = configured(_scatter, dict(ROWS=ROWS, COLUMNS=columns_of(d), IDS=IDS, num_warps=WARPS), x.dtype, d)
    tiles = triton.cdiv(length, blocks["ROWS"])
    launch(
        _scatter,
        (sequences * tiles,),
        flat,
        ids.contiguous(),
        None if fill is None else fill.contiguous(),
        cu_seqlens,
        out,
        length,
        tiles,
        ids.shape[-1],
        0 if cu_seqlens is None else cu_seqlens.stride(0),
        D=d,
        X_STRIDE=step,
        **blocks,
    )
    return out


def scatter_fill_grad(grad: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`smaug::scatter_fill_grad`, two launches: sums of a fixed split, then of the splits, in fp32."""
    sequences, length, d = grad.shape
    acc = torch.promote_types(grad.dtype, torch.float32)
    out = torch.empty((d,), dtype=acc, device=grad.device)
    if grad.numel() == 0:
        return out.zero_()
    grad, sequence_rows, step = even_rows(grad)
    chosen = dict(HOLES=HOLES, COLUMNS=columns_of(d, 128), IDS=IDS, num_warps=WARPS)
    blocks = configured(_fill_grad_of_a_split, chosen, grad.dtype, d)
    tiles = triton.cdiv(length, blocks["HOLES"])
    share = triton.cdiv(sequences * tiles, SPLITS)
    splits = triton.cdiv(sequences * tiles, share)
    partial = torch.empty((splits, d), dtype=acc, device=grad.device)
    launch(
        _fill_grad_of_a_split,
        (splits, triton.cdiv(d, blocks["COLUMNS"])),
        grad,
        ids.contiguous(),
        cu_seqlens,
        partial,
        length,
        tiles,
        sequences * tiles,
        share,
        sequence_rows,
        ids.shape[-1],
        0 if cu_seqlens is None else cu_seqlens.stride(0),
        D=d,
        GRAD_STRIDE=step,
        **blocks,
    )
    blocks = configured(_fill_grad_of_all, dict(COLUMNS=columns_of(d, 16), num_warps=WARPS), grad.dtype, d)
    launch(
        _fill_grad_of_all,
        (triton.cdiv(d, blocks["COLUMNS"]),),
        partial,
        out,
        splits,
        D=d,
        SPLITS=SPLITS,
        **blocks,
    )
    return out


torch.library.register_kernel("smaug::gather_tokens", "cuda", gather_tokens)
torch.library.register_kernel("smaug::scatter_tokens", "cuda", scatter_tokens)
torch.library.register_kernel("smaug::scatter_fill_grad", "cuda", scatter_fill_grad)
