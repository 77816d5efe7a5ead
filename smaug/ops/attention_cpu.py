"""Attention of packed sequences without a kernel: matrix products over rectangles that fit the cache.

Sequences are put into buckets, and a bucket is one batch of products (sequences * heads, queries, keys). Equal shapes
share a bucket as they are; where calls would cost more than the arithmetic, as they do for the short sequences that
masking leaves, neighbouring lengths share one whose surplus keys are hidden and whose surplus queries are dropped.

Exponents are base 2: torch's vectorised exp2 takes a third of the time of its exp, so log2(e) is folded into the scale.
A softmax needs some shift that keeps its exponents in range, not the maximum of its row: a whole chunk gets one, the
sums tell whether that was enough, and only where it was not the rows get their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Measured on one thread of an EPYC (AVX512-BF16, 1 MiB of second-level cache a core).
_CHUNK = 1 << 18  # scores of one chunk
_BUCKET = 1 << 16  # what the calls of one more bucket cost, forward and backward, in scores computed
_FLASH_FROM = 96  # keys from which torch's CPU flash kernel beats products, in fp32
_LOG2E = math.log2(math.e)


class _Side(NamedTuple):
    """The queries or the keys of a bucket: sequences * length places, some of which may be surplus."""

    length: int
    shown: slice | Tensor  # the row at each place; a slice where rows lie together
    kept: Tensor | None  # places that are no surplus; None = all
    rows: slice | Tensor  # the rows at these

    @property
    def in_place(self) -> bool:
        return self.kept is None and isinstance(self.rows, slice)


class _Bucket(NamedTuple):
    """Query sequences in one rectangle, and what they attend to in another."""

    sequences: int
    q: _Side
    k: _Side
    segments: Tensor | None  # of each place of k, index into segment_bias, flattened
    hidden: Tensor | None  # (sequences, k.length) fp32: -inf at surplus keys, else 0
    surplus_q: Tensor | None  # places


class _Plan(NamedTuple):
    buckets: list[_Bucket]
    end_q: int  # where the tail of the queries begins
    covers_q: int  # rows that the buckets write
    covers_k: int  # the same of keys; 0 where they may serve several query sequences

    def is_all_of(self, q: Tensor, k: Tensor) -> bool:
        """Whether q and k are the rectangles of one bucket as they are: equal lengths, in order, no tail."""
        return len(self.buckets) == 1 and q.shape[0] == self.covers_q and k.shape[0] == self.covers_k


def read_offsets(cu_seqlens: Tensor, lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens on the host as int64: from lengths where they are known, else read."""
    if lengths:
        return _starts(cu_seqlens.shape[0] - 1, lengths)
    return cu_seqlens.detach().cpu().numpy().astype(np.int64)


def _starts(count: int, lengths: Sequence[int]) -> np.ndarray:
    if len(lengths) == 1:
        return np.arange(count + 1, dtype=np.int64) * int(lengths[0])
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])


def _plan(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_ids: Tensor | None,
    segments: bool,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: int,
) -> _Plan:
    """The buckets. heads: what one more score costs, 0 if only equal shapes may share a bucket."""
    device = cu_seqlens_q.device
    if kv_ids is None and lengths_q and lengths_k:
        count = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
        return _known_plan(*count, segments, tuple(lengths_q), tuple(lengths_k), heads, device)
    cu_q, cu_k = read_offsets(cu_seqlens_q, lengths_q), read_offsets(cu_seqlens_k, lengths_k)
    return _plan_of(cu_q, cu_k, kv_ids, segments, heads, device)


@functools.lru_cache(16)  # the layers of an encoder share it, forward and backward
def _known_plan(
    count_q: int,
    count_k: int,
    segments: bool,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    heads: int,
    device: torch.device,
) -> _Plan:
    return _plan_of(_starts(count_q, lengths_q), _starts(count_k, lengths_k), None, segments, heads, device)


