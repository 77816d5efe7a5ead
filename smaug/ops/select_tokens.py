"""The tokens worth computing on: those with the highest scores stay, the others melt into one row a group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import CustomOpDef

from smaug.ops.implementation import reference_of, refuse
from smaug.tokens import Lengths, PackedTokens, host_lengths


def _rank_key(scores: Tensor) -> Tensor:
    """int32 whose order is that of the scores, -0 as 0, NaN below -inf."""
    score = scores.to(torch.float32) + 0.0
    bits = score.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(score.isnan(), -(1 << 31))


def _weight(scores: Tensor, acc: torch.dtype) -> Tensor:
    """What a score weighs in a sum: nothing where it is not finite."""
    return scores.to(acc).masked_fill(~scores.isfinite(), 0)


def _inverse(total: Tensor) -> Tensor:
    return torch.where(total == 0, 0, 1 / total)


def _group_sum(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, ...) sums of the rows of x, whose ``group`` ascends; ``groups`` itself is no group."""
    if x.device.type == "cpu":
        # in order of the index, so the sum is the same on every run; on other devices it would be atomics
        return x.new_zeros((groups + 1, *x.shape[1:])).index_add_(0, group, x)[:groups]
    return _segment_sum(x, group, groups)


def _segment_sum(x: Tensor, group: Tensor, groups: int) -> Tensor:
    edges = torch.searchsorted(group, torch.arange(groups + 1, device=x.device))
    return torch.segment_reduce(x, "sum", offsets=edges, axis=0, unsafe=True, initial=0)


def _starts(x: Tensor) -> Tensor:
    """(n + 1,): 0 and the running sum."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def _select_uniform(
    scores: Tensor, count: int, prefix: int, keep: int, fused: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_kept (S, prefix + keep), ids_dropped (S, m), target (S, L) and the new cu_seqlens. One sort key a row, and
    the m-th smallest of them tells who stays: nothing is sorted."""
    device = scores.device
    length = scores.shape[0] // count
    n, out = length - prefix, prefix + keep + fused
    position = torch.arange(n, device=device)
    key = (_rank_key(scores.reshape(count, length)[:, prefix:]).long() << 32) + (n - position)
    if keep == n:
        stays = torch.ones_like(key, dtype=torch.bool)
    else:
        stays = key > key.kthvalue(n - keep, keepdim=True).values
    before = stays.cumsum(1)
    row = torch.arange(count * length, device=device).view(count, length)
    order = torch.where(stays, before - 1, keep + position - before)
    order = torch.empty_like(order).scatter_(1, order, row[:, prefix:])
    ids_kept = torch.cat([row[:, :prefix], order[:, :keep]], 1)
    first = torch.arange(count, device=device)[:, None] * out
    lost = first + (out - 1) if fused else count * out  # count * out: nowhere
    target = torch.cat(
        [first + torch.arange(prefix, device=device), torch.where(stays, first + before + (prefix - 1), lost)], 1
    )
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=device) * out
    return ids_kept, order[:, keep:], target, cu_seqlens


