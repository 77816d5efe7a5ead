"""The highest scores of every group stay and the rest melts into one row: ranked, moved and fused in one launch.

Reads T * D values (rows that go only where they are fused), writes T' * D; per row 12 bytes of score, id and size are
read and 4 to 16 of ids, target and weight written. Scores are read from the cache once a bit of the bisection.

select    grid (groups, column blocks). Every program ranks its group for itself, which costs less than a second
          launch; then it moves and sums its columns. Column block 0 also writes what is one number a row. A group's
          place in the result follows from the lengths of the groups before it, which each program adds up.
mass      grid (groups,): finds how far the mass reaches in each group, before `select`. The key of a row that stays
          is kept, so that `select` can cut all groups at one key where the result would overflow. That cut is one
          search over all rows in every program; there are then at most CUTTERS programs to a column block.
backward  grid (groups, column blocks); column block 0 also sums what the scores of its group receive.

Ranking sorts nothing: bisection over the 32 bits of the key finds the k-th highest, and one pass where its ties end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import configured, launch

ROWS = 16  # rows of a tile that moves
COLUMN_BYTES = 512  # of a row in a column block, at most; with 16 rows the sums take 32 registers a thread, or 16
SCORES = 512  # scores looked at together
GROUPS = 512  # groups whose lengths are added together
CUTTERS = 128
WARPS = 4
REGISTERS = 168  # a thread, for `_select`: without it the assembler spills a few to run one more program

LOWEST = tl.constexpr(-(1 << 31))  # below the key of -inf; that of NaN, and of rows that cannot win


@triton.jit
def key_of(score):
    """int32 whose order is that of the scores, -0 as 0, NaN below -inf. Keys pass as they are."""
    if score.dtype == tl.int32:
        key = score
    else:
        score = score.to(tl.float32)
        bits = score.to(tl.int32, bitcast=True)
        key = tl.where(score == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        key = tl.where(score == score, key, LOWEST)
    return key


@triton.jit
def weight_of(score, acc: tl.constexpr):
    """What a score weighs in a sum: nothing where it is not finite."""
    weight = score.to(acc)
    return tl.where(tl.abs(weight) < float("inf"), weight, 0.0)


@triton.jit
def cut_after(scores, stride, first, last, keep, SCORES: tl.constexpr):
    """key, row: of the rows first to last - 1 the ``keep`` best are those above key, and at key those before row.

    The key is the highest that ``keep`` rows reach, found bit by bit, or sooner any key that exactly ``keep`` reach.
    """
    key = tl.full((), LOWEST, tl.int32)
    reach = last - first
    above = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 31, tl.uint32)
    while (bit > 0) & (reach != keep):
        trial = key ^ bit.to(tl.int32, bitcast=True)
        counts = tl.zeros((SCORES,), tl.int32)
        for start in range(first, last, SCORES):
            row = start + tl.arange(0, SCORES)
            score = tl.load(scores + row.to(tl.int64) * stride, mask=row < last, other=0)
            counts += ((row < last) & (key_of(score) >= trial)).to(tl.int32)
        count = tl.sum(counts, 0)
        above = tl.where(count < keep, count, above)
        reach = tl.where(count < keep, reach, count)
        key = tl.where(count < keep, key, trial)
        bit = bit >> 1
    row_of_cut = last
    if reach != keep:
        row_of_cut = end_of_ties(scores, stride, first, last, key, keep - above, SCORES)
    return key, row_of_cut


@triton.jit
def end_of_ties(scores, stride, first, last, key, allowed, SCORES: tl.constexpr):
    """The first row at key that is one too many; last where none is."""
    row_of_cut = last
    seen = tl.full((), 0, tl.int32)
    for start in range(first, last, SCORES):
        row = start + tl.arange(0, SCORES)
        score = tl.load(scores + row.to(tl.int64) * stride, mask=row < last, other=0)
        tie = (row < last) & (key_of(score) == key)
        rank = seen + tl.cumsum(tie.to(tl.int32), 0)
        row_of_cut = tl.minimum(row_of_cut, tl.min(tl.where(tie & (rank > allowed), row, last), 0))
        seen += tl.sum(tie.to(tl.int32), 0)
    return row_of_cut


@triton.jit
def wins(key, row, cut_key, cut_row):
    return (key > cut_key) | ((key == cut_key) & (row < cut_row))


@triton.jit
def count_of(n, keep, ratio):
    """How many of n rows stay. 64 bits: n * ratio passes 2^31 from 32,768 rows on."""
    return tl.where(ratio >= 0, ((n.to(tl.int64) * ratio + 65535) >> 16).to(tl.int32), tl.minimum(n, keep))


@triton.jit
def bounds_of(group, real, cu_seqlens, cu_stride):
    at = cu_seqlens + group.to(tl.int64) * cu_stride
    return tl.load(at, mask=real, other=0).to(tl.int32), tl.load(at + cu_stride, mask=real, other=0).to(tl.int32)


@triton.jit
def winners_of(group, groups, keys, cu_seqlens, cu_stride, prefix, cut_key, cut_row):
    """How many rows of each of a few groups are above the cut."""
    start, end = bounds_of(group, group < groups, cu_seqlens, cu_stride)
    first = tl.minimum(start + prefix, end)
    count = group * 0
    for at in range(0, tl.max(end - first, 0), 64):
        row = first[:, None] + at + tl.arange(0, 64)[None, :]
        key = tl.load(keys + row, mask=row < end[:, None], other=LOWEST)
        count += tl.sum(((row < end[:, None]) & wins(key, row, cut_key, cut_row)).to(tl.int32), 1)
    return count


@triton.jit
def held_by(scores, stride, first, last, key, SCORES: tl.constexpr):
    """The weight of the rows that are at key or above."""
    sums = tl.zeros((SCORES,), tl.float64)
    for at in range(first, last, SCORES):
        row = at + tl.arange(0, SCORES)
        score = tl.load(scores + row.to(tl.int64) * stride, mask=row < last, other=0)
        held = (row < last) & (key_of(score) >= key)
        sums += tl.where(held, weight_of(score.to(tl.float32), tl.float32), 0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["cu_stride", "scores_stride", "prefix", "mass"])
def _mass(
    scores,
    cu_seqlens,
    counts,
    keys,
    cu_stride,
    scores_stride,
    prefix,
    mass,  # in 2^-62: a float argument would be rounded to fp32
    SCORES: tl.constexpr,
):
    group = tl.program_id(0)
    start, end = bounds_of(group, True, cu_seqlens, cu_stride)
    first = tl.minimum(start + prefix, end)
    # A row stays where the rows above it hold less than the goal. The cut is at the highest key at or above which
    # the goal is held. fp64: 4096 scores leave fp32 no digits to tell the last one by.
    key = tl.full((), LOWEST, tl.int32)
    above = tl.full((), 0.0, tl.float64)
    goal = held_by(scores, scores_stride, first, end, key, SCORES) * (mass.to(tl.float64) * 2.0**-62)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        trial = key ^ bit.to(tl.int32, bitcast=True)
        held = held_by(scores, scores_stride, first, end, trial, SCORES)
        above = tl.where(held < goal, held, above)
        key = tl.where(held < goal, key, trial)
        bit = bit >> 1
    # all that is left of the goal is held by rows at the key; a goal of 0 is held by none
    weight = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True).to(tl.float64)
    weight = tl.where(goal > 0, weight, 1.0)
    allowed = tl.ceil((goal - above) / weight).to(tl.int32)
    cut = end_of_ties(scores, scores_stride, first, end, key, allowed, SCORES)
    count = tl.full((), 0, tl.int32)
    for at in range(start, end, SCORES):
        row = at + tl.arange(0, SCORES)
        score = tl.load(scores + row.to(tl.int64) * scores_stride, mask=row < end, other=0)
        own = key_of(score)
        stays = (row >= first) & (row < end) & wins(own, row, key, cut)
        tl.store(keys + row, tl.where(stays, own, LOWEST), mask=row < end)
        count += tl.sum(stays.to(tl.int32), 0)
    tl.store(counts + group, count)


@triton.jit(
    do_not_specialize=[
        "groups", "total", "rows_out", "kept_rows", "dropped_rows", "length", "prefix", "keep", "ratio", "share",
        "cu_stride", "scores_stride", "ranked_stride",
    ]
)  # fmt: skip
def _select(
    values,
    scores,
    ranked,  # the scores, or by mass the keys of the rows that stay
    cu_seqlens,
    ids,
    size,
    counts,  # by mass: rows of each group that stay, without its prefix
    out,
    cu_out,
    ids_out,
    size_out,
    ids_kept,
    ids_dropped,
    overflow,
    target,
    weight,
    factor,
    groups,
    total,
    rows_out,
    kept_rows,
    dropped_rows,
    length,  # of each group, where all are alike
    prefix,
    keep,
    ratio,
    share,  # groups of a program
    cu_stride,
    scores_stride,
    ranked_stride,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    FUSE: tl.constexpr,
    UNIFORM: tl.constexpr,
    CAPACITY: tl.constexpr,  # by mass, and the result may be too small
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    acc: tl.constexpr = weight.dtype.element_ty
    FUSED: tl.constexpr = 1 if FUSE != "" else 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_group = program * share
    last_group = tl.minimum(first_group + share, groups)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < D)[None, :]
    writes = tl.program_id(1) == 0
    cut_key = tl.full((), LOWEST, tl.int32)
    cut_row = tl.full((), 0, tl.int32)
    lost_rows = tl.full((), 0, tl.int32)  # to a capacity that is too small

    # Where the rows of the first group go, and where all end.
    if UNIFORM:
        front = tl.minimum(prefix, length)
        n = length - front
        kept = front + count_of(n, keep, ratio)
        each = kept + tl.where(kept < length, FUSED, 0)
        kept_at, out_at = first_group * kept, first_group * each
        kept_end, out_end = groups * kept, groups * each
        end_of_all = total
    else:
        end_of_all = tl.load(cu_seqlens + groups.to(tl.int64) * cu_stride).to(tl.int32)
        kept_before = tl.zeros((GROUPS,), tl.int32)
        fused_before = tl.zeros((GROUPS,), tl.int32)
        kept_all = tl.zeros((GROUPS,), tl.int32)
        fused_all = tl.zeros((GROUPS,), tl.int32)
        front_all = tl.zeros((GROUPS,), tl.int32)
        for at in range(0, groups, GROUPS):
            group = at + tl.arange(0, GROUPS)
            start, end = bounds_of(group, group < groups, cu_seqlens, cu_stride)
            front = tl.minimum(prefix, end - start)
            if counts is None:
                k = count_of(end - start - front, keep, ratio)
            else:
                k = tl.load(counts + group, mask=group < groups, other=0)
            fused = tl.where(front + k < end - start, FUSED, 0)
            kept_all += front + k
            fused_all += fused
            front_all += front
            kept_before += tl.where(group < first_group, front + k, 0)
            fused_before += tl.where(group < first_group, fused, 0)
        kept_at, kept_end = tl.sum(kept_before, 0), tl.sum(kept_all, 0)
        out_at, out_end = kept_at + tl.sum(fused_before, 0), kept_end + tl.sum(fused_all, 0)
        if CAPACITY and out_end > rows_out:
            # room for the prefix and a fused row of every group; the rest goes to the best of all
            fronts = tl.sum(front_all, 0)
            room = rows_out - fronts - groups * FUSED
            lost_rows = kept_end - fronts - room
            cut_key, cut_row = cut_after(ranked, ranked_stride, 0, end_of_all, room, SCORES)
            kept_at, kept_end, out_at, out_end = kept_at * 0, kept_end * 0, out_at * 0, out_end * 0
            for at in range(0, groups, 16):
                group = at + tl.arange(0, 16)
                start, end = bounds_of(group, group < groups, cu_seqlens, cu_stride)
                won = winners_of(group, groups, ranked, cu_seqlens, cu_stride, prefix, cut_key, cut_row)
                kept = tl.minimum(prefix, end - start) + won
                rows = kept + tl.where(kept < end - start, FUSED, 0)
                kept_end += tl.sum(kept, 0)
                out_end += tl.sum(rows, 0)
                kept_at += tl.sum(tl.where(group < first_group, kept, 0), 0)
                out_at += tl.sum(tl.where(group < first_group, rows, 0), 0)

    for turn in range(0, last_group - first_group):
        group = first_group + turn
        if UNIFORM:
            start = group * length
            end = start + length
        else:
            start, end = bounds_of(group, True, cu_seqlens, cu_stride)
        first = tl.minimum(start + prefix, end)
        if counts is None:
            k = count_of(end - first, keep, ratio)
            cut_key, cut_row = cut_after(ranked, ranked_stride, first, end, k, SCORES)
        else:
            k = tl.load(counts + group)
            if CAPACITY and lost_rows > 0:
                own = group + tl.arange(0, 16)
                k = tl.sum(winners_of(own, group + 1, ranked, cu_seqlens, cu_stride, prefix, cut_key, cut_row), 0)
        kept = first - start + k
        gone = end - first - k
        fused = tl.where(gone > 0, FUSED, 0)
        lost = tl.where(fused > 0, out_at + kept, rows_out)  # the fused row, or nowhere
        dropped_at = start - kept_at

        # One number a row. Programs of other columns need the sum of weights only, and by that only for a mean.
        before = tl.full((), 0, tl.int32)
        weights = tl.zeros((SCORES,), acc)
        sizes = tl.zeros((SCORES,), size_out.dtype.element_ty)
        for at in range(start, tl.where(writes | (FUSE == "mean"), end, start), SCORES):
            row = at + tl.arange(0, SCORES)
            real = row < end
            key = key_of(tl.load(ranked + row.to(tl.int64) * ranked_stride, mask=real, other=0))
            stays = real & ((row < first) | wins(key, row, cut_key, cut_row))
            goes = real & ~stays
            place = before + tl.cumsum(stays.to(tl.int32), 0) - 1  # of a row that stays
            hole = row - start - place - 1  # of one that goes, among those that go
            before += tl.sum(stays.to(tl.int32), 0)
            score = tl.load(scores + row.to(tl.int64) * scores_stride, mask=goes, other=0)
            weights += weight_of(score, acc)
            if writes:
                own_size = tl.load(size + row, mask=real, other=0)
                sizes += tl.where(goes, own_size, 0)
                tl.store(ids_kept + kept_at + place, row, mask=stays)
                tl.store(ids_out + out_at + place, tl.load(ids + row, mask=stays, other=-1), mask=stays)
                tl.store(size_out + out_at + place, own_size, mask=stays)
                tl.store(ids_dropped + dropped_at + hole, row, mask=goes)
                tl.store(target + row, tl.where(stays, out_at + place, lost), mask=real)
                if FUSE == "":
                    tl.store(weight + dropped_at + hole, tl.zeros((SCORES,), acc), mask=goes)
        sum_ = tl.sum(weights, 0)
        if writes:
            tl.store(cu_out + group, out_at)
            whole = tl.where(sum_ == 0, 1, sum_)
            tl.store(factor + group, tl.where(sum_ == 0, 0, 1 / whole) if FUSE == "mean" else sum_ * 0 + 1)
            if fused > 0:
                tl.store(ids_out + lost, -1)
                tl.store(size_out + lost, tl.sum(sizes, 0))

        # The rows themselves.
        before = tl.full((), 0, tl.int32)
        melted = tl.zeros((ROWS, COLUMNS), acc)
        for at in range(start, end, ROWS):
            row = at + tl.arange(0, ROWS)
            real = row < end
            key = key_of(tl.load(ranked + row.to(tl.int64) * ranked_stride, mask=real, other=0))
            stays = real & ((row < first) | wins(key, row, cut_key, cut_row))
            goes = real & ~stays
            place = before + tl.cumsum(stays.to(tl.int32), 0) - 1
            before += tl.sum(stays.to(tl.int32), 0)
            read = (real if FUSE != "" else stays)[:, None] & inside
            x = tl.load(values + row.to(tl.int64)[:, None] * STRIDE + column[None, :], mask=read, other=0)
            to = (out_at + place).to(tl.int64)
            tl.store(out + to[:, None] * D + column[None, :], x, mask=stays[:, None] & inside)
            if FUSE != "":
                score = tl.load(scores + row.to(tl.int64) * scores_stride, mask=goes, other=0)
                part = weight_of(score, acc)
                if FUSE == "mean":
                    part = tl.where(sum_ == 0, 1 / tl.maximum(gone, 1).to(acc), part / tl.where(sum_ == 0, 1, sum_))
                melted += tl.where(goes[:, None], x.to(acc) * part[:, None], 0)
                tl.store(weight + dropped_at + row - start - place - 1, part, mask=goes & writes)
        if FUSE != "":
            here = out + lost.to(tl.int64) * D + column
            tl.store(here, tl.sum(melted, 0).to(out.dtype.element_ty), mask=(column < D) & (fused > 0))
        kept_at += kept
        out_at += kept + fused

    if writes & (program == 0):
        tl.store(cu_out + groups, out_end)
        tl.store(overflow, lost_rows)
    if not UNIFORM:  # what is behind the last group, by all programs in turn
        for at in range(out_end + program * ROWS, rows_out, programs * ROWS):
            row = at + tl.arange(0, ROWS).to(tl.int64)
            nothing = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
            tl.store(out + row[:, None] * D + column[None, :], nothing, mask=(row < rows_out)[:, None] & inside)
        if writes:
            nothing = tl.zeros((SCORES,), tl.int32)
            for at in range(out_end + program * SCORES, rows_out, programs * SCORES):
                row = at + tl.arange(0, SCORES)
                tl.store(ids_out + row, nothing - 1, mask=row < rows_out)
                tl.store(size_out + row, nothing.to(size_out.dtype.element_ty), mask=row < rows_out)
            for at in range(kept_end + program * SCORES, kept_rows, programs * SCORES):
                row = at + tl.arange(0, SCORES)
                tl.store(ids_kept + row, nothing - 1, mask=row < kept_rows)
            for at in range(end_of_all - kept_end + program * SCORES, dropped_rows, programs * SCORES):
                row = at + tl.arange(0, SCORES)
                tl.store(ids_dropped + row, nothing - 1, mask=row < dropped_rows)
                tl.store(weight + row, nothing.to(acc), mask=row < dropped_rows)
            for at in range(end_of_all + program * SCORES, total, programs * SCORES):
                row = at + tl.arange(0, SCORES)
                tl.store(target + row, nothing + rows_out, mask=row < total)


@triton.jit
def drops_of(row, real, at, ids_dropped, dropped_rows, weight, ROWS: tl.constexpr):
    """Which rows of a tile were dropped, and their weights: found among the next entries of ids_dropped."""
    place = at + tl.arange(0, ROWS)
    entry = tl.load(ids_dropped + place, mask=place < dropped_rows, other=-1)
    match = real[:, None] & (entry[None, :] == row[:, None])
    share = tl.load(weight + place, mask=place < dropped_rows, other=0)
    return tl.sum(match.to(tl.int32), 1) > 0, tl.sum(tl.where(match, share[None, :], 0), 1)


@triton.jit(
    do_not_specialize=[
        "groups", "total", "rows_out", "dropped_rows", "length", "dropped_each", "steps", "cu_stride", "scores_stride",
    ]
)  # fmt: skip
def _backward(
    grad,
    values,
    scores,
    cu_seqlens,
    ids_dropped,
    target,
    weight,
    factor,
    dvalues,
    dscores,
    groups,
    total,
    rows_out,
    dropped_rows,
    length,
    dropped_each,
    steps,
    cu_stride,
    scores_stride,
    D: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    FUSE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORES: tl.constexpr,
):
    acc: tl.constexpr = weight.dtype.element_ty
    group, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < D)[None, :]
    if UNIFORM:
        end_of_all = total
        start, end = group * length, group * length + length
        dropped_at = group * dropped_each
    else:
        end_of_all = tl.load(cu_seqlens + groups.to(tl.int64) * cu_stride).to(tl.int32)
        start, end = bounds_of(group, group < groups, cu_seqlens, cu_stride)
        # the first of its rows in ids_dropped, which ascends and ends in -1
        dropped_at = group * 0
        high = dropped_at + dropped_rows
        for _ in range(steps):
            middle = (dropped_at + high) // 2
            searching = dropped_at < high
            entry = tl.load(ids_dropped + middle, mask=searching, other=-1)
            below = searching & (entry >= 0) & (entry < start)
            high = tl.where(searching & (below == 0), middle, high)
            dropped_at = tl.where(below, middle + 1, dropped_at)

    next_drop = dropped_at
    for at in range(start, end, ROWS):
        row = at + tl.arange(0, ROWS)
        real = row < end
        to = tl.load(target + row, mask=real, other=0).to(tl.int64)
        read = (real & (to < rows_out))[:, None] & inside
        g = tl.load(grad + to[:, None] * GRAD_STRIDE + column[None, :], mask=read, other=0)
        if FUSE != "":
            dropped, share = drops_of(row, real, next_drop, ids_dropped, dropped_rows, weight, ROWS)
            next_drop += tl.sum(dropped.to(tl.int32), 0)
            g = tl.where(dropped[:, None], (g.to(acc) * share[:, None]).to(g.dtype), g)
        here = dvalues + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(here, g, mask=real[:, None] & inside)

    if scores is not None and tl.program_id(1) == 0:
        # A dropped row's score moves the fused row along (x - fused row) * factor, "sum": along x.
        next_drop = dropped_at
        mean = tl.full((), 0.0, acc)
        for at in range(start, end, ROWS):
            row = at + tl.arange(0, ROWS)
            real = row < end
            dot = tl.zeros((ROWS,), acc)
            if FUSE != "":
                dropped, share = drops_of(row, real, next_drop, ids_dropped, dropped_rows, weight, ROWS)
                next_drop += tl.sum(dropped.to(tl.int32), 0)
                to = tl.load(target + row, mask=dropped, other=0).to(tl.int64)
                for first in tl.static_range(0, D, COLUMNS):
                    each = first + tl.arange(0, COLUMNS)
                    mask = dropped[:, None] & (each < D)[None, :]
                    g = tl.load(grad + to[:, None] * GRAD_STRIDE + each[None, :], mask=mask, other=0)
                    here = values + row.to(tl.int64)[:, None] * STRIDE + each[None, :]
                    dot += tl.sum(g.to(acc) * tl.load(here, mask=mask, other=0).to(acc), 1)
                mean += tl.sum(dot * share, 0)
                if FUSE == "sum":
                    score = tl.load(scores + row.to(tl.int64) * scores_stride, mask=dropped, other=0).to(acc)
                    dot = tl.where(tl.abs(score) < float("inf"), dot, 0.0)
            tl.store(dscores + row, dot, mask=real)
        if FUSE == "mean":
            tl.debug_barrier()  # the products are read again, by other threads
            by = tl.load(factor + group, mask=group < groups, other=0)
            for at in range(dropped_at, next_drop, SCORES):
                place = at + tl.arange(0, SCORES)
                row = tl.load(ids_dropped + place, mask=place < next_drop, other=0)
                dot = tl.load(dscores + row, mask=place < next_drop, other=0)
                score = tl.load(scores + row.to(tl.int64) * scores_stride, mask=place < next_drop, other=0).to(acc)
                dot = tl.where(tl.abs(score) < float("inf"), (dot - mean) * by, 0.0)
                tl.store(dscores + row, dot, mask=place < next_drop)
        for at in range(end_of_all + group * SCORES, total, programs * SCORES):
            row = at + tl.arange(0, SCORES)
            tl.store(dscores + row, tl.zeros((SCORES,), acc), mask=row < total)
    for at in range(end_of_all + group * ROWS, total, programs * ROWS):
        row = at + tl.arange(0, ROWS).to(tl.int64)
        nothing = tl.zeros((ROWS, COLUMNS), dvalues.dtype.element_ty)
        tl.store(dvalues + row[:, None] * D + column[None, :], nothing, mask=(row < total)[:, None] & inside)


def row_step(x: Tensor) -> tuple[Tensor, int]:
    """x (T, D), or a copy of it, whose columns lie side by side -> x, elements from a row to the next."""
    if x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) < x.shape[1]):
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else x.shape[1]


def columns_of(x: Tensor) -> int:
    return min(triton.next_power_of_2(max(x.shape[1], 1)), COLUMN_BYTES // x.element_size())


def select_tokens(
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    ids: Tensor,
    size: Tensor,
    prefix: int,
    keep: int,
    ratio: int,
    mass: float,
    fuse: str,
    uniform: bool,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`smaug::select_tokens`, one launch, by mass two."""
    rows_out, kept_rows, dropped_rows = sizes
    groups, (total, d) = cu_seqlens.shape[0] - 1, values.shape
    acc = torch.promote_types(torch.promote_types(values.dtype, scores.dtype), torch.float32)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=values.device)

    out, cu_out, ids_out = new(rows_out, d, dtype=values.dtype), new(groups + 1), new(rows_out)
    size_out, ids_kept, ids_dropped = new(rows_out, dtype=size.dtype), new(kept_rows), new(dropped_rows)
    overflow, target = new(), new(total)
    weight, factor = new(dropped_rows, dtype=acc), new(groups, dtype=acc)
    values, step = row_step(values)
    counts, ranked, capacity = None, scores, False
    if mass >= 0:
        counts, ranked, capacity = new(groups), new(total), rows_out < total
        launch(
            _mass,
            (groups,),
            scores,
            cu_seqlens,
            counts,
            ranked,
            cu_seqlens.stride(0),
            scores.stride(0),
            prefix,
            round(mass * 2**62),
            **configured(_mass, dict(SCORES=SCORES, num_warps=WARPS), values.dtype, d),
        )
    programs = max(min(groups, CUTTERS) if capacity else groups, 1)
    chosen = dict(ROWS=ROWS, COLUMNS=columns_of(values), SCORES=SCORES, GROUPS=GROUPS)
    blocks = configured(_select, chosen | dict(num_warps=WARPS, maxnreg=REGISTERS), values.dtype, d)
    launch(
        _select,
        (programs, max(triton.cdiv(d, blocks["COLUMNS"]), 1)),
        values,
        scores,
        ranked,
        cu_seqlens,
        ids.contiguous(),
        size.contiguous(),
        counts,
        out,
        cu_out,
        ids_out,
        size_out,
        ids_kept,
        ids_dropped,
        overflow,
        target,
        weight,
        factor,
        groups,
        total,
        rows_out,
        kept_rows,
        dropped_rows,
        total // groups if uniform else 0,
        prefix,
        kept_rows // groups - prefix if uniform else keep,
        -1 if uniform else ratio,
        triton.cdiv(groups, programs),
        cu_seqlens.stride(0),
        scores.stride(0),
        ranked.stride(0),
        D=d,
        STRIDE=step,
        FUSE=fuse if dropped_rows else "",
        UNIFORM=uniform,
        CAPACITY=capacity,
        **blocks,
    )
    return out, cu_out, ids_out, size_out, ids_kept, ids_dropped, overflow, target, weight, factor