def _plan_of(
    cu_q: np.ndarray, cu_k: np.ndarray, kv_ids: Tensor | None, segments: bool, heads: int, device: torch.device
) -> _Plan:
    """Sequences without a query or a key are in no bucket."""
    len_q, seg_len = np.diff(cu_q), np.diff(cu_k)
    kv = np.arange(len(len_q))[:, None] if kv_ids is None else kv_ids.detach().cpu().numpy().reshape(len(len_q), -1)
    if kv_ids is None:
        each = seg_len[:, None]
    else:
        each = np.where(kv >= 0, seg_len[np.maximum(kv, 0)] if len(seg_len) else 0, 0)
    len_k = each.sum(1)

    buckets = []
    covers_q = covers_k = 0
    for group in _groups(len_q, len_k, heads):
        part = each[group].reshape(-1)
        q, kept_q, _ = _side(_concatenated(cu_q[group], len_q[group]), len_q[group], device)
        rows_k = _concatenated(cu_k[np.maximum(kv[group], 0)].reshape(-1), part)
        k, kept_k, places_k = _side(rows_k, len_k[group], device)
        index = hidden = None
        if segments:
            number = np.repeat((group[:, None] * kv.shape[1] + np.arange(kv.shape[1])).reshape(-1), part)
            index = torch.from_numpy(number[places_k]).to(device)
        if kept_k is not None:
            hidden = torch.from_numpy(np.where(kept_k, 0, -np.inf).astype(np.float32)).view(len(group), -1).to(device)
        surplus = None if kept_q is None else torch.from_numpy(np.flatnonzero(~kept_q)).to(device)
        buckets.append(_Bucket(len(group), q, k, index, hidden, surplus))
        covers_q, covers_k = covers_q + int(len_q[group].sum()), covers_k + (len(rows_k) if kv_ids is None else 0)
    return _Plan(buckets, int(cu_q[-1]), covers_q, covers_k)


def _groups(len_q: np.ndarray, len_k: np.ndarray, heads: int) -> list[np.ndarray]:
    """Numbers of the sequences of each bucket, ascending.

    Shapes are sorted by keys, then queries; the cheapest way to cut that row into buckets is found from its front,
    where a bucket costs its rectangle and its calls.
    """
    live = np.flatnonzero((len_q > 0) & (len_k > 0))
    order = live[np.lexsort((len_q[live], len_k[live]))]
    if not len(order):
        return []
    q, k = len_q[order], len_k[order]
    edges = np.flatnonzero((np.diff(q) != 0) | (np.diff(k) != 0)) + 1
    first = np.concatenate([[0], edges, [len(order)]])  # where each shape begins in the order
    shapes = len(first) - 1
    if not heads or shapes == 1:
        return np.split(order, edges)
    uq, uk = q[first[:-1]], k[first[:-1]]
    cost, cut = np.zeros(shapes + 1), np.zeros(shapes + 1, dtype=np.int64)
    for last in range(shapes):
        begin = max(0, last - 63)  # a bucket of more than 64 shapes would be mostly surplus
        widest = np.maximum.accumulate(uq[begin : last + 1][::-1])[::-1]
        area = (first[last + 1] - first[begin : last + 1]) * widest * uk[last] * float(heads)
        area[:-1] *= 1.3  # hiding surplus keys, and moving rows in and out of a rectangle that is no view
        total = cost[begin : last + 1] + area + _BUCKET
        best = int(total.argmin())
        cost[last + 1], cut[last + 1] = total[best], begin + best
    groups, end = [], shapes
    while end:
        groups.append(np.sort(order[first[cut[end]] : first[end]]))
        end = int(cut[end])
    return groups[::-1]