def _select_ragged(
    scores: Tensor,
    cu_seqlens: Tensor,
    prefix: int,
    keep: int,
    ratio: int,
    mass: float,
    fused: bool,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_select_uniform` and the overflow, of flat tensors: ids -1 behind the last, target ``sizes[0]`` (nowhere)
    for rows of the tail. One stable sort of all rows by (group, prefix first, score)."""
    rows_out, kept_rows, dropped_rows = sizes
    device, total = scores.device, scores.shape[0]
    cu = cu_seqlens.long().contiguous()
    row = torch.arange(total, device=device)
    group = torch.searchsorted(cu[1:].contiguous(), row, right=True)  # S in the tail
    start, length = cu[:-1], cu[1:] - cu[:-1]
    in_prefix = row - cu[group] < prefix
    key = _rank_key(scores).long()
    best_first = torch.where(in_prefix, 0, (1 << 32) - 1 - (key + (1 << 31)) + 1)
    order = ((group << 34) + best_first).argsort(stable=True)
    if mass >= 0:
        share = _weight(scores, torch.float32).masked_fill(in_prefix | (row >= cu[-1]), 0)
        # fp64, as the running sum passes through all groups
        sums = _starts(share.index_select(0, order).double())
        base = sums[start]
        goal = mass * (sums[cu[1:]] - base)
        base, goal = (torch.cat([x, x.new_zeros(1)]) for x in (base, goal))
        ranked = order.new_empty(total).scatter_(0, order, row)
        stays = in_prefix | (sums[ranked] - base[group] < goal[group])
    else:
        n = (length - prefix).clamp(min=0)
        k = (n * ratio + 65535) >> 16 if ratio >= 0 else n.clamp(max=keep)
        bound = start + length.clamp(max=prefix) + k
        ranked = order.new_empty(total).scatter_(0, order, row)
        stays = ranked < torch.cat([bound, bound.new_zeros(1)])[group]
    stays = stays & (row < cu[-1])
    overflow = cu.new_zeros((), dtype=torch.int32)
    if mass >= 0 and rows_out < total:
        # room for the prefix and a fused row of every group; the rest goes to the highest scores of all
        _, used = _counts(stays, cu, fused)
        room = rows_out - length.clamp(max=prefix).sum() - (length.shape[0] if fused else 0)
        wins = torch.where(stays & ~in_prefix, best_first, 1 << 34).argsort(stable=True)
        wins = order.new_empty(total).scatter_(0, wins, row) < room
        fits = stays & (in_prefix | wins | (used <= rows_out))
        overflow = (stays.sum() - fits.sum()).to(torch.int32)
        stays = fits
    kept, _ = _counts(stays, cu, fused)
    lost = length - kept
    fused_rows = (lost > 0).long() if fused else torch.zeros_like(lost)
    cu_out = _starts(kept + fused_rows)
    shift = _starts(fused_rows)  # fused rows of the groups before
    before = stays.cumsum(0) - stays.long()
    goes = ~stays & (row < cu[-1])
    target = torch.where(stays, before + shift[group], rows_out)
    if fused:
        target = torch.where(goes, cu_out[(group + 1).clamp(max=cu.shape[0] - 1)] - 1, target)
    # one place more than there are takes what goes elsewhere
    ids_kept = row.new_full((kept_rows + 1,), -1).scatter_(0, torch.where(stays, before, kept_rows), row)
    ids_dropped = row.new_full((dropped_rows + 1,), -1).scatter_(0, torch.where(goes, row - before, dropped_rows), row)
    return ids_kept[:-1], ids_dropped[:-1], target, cu_out.to(torch.int32), overflow


def _counts(stays: Tensor, cu: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Rows of each group that stay (S,), and of the whole result with its fused rows ()."""
    running = _starts(stays)
    kept = running[cu[1:]] - running[cu[:-1]]
    extra = (kept < cu[1:] - cu[:-1]).sum() if fused else 0
    return kept, kept.sum() + extra


@torch.library.custom_op("smaug::select_tokens", mutates_args=())
def _select(
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
    """One of keep, ratio (in 65536ths) and mass is not negative; sizes are those of the result, ids_kept, ids_dropped.

    -> values, cu_seqlens, ids, size, ids_kept, ids_dropped, overflow; and for the backward target (T,), the row of the
    result that a row went to, weight of each dropped row, and factor (S,), by which "mean" multiplied the scores.
    """
    rows_out, kept_rows, dropped_rows = sizes
    groups, (total, d) = cu_seqlens.shape[0] - 1, values.shape
    acc = torch.promote_types(torch.promote_types(values.dtype, scores.dtype), torch.float32)
    weight, factor = values.new_zeros(dropped_rows, dtype=acc), values.new_ones(groups, dtype=acc)
    overflow = ids.new_zeros((), dtype=torch.int32)
    if total == 0:
        minus = [ids.new_full((n,), -1, dtype=torch.int32) for n in sizes]
        none = [ids.new_zeros(n, dtype=torch.int32) for n in (groups + 1, 0)]
        out = values.new_zeros((rows_out, d))
        return out, none[0], minus[0], size.new_zeros(rows_out), minus[1], minus[2], overflow, none[1], weight, factor
    if uniform:
        fused = 1 if fuse and dropped_rows else 0
        keep = kept_rows // groups - prefix
        kept, dropped, target, cu_out = _select_uniform(scores, groups, prefix, keep, fused)
        # the fused row starts as a copy of any row
        source = (torch.cat([kept, dropped[:, -1:]], 1) if fused else kept).reshape(-1)
        out, ids_out, size_out = (x.index_select(0, source) for x in (values, ids, size))
        if fused:
            gone, shape = dropped.reshape(-1), (groups, rows_out // groups)
            share = _weight(scores.index_select(0, gone), acc).view(groups, -1)
            if fuse == "mean":
                sum_ = share.sum(1, keepdim=True)
                factor = _inverse(sum_)
                share = torch.where(sum_ == 0, 1 / share.shape[1], share / sum_)
            x = values.index_select(0, gone).to(acc).view(groups, -1, d)
            out.view(*shape, d)[:, -1] = torch.bmm(share[:, None], x).squeeze(1)
            ids_out.view(shape)[:, -1] = -1
            size_out.view(shape)[:, -1] = size.index_select(0, gone).view(groups, -1).sum(1)
            weight, factor = share.reshape(-1), factor.reshape(-1)
    else:
        kept, dropped, target, cu_out, overflow = _select_ragged(
            scores, cu_seqlens, prefix, keep, ratio, mass, bool(fuse), sizes
        )
        # one row more than the result takes what has no place in it
        place = target[kept.clamp(min=0)].masked_fill_(kept < 0, rows_out)
        source = kept.new_full((rows_out + 1,), total).scatter_(0, place, kept)
        source[-1] = total
        empty = source == total
        source = source.clamp_(max=total - 1)
        out = values.index_select(0, source).masked_fill_(empty[:, None], 0)
        ids_out = ids.index_select(0, source).masked_fill_(empty, -1)
        size_out = size.index_select(0, source).masked_fill_(empty, 0)
        if fuse and dropped_rows and groups:
            gone, group, behind = _dropped_of(dropped, cu_seqlens)
            share = _weight(scores.index_select(0, gone), acc).masked_fill_(behind, 0)
            count = _group_sum((~behind).to(acc), group, groups)
            if fuse == "mean":
                sum_ = _group_sum(share, group, groups)
                factor = _inverse(sum_)
                whole = _of_group(sum_, group)
                share = torch.where(whole == 0, _of_group(_inverse(count), group), share / whole)
                share = share.masked_fill_(behind, 0)
            x = values.index_select(0, gone).to(acc).masked_fill_(behind[:, None], 0)
            lost = torch.where(count > 0, cu_out[1:].long() - 1, rows_out)
            out.index_copy_(0, lost, _group_sum(x.mul_(share[:, None]), group, groups).to(out.dtype))
            size_out.index_copy_(0, lost, _group_sum(size.index_select(0, gone).masked_fill_(behind, 0), group, groups))
            ids_out.index_fill_(0, lost, -1)
            weight = share
        out, ids_out, size_out = out[:-1], ids_out[:-1], size_out[:-1]
    kept, dropped, target = (x.reshape(-1).to(torch.int32) for x in (kept, dropped, target))
    return out, cu_out, ids_out, size_out, kept, dropped, overflow, target, weight, factor


@_select.register_fake
def _(
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
    rows_out, kept_rows, dropped_rows = sizes
    groups = cu_seqlens.shape[0] - 1
    acc = torch.promote_types(torch.promote_types(values.dtype, scores.dtype), torch.float32)
    return (
        values.new_empty((rows_out, values.shape[1])),
        values.new_empty((groups + 1,), dtype=torch.int32),
        values.new_empty((rows_out,), dtype=torch.int32),
        size.new_empty((rows_out,)),
        values.new_empty((kept_rows,), dtype=torch.int32),
        values.new_empty((dropped_rows,), dtype=torch.int32),
        values.new_empty((), dtype=torch.int32),
        values.new_empty((values.shape[0],), dtype=torch.int32),
        values.new_empty((dropped_rows,), dtype=acc),
        values.new_empty((groups,), dtype=acc),
    )


def _dropped_of(dropped: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ids_dropped: row, group (S behind the last one), and what lies behind the last one."""
    behind = dropped < 0
    gone = dropped.long().clamp(min=0)
    group = torch.searchsorted(cu_seqlens[1:].long(), gone, right=True)
    return gone, group.masked_fill_(behind, cu_seqlens.shape[0] - 1), behind


def _of_group(x: Tensor, group: Tensor) -> Tensor:
    return x[group.clamp(max=x.shape[0] - 1)]


@torch.library.custom_op("smaug::select_tokens_backward", mutates_args=())
def _select_backward(
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
    """values and scores are given where the scores want a gradient; dscores is (0,) where they do not."""
    (rows_out, d), total, groups = grad.shape, target.shape[0], cu_seqlens.shape[0] - 1
    acc = weight.dtype
    dscores = grad.new_zeros(0 if scores is None else total, dtype=acc)
    if rows_out == 0 or total == 0 or groups == 0:
        return grad.new_zeros((total, d)), dscores
    dvalues = grad.index_select(0, target.clamp(max=rows_out - 1))
    if not (uniform and fuse):
        dvalues.masked_fill_((target == rows_out)[:, None], 0)
    if not fuse or not ids_dropped.shape[0]:
        return dvalues, dscores
    if uniform:
        gone, share = ids_dropped.long(), weight.view(groups, -1)
        of_fused = grad.reshape(groups, -1, d)[:, -1:].to(acc)
        dvalues.index_copy_(0, gone, (of_fused * share[..., None]).to(grad.dtype).view(-1, d))
        if values is not None and scores is not None:
            x = values.index_select(0, gone).to(acc).view(groups, -1, d)
            dot = torch.bmm(x, of_fused.transpose(1, 2)).squeeze(2)
            if fuse == "mean":
                dot = (dot - (dot * share).sum(1, keepdim=True)) * factor[:, None]
            dot = dot.reshape(-1).masked_fill_(~scores.index_select(0, gone).isfinite(), 0)
            dscores.index_copy_(0, gone, dot)
        return dvalues, dscores
    gone, group, behind = _dropped_of(ids_dropped, cu_seqlens)
    place = gone.masked_fill(behind, total)  # one row more takes what is no row
    if values is not None and scores is not None:
        dot = (dvalues.index_select(0, gone).to(acc) * values.index_select(0, gone)).sum(1).masked_fill_(behind, 0)
        if fuse == "mean":
            mean = _group_sum(dot * weight, group, groups)
            dot = (dot - _of_group(mean, group)) * _of_group(factor, group)
        dot = dot.masked_fill_(~scores.index_select(0, gone).isfinite(), 0)
        dscores = dot.new_zeros(total + 1).scatter_(0, place, dot)[:-1]
    share = weight.new_ones(total + 1).scatter_(0, place, weight)[:-1]
    return dvalues.mul_(share[:, None]), dscores


@_select_backward.register_fake
def _(
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
    total = target.shape[0]
    return (
        grad.new_empty((total, grad.shape[1])),
        weight.new_empty((0 if scores is None else total,)),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, scores, cu_seqlens, _, _, _, _, _, _, fuse, uniform, _ = inputs
    _, _, _, _, _, ids_dropped, _, target, weight, factor = output
    wants = ctx.needs_input_grad[1]
    ctx.save_for_backward(
        values if wants else None, scores if wants else None, cu_seqlens, ids_dropped, target, weight, factor
    )
    ctx.rest, ctx.scores_dtype = (fuse, uniform), scores.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any, op: CustomOpDef) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    dvalues, dscores = op(grad, *ctx.saved_tensors, *ctx.rest)
    return dvalues, dscores.to(ctx.scores_dtype) if ctx.needs_input_grad[1] else None, *(None,) * 10


_select_reference, _select_backward_reference = map(reference_of, (_select, _select_backward))
_select.register_autograd(partial(_backward, op=_select_backward), setup_context=_setup)
_select_reference.register_autograd(partial(_backward, op=_select_backward_reference), setup_context=_setup)


def _stay(n: int, prefix: int, keep: int, ratio: int) -> int:
    """Rows of a group of n that stay, with its prefix."""
    first = min(prefix, n)
    return first + ((n - first) * ratio + 65535 >> 16 if ratio >= 0 else min(keep, n - first))


def _sizes(
    tokens: PackedTokens, prefix: int, keep: int, ratio: int, fused: bool
) -> tuple[tuple[int, int, int], int, Lengths]:
    """(rows, ids_kept, ids_dropped), exact where the host knows the lengths, else bounds; longest; lengths."""
    total, groups, known = tokens.rows, tokens.num_sequences, host_lengths(tokens.lengths)

    def after(n: int) -> int:
        stays = _stay(n, prefix, keep, ratio)
        return stays + (1 if fused and stays < n else 0)

    if isinstance(known, int):
        kept = groups * _stay(known, prefix, keep, ratio)
        return (groups * after(known), kept, groups * known - kept), after(known), after(known)
    if known is not None:
        lengths = tuple(after(n) for n in known)
        kept = sum(_stay(n, prefix, keep, ratio) for n in known)
        return (sum(lengths), kept, sum(known) - kept), max(lengths, default=0), lengths
    each = prefix + (1 if ratio >= 0 else keep)  # 1: what rounding up may add
    kept = min(total, groups * each + (total * ratio >> 16 if ratio >= 0 else 0))
    rows = min(total, kept + (groups if fused else 0))
    longest = min(tokens.max_seqlen, _stay(tokens.max_seqlen, prefix, keep, ratio) + (1 if fused else 0))
    return (rows, kept, total), longest, None


def select_tokens(
    tokens: PackedTokens,
    scores: Tensor,
    *,
    keep: int | float | None = None,
    mass: float | None = None,
    prefix: int = 0,
    fuse: Literal["mean", "sum"] | None = "mean",
    capacity: int | None = None,
    impl: str = "auto",
) -> Any:
    """The highest scores of every sequence stay, the rest melt into one row -> tokens, ids_kept, ids_dropped.

    scores    (T,), one a row of ``tokens``; those of prefix rows and of the tail are ignored.
    keep      int k: that many of each sequence (all, where it has fewer). float q, 0 to 1: of n rows without prefix
              k = (n * Q + 65535) >> 16 with Q = round(q * 65536), that is q * n rounded up. keep=1 is one row,
              keep=1.0 all of them.
    mass      instead of keep: the fewest whose fp32 scores, none negative, reach this share of the sum without prefix.
              A fourth result, ``overflow`` () int32, counts the rows that went for want of ``capacity``.
    prefix    the first ``prefix`` rows of each sequence ([CLS], registers) always stay.
    fuse      "mean": the last row of a sequence that lost something is sum_i w_i x_i over its lost rows, w = score /
              sum of their scores (all alike where that sum is 0). "sum": w = score, EViT's. None: no such row.
    capacity  rows of the result, by default as many as the host numbers show to be enough: exact where
              ``tokens.lengths`` is known; with mass the input's. A larger one adds a tail. A smaller one is refused,
              but with mass: if more would stay, room is set aside for the prefix and a fused row of every sequence
              and the rest goes to the highest scores of all sequences, ties to the lower row.

    tokens      order as in the input; the fused row has id -1 and the sum of sizes. Values keep their dtype, weights
                and sums are fp32. Tail rows are zero, their ids -1, and rows of the input's tail are not read.
    ids_kept    int32, the rows of the input that stayed, prefix included, ascending and so packed by sequence.
    ids_dropped int32, those that did not: ``tokens.values.index_select(0, ids_dropped)`` are the exit states a
                decoder needs, ``tokens.ids[ids_dropped]`` their places. Both are exact where the lengths are known
                on the host, (S * (prefix + k),) and (S * m,) for a uniform batch; else they end in -1.

    Rank: higher fp32 score, then lower position; NaN is below -inf. A score that is not finite weighs 0.
    Gradients: to tokens; to scores that ask for it, through the weights of the fused row.
    Deterministic, no host read. Cost: moves T * D elements and 2 * D FLOPs a dropped row. EViT, Liang et al. 2022.
    """
    if (keep is None) == (mass is None):
        raise ValueError("select_tokens takes keep (an int count or a float ratio) or mass; give one of them.")
    if isinstance(keep, bool) or (isinstance(keep, int) and keep < 0):
        raise ValueError(f"keep={keep} must be a count of at least 0, or a float ratio.")
    if isinstance(keep, float) and not 0 <= keep <= 1:
        raise ValueError(f"keep={keep} is no ratio between 0 and 1; a count must be an int.")
    if mass is not None and not 0 <= mass <= 1:
        raise ValueError(f"mass={mass} must be a share between 0 and 1.")
    if prefix < 0:
        raise ValueError(f"prefix={prefix} must be at least 0.")
    if fuse not in ("mean", "sum", None):
        raise ValueError(f'fuse={fuse!r} is unknown; use "mean", "sum" or None.')
    if tokens.values.ndim != 2 or scores.shape != tokens.values.shape[:1]:
        raise ValueError(
            f"scores must be (T,) for tokens (T, D), but are {tuple(scores.shape)} for {tuple(tokens.values.shape)}."
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, but are {scores.dtype}; convert them first.")
    groups, total, fused = tokens.num_sequences, tokens.rows, fuse is not None
    count, ratio = (-1, round(keep * 65536)) if isinstance(keep, float) else (-1 if keep is None else keep, -1)
    lengths: Lengths = None
    uniform = False
    if mass is not None:
        rows = total if capacity is None else capacity
        least = min(total, groups * (prefix + (1 if fused else 0)))
        sizes, longest = (rows, min(rows, total), total), min(tokens.max_seqlen, rows)
    else:
        sizes, longest, lengths = _sizes(tokens, prefix, count, ratio, fused)
        least = sizes[0]
        n = tokens.lengths
        uniform = isinstance(n, int) and n * groups == total > 0 and (capacity is None or capacity == least)
        if uniform and isinstance(n, int):
            prefix = min(prefix, n)
    if capacity is not None:
        if capacity < least:
            raise ValueError(
                f"capacity={capacity} is too small: up to {least} rows may have to stay; leave it out, or give "
                "tokens.lengths, from which the exact number follows."
            )
        sizes = (capacity, *sizes[1:])
    refuse(impl, "select_tokens", tokens.values)
    op = _select_reference if impl == "reference" else _select
    values, cu_seqlens, ids, size, ids_kept, ids_dropped, overflow, *_ = op(
        tokens.values,
        scores,
        tokens.cu_seqlens,
        tokens.ids,
        tokens.size,
        prefix,
        count,
        ratio,
        -1.0 if mass is None else mass,
        fuse or "",
        uniform,
        sizes,
    )
    selected = PackedTokens(values, cu_seqlens, ids, size, longest, lengths)
    return (selected, ids_kept, ids_dropped) if mass is None else (selected, ids_kept, ids_dropped, overflow)


def _flops(values: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    fuse, sizes = args[8], args[10]
    return 2 * sizes[2] * values.shape[1] if fuse else 0


def _backward_flops(
    grad: Tensor,
    values: Tensor | None,
    scores: Tensor | None,
    cu_seqlens: Tensor,
    ids_dropped: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    # a product a number for dvalues, a product and a sum for dscores
    return (3 if scores is not None else 1) * ids_dropped.shape[0] * grad.shape[1] if args[3] else 0


FLOPS = {
    torch.ops.smaug.select_tokens: _flops,
    torch.ops.smaug.select_tokens_reference: _flops,
    torch.ops.smaug.select_tokens_backward: _backward_flops,
    torch.ops.smaug.select_tokens_backward_reference: _backward_flops,
}