def select_tokens_backward(
    grad: Tensor,
    values: Tensor | None,
    scores: Tensor | None,
    cu_seqlens: Tensor,
    ids_dropped: Tensor,
    target: Tensor,
    weight: Tensor,
    factor: Tensor,
    fuse: str,
    uniform: bool,
) -> tuple[Tensor, Tensor]:
    """`smaug::select_tokens_backward`, one launch."""
    (rows_out, d), total, groups = grad.shape, target.shape[0], cu_seqlens.shape[0] - 1
    dropped_rows = ids_dropped.shape[0]
    dvalues = torch.empty((total, d), dtype=grad.dtype, device=grad.device)
    dscores = torch.empty((0 if scores is None else total,), dtype=weight.dtype, device=grad.device)
    grad, grad_step = row_step(grad)
    step = d
    if values is not None:
        values, step = row_step(values)
    chosen = dict(ROWS=ROWS, COLUMNS=columns_of(grad), SCORES=SCORES, num_warps=WARPS)
    blocks = configured(_backward, chosen, grad.dtype, d)
    launch(
        _backward,
        (max(groups, 1), max(triton.cdiv(d, blocks["COLUMNS"]), 1)),
        grad,
        values,
        scores,
        cu_seqlens,
        ids_dropped,
        target,
        weight,
        factor,
        dvalues,
        dscores,
        groups,
        total,
        rows_out,
        dropped_rows,
        total // groups if uniform else 0,
        dropped_rows // groups if uniform else 0,
        dropped_rows.bit_length(),
        cu_seqlens.stride(0),
        0 if scores is None else scores.stride(0),
        D=d,
        GRAD_STRIDE=grad_step,
        STRIDE=step,
        FUSE=fuse if dropped_rows else "",
        UNIFORM=uniform,
        **blocks,
    )
    return dvalues, dscores


torch.library.register_kernel("smaug::select_tokens", "cuda", select_tokens)
torch.library.register_kernel("smaug::select_tokens_backward", "cuda", select_tokens_backward)