def _concatenated(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[i] .. start[i] + length[i], one after the other."""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def _side(
    rows: np.ndarray, length: np.ndarray, device: torch.device
) -> tuple[_Side, np.ndarray | None, slice | np.ndarray]:
    """The rectangle of sequences of these rows and lengths, which of its places are real (None: all), and which of the
    rows each shows: a surplus place shows its sequence's last."""

    def on_device(rows: np.ndarray) -> slice | Tensor:
        if (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return torch.from_numpy(rows).to(device)

    longest, to = int(length.max()), on_device(rows)
    if (length == longest).all():
        return _Side(longest, to, None, to), None, slice(None)
    column = np.arange(longest)
    kept = (column < length[:, None]).reshape(-1)
    places = ((np.cumsum(length) - length)[:, None] + np.minimum(column, length[:, None] - 1)).reshape(-1)
    side = _Side(longest, on_device(rows[places]), torch.from_numpy(np.flatnonzero(kept)).to(device), to)
    return side, kept, places


def _take(x: Tensor, rows: slice | Tensor, dim: int = 0) -> Tensor:
    if isinstance(rows, slice):
        return x[rows] if dim == 0 else x[:, rows]
    return x.index_select(dim, rows)


def _output(like: Tensor, covers: int) -> Tensor:
    """Room for all rows of like; zeros where some belong to nobody."""
    return like.new_empty(like.shape) if covers == like.shape[0] else like.new_zeros(like.shape)


def _place(out: Tensor | None, like: Tensor, covers: int, side: _Side, places: int) -> tuple[Tensor | None, Tensor]:
    """out, and where a bucket writes its (places, H, E): rows of out if they lie together, else room of its own."""
    if side.in_place:
        out = _output(like, covers) if out is None else out
        return out, out[side.rows]
    return out, like.new_empty((places, *like.shape[1:]))


def _put(out: Tensor | None, like: Tensor, covers: int, side: _Side, x: Tensor) -> Tensor:
    """out, made when first needed, with the places x of a bucket in it; x itself where that is all there is."""
    if side.kept is not None:
        x = x.index_select(0, side.kept)
    if isinstance(side.rows, slice) and side.rows.stop - side.rows.start == like.shape[0]:
        return x.reshape(like.shape).contiguous()
    out = _output(like, covers) if out is None else out
    if isinstance(side.rows, slice):
        out[side.rows].view(x.shape).copy_(x)
    else:
        out.index_copy_(0, side.rows, x.reshape(-1, *like.shape[1:]))
    return out


def _put_lse(lse: Tensor | None, rows: int, plan: _Plan, side: _Side, x: Tensor) -> Tensor:
    """As `_put`, for lse (H, rows) and x (H, places)."""
    if side.kept is not None:
        x = x.index_select(1, side.kept)
    if isinstance(side.rows, slice) and side.rows.stop - side.rows.start == rows:
        return x.contiguous()
    if lse is None:
        lse = x.new_zeros((x.shape[0], rows))
        lse[:, : plan.end_q] = -torch.inf
    if isinstance(side.rows, slice):
        lse[:, side.rows] = x
    else:
        lse.index_copy_(1, side.rows, x)
    return lse


def _add(out: Tensor | None, rows: slice | Tensor, x: Tensor) -> None:
    """x onto rows of out, which is there if keys are shared. Surplus places add 0 to a row that exists."""
    assert out is not None
    if isinstance(rows, slice):
        out[rows].view(x.shape).add_(x)
    else:
        # in order of the index, so the sum is the same on every run
        out.index_add_(0, rows, x.reshape(-1, *out.shape[1:]).to(out.dtype))


def _heads_first(x: Tensor, sequences: int, heads_kv: int) -> Tensor:
    """(sequences * L, H, E) -> (sequences * H_kv, L * H // H_kv, E): a group's query heads are rows of one product."""
    _, h, e = x.shape
    return x.view(sequences, -1, heads_kv, h // heads_kv, e).transpose(1, 2).reshape(sequences * heads_kv, -1, e)


def _rows_first(x: Tensor, sequences: int, group: int) -> Tensor:
    """The inverse of `_heads_first`, as a view (sequences, L, H_kv, group, E)."""
    heads_kv = x.shape[0] // sequences
    return x.view(sequences, heads_kv, -1, group, x.shape[-1]).transpose(1, 2)


def _flash_is_best(q: Tensor, group: int, biases: bool) -> bool:
    """Whether torch's CPU flash kernel is taken, a bucket of equal shapes a call: it wins in fp32, and in fp16, whose
    products are slow on a CPU; in bf16 its backward takes three times as long as products."""
    return q.device.type == "cpu" and group == 1 and not biases and q.dtype in (torch.float16, torch.float32)


def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> tuple[Tensor, Tensor]:
    """torch's CPU flash kernel on (sequences * L, H, E) -> o (sequences, L, H, E), lse (H, sequences * L)."""
    q_, k_, v_ = (x.view(sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, scale=scale)
    return o.transpose(1, 2), lse.transpose(0, 1).reshape(q.shape[1], -1).contiguous()  # reshape may return a view


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sequences: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each (sequences, L, H, E)."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *(x.view(sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (grad, q, k, v, o)),
        *(lse.view(lse.shape[0], sequences, -1).transpose(0, 1), 0.0, False),
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _steps(bucket: _Bucket, heads: int) -> tuple[int, int]:
    """Sequences of a chunk and, where one sequence is much more than that, its queries."""
    a_sequence = bucket.q.length * bucket.k.length * heads
    if a_sequence <= 8 * _CHUNK:
        return max(1, _CHUNK // a_sequence), bucket.q.length
    return 1, max(1, 8 * _CHUNK // (bucket.k.length * heads))


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    """In base 2, as the bias is."""
    s = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale * _LOG2E)
    s = s if s.dtype == acc else s.to(acc)
    return s if bias is None else s.add_(bias)


def _powers(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, acc: torch.dtype, by_row: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """2 ** (logits - shift), their sums over the keys, log2 of the sums of 2 ** logits, and whether shift is by row."""
    if not by_row:
        p = _logits(q, k, scale, bias, acc).exp2_()
        total = p.sum(-1, keepdim=True)
        low, high = total.aminmax()
        if float(low) > 2.0**-60 and float(high) < 2.0**60:  # false for NaN too
            return p, total, total.log2(), False
    s = _logits(q, k, scale, bias, acc)
    top = s.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)  # a bias may hide every key
    p = s.sub_(top).exp2_()
    total = p.sum(-1, keepdim=True)
    return p, total, total.log2().add_(top), True


def _bias(
    bucket: _Bucket, heads_kv: int, segment_bias: Tensor | None, key_bias: Tensor | None, acc: torch.dtype
) -> Tensor | None:
    """(sequences * H_kv, 1, len_k): what is added to the logits of each key, in base 2."""
    bias = None
    if segment_bias is not None and bucket.segments is not None:
        bias = segment_bias.reshape(-1).index_select(0, bucket.segments).to(acc)
    if key_bias is not None:
        keys = _take(key_bias, bucket.k.shown).to(acc)
        bias = keys if bias is None else bias + keys
    if bias is not None:
        bias = (bias * _LOG2E).view(bucket.sequences, -1)
    if bucket.hidden is not None:
        bias = bucket.hidden if bias is None else bias + bucket.hidden
    if bias is None:
        return None
    return bias[:, None].expand(-1, heads_kv, -1).reshape(bucket.sequences * heads_kv, 1, -1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_ids: Tensor | None,
    segment_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    key_scores: str,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """smaug::attention; arguments and results as `smaug.ops.attention` says."""
    t_q, h, e = q.shape
    heads_kv = k.shape[1]
    group = h // heads_kv
    acc = torch.promote_types(q.dtype, torch.float32)
    biases = segment_bias is not None or key_bias is not None
    flash = not key_scores and _flash_is_best(q, group, biases)
    plan = _plan(
        *(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias is not None, lengths_q, lengths_k),
        0 if flash or key_scores else h,  # a mean over queries would have to leave out surplus ones
    )
    if flash and plan.is_all_of(q, k):  # nothing but the call: beside a few short sequences Python's time shows
        o_, lse_ = _flash(q, k, v, plan.buckets[0].sequences, scale)
        return o_.reshape(q.shape), lse_, lse_.new_empty(0)
    o: Tensor | None = None
    lse: Tensor | None = None
    scores = q.new_zeros((k.shape[0] if key_scores else 0,), dtype=acc)
    uses = torch.zeros_like(scores) if kv_ids is not None else None
    by_row = q.dtype == torch.float16  # shares without a shift would leave its range

    for bucket in plan.buckets:
        n, nq, nk = bucket.sequences, bucket.q.length, bucket.k.length
        qs, ks, vs = _take(q, bucket.q.shown), _take(k, bucket.k.shown), _take(v, bucket.k.shown)
        if flash:
            o_, lse_ = _flash(qs, ks, vs, n, scale)
            o = _put(o, q, plan.covers_q, bucket.q, o_)
            lse = _put_lse(lse, t_q, plan, bucket.q, lse_)
            continue
        bias = _bias(bucket, heads_kv, segment_bias, key_bias, acc)
        o, os = _place(o, q, plan.covers_q, bucket.q, n * nq)
        lse_ = q.new_empty((n * heads_kv, nq * group, 1), dtype=acc)
        received = q.new_zeros((n * heads_kv, nk), dtype=acc) if key_scores else None
        many, some = _steps(bucket, h)
        for a in range(0, n, many):
            m = min(many, n - a)
            one, keys = slice(a * nq, (a + m) * nq), slice(a * nk, (a + m) * nk)
            part = slice(a * heads_kv, (a + m) * heads_kv)
            q_ = _heads_first(qs[one], m, heads_kv)
            k_, v_ = _heads_first(ks[keys], m, heads_kv), _heads_first(vs[keys], m, heads_kv)
            out = os[one].view(m, nq, heads_kv, group, e)
            for r in range(0, nq, some):
                rows = slice(r * group, (r + some) * group)
                p, total, lse_[part, rows], by_row = _powers(
                    q_[:, rows], k_, scale, None if bias is None else bias[part], acc, by_row
                )
                share = total.reciprocal() if bias is None else torch.where(total > 0, 1 / total, 0)
                if received is not None and key_scores == "mean":
                    received[part] += torch.bmm(share.transpose(1, 2), p).squeeze(1)
                elif received is not None and r == 0:  # rows of the first query
                    received[part] = (p[:, :group] * share[:, :group]).sum(1)
                x = torch.bmm(p if p.dtype == q.dtype else p.to(q.dtype), v_)
                torch.mul(_rows_first(x, m, group), _rows_first(share, m, group), out=out[:, r : r + some])
        if not bucket.q.in_place:
            o = _put(o, q, plan.covers_q, bucket.q, os)
        lse = _put_lse(lse, t_q, plan, bucket.q, _rows_first(lse_.div_(_LOG2E), n, group).reshape(n * nq, h).t())
        if received is not None:
            mean = received.view(n, heads_kv, nk).sum(1).div_(h * (1 if key_scores == "cls" else nq)).view(-1)
            _add(scores, bucket.k.shown, mean)
            if uses is not None:
                _add(uses, bucket.k.shown, torch.ones_like(mean))
    if uses is not None:
        scores = scores / uses.clamp(min=1)
    if o is None or lse is None:  # no bucket
        o, lse = q.new_zeros(q.shape), q.new_zeros((h, t_q), dtype=acc)
        lse[:, : plan.end_q] = -torch.inf
    return o, lse, scores


def backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_ids: Tensor | None,
    segment_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    bias_grad: bool,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """smaug::attention_backward -> dq, dk, dv, dsegment_bias, dkey_bias (empty where unwanted)."""
    _, h, e = q.shape
    heads_kv = k.shape[1]
    group = h // heads_kv
    acc = torch.promote_types(q.dtype, torch.float32)
    biases = segment_bias is not None or key_bias is not None
    flash = grad_lse is None and _flash_is_best(q, group, biases)
    plan = _plan(
        *(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias is not None, lengths_q, lengths_k), 0 if flash else h
    )
    if flash and grad is not None and plan.is_all_of(q, k):
        dq_, dk_, dv_ = _flash_backward(grad, q, k, v, o, lse, plan.buckets[0].sequences, scale)
        return dq_.reshape(q.shape), dk_.reshape(k.shape), dv_.reshape(v.shape), lse.new_empty(0), lse.new_empty(0)
    shared = kv_ids is not None  # a key row may serve several query sequences, so its gradients are summed
    dq: Tensor | None = None
    dk, dv = (x.new_zeros(x.shape, dtype=acc) if shared else None for x in (k, v))
    dsegment = q.new_zeros(segment_bias.shape if bias_grad and segment_bias is not None else (0,), dtype=acc)
    dkey = q.new_zeros(key_bias.shape if bias_grad and key_bias is not None else (0,), dtype=acc)
    if grad is None:
        grad = q.new_zeros(q.shape)

    for bucket in plan.buckets:
        n, nq, nk = bucket.sequences, bucket.q.length, bucket.k.length
        qs, ks, vs = _take(q, bucket.q.shown), _take(k, bucket.k.shown), _take(v, bucket.k.shown)
        gs, lse_ = _take(grad, bucket.q.shown), _take(lse, bucket.q.shown, 1)
        if flash:
            dq_, dk_, dv_ = _flash_backward(gs, qs, ks, vs, _take(o, bucket.q.shown), lse_, n, scale)
            dq = _put(dq, q, plan.covers_q, bucket.q, dq_)
            if shared:
                _add(dk, bucket.k.shown, dk_)
                _add(dv, bucket.k.shown, dv_)
            else:
                dk = _put(dk, k, plan.covers_k, bucket.k, dk_)
                dv = _put(dv, v, plan.covers_k, bucket.k, dv_)
            continue
        bias = _bias(bucket, heads_kv, segment_bias, key_bias, acc)
        lse_ = lse_.t().reshape(n * nq, h, 1) * _LOG2E
        dlse = None if grad_lse is None else _take(grad_lse, bucket.q.shown, 1).t().unsqueeze(-1).to(acc)
        if bucket.surplus_q is not None:  # queries that are not there move nothing
            gs = gs.index_fill(0, bucket.surplus_q, 0)
            dlse = None if dlse is None else dlse.index_fill(0, bucket.surplus_q, 0)
        if biases:
            nothing = lse_ == -torch.inf  # no key: every share is 0
            lse_ = lse_.masked_fill(nothing, torch.inf)
            dlse = None if dlse is None else dlse.masked_fill(nothing, 0)
        lse_ = _heads_first(lse_, n, heads_kv)
        dlse = None if dlse is None else _heads_first(dlse.contiguous(), n, heads_kv)
        dq, dqs = _place(dq, q, plan.covers_q, bucket.q, n * nq)
        if shared:
            dks, dvs = k.new_empty((n * nk, heads_kv, e)), v.new_empty((n * nk, heads_kv, e))
        else:
            dk, dks = _place(dk, k, plan.covers_k, bucket.k, n * nk)
            dv, dvs = _place(dv, v, plan.covers_k, bucket.k, n * nk)
        dbias = q.new_zeros((n * heads_kv, nk), dtype=acc) if bias_grad else None
        empty = q.new_empty(())
        many, some = _steps(bucket, h)
        for a in range(0, n, many):
            m = min(many, n - a)
            one, keys = slice(a * nq, (a + m) * nq), slice(a * nk, (a + m) * nk)
            part = slice(a * heads_kv, (a + m) * heads_kv)
            q_, g_ = _heads_first(qs[one], m, heads_kv), _heads_first(gs[one], m, heads_kv)
            k_, v_ = _heads_first(ks[keys], m, heads_kv), _heads_first(vs[keys], m, heads_kv)
            dq_, dk_, dv_ = (x.new_empty(x.shape) for x in (q_, k_, v_))
            for r in range(0, nq, some):
                rows = slice(r * group, (r + some) * group)
                p = _logits(q_[:, rows], k_, scale, None if bias is None else bias[part], acc)
                p.sub_(lse_[part, rows]).exp2_()
                dp = torch.bmm(g_[:, rows], v_.transpose(1, 2))
                ds = torch._softmax_backward_data(dp if dp.dtype == acc else dp.to(acc), p, -1, acc)
                if dlse is not None:
                    ds.addcmul_(p, dlse[part, rows])
                if dbias is not None:
                    dbias[part] += ds.sum(1)
                if q.dtype != acc:
                    ds, p = ds.to(q.dtype), p.to(q.dtype)
                torch.baddbmm(empty, ds, k_, beta=0, alpha=scale, out=dq_[:, rows])
                add = 1 if r else 0
                torch.baddbmm(dk_, ds.transpose(1, 2), q_[:, rows], beta=add, alpha=scale, out=dk_)
                torch.baddbmm(dv_, p.transpose(1, 2), g_[:, rows], beta=add, out=dv_)
            dqs[one].view(m, nq, heads_kv, group, e).copy_(_rows_first(dq_, m, group))
            dks[keys].view(m, nk, heads_kv, 1, e).copy_(_rows_first(dk_, m, 1))
            dvs[keys].view(m, nk, heads_kv, 1, e).copy_(_rows_first(dv_, m, 1))
        if dbias is not None:
            received = dbias.view(n, heads_kv, nk).sum(1).view(-1)
            if segment_bias is not None and bucket.segments is not None:
                dsegment.view(-1).index_add_(0, bucket.segments, received)
            if key_bias is not None:
                _add(dkey, bucket.k.shown, received)
        if not bucket.q.in_place:
            dq = _put(dq, q, plan.covers_q, bucket.q, dqs)
        if shared:
            _add(dk, bucket.k.shown, dks)
            _add(dv, bucket.k.shown, dvs)
        elif not bucket.k.in_place:
            dk, dv = _put(dk, k, plan.covers_k, bucket.k, dks), _put(dv, v, plan.covers_k, bucket.k, dvs)
    dq, dk, dv = (x.new_zeros(x.shape) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsegment, dkey
