"""Attention over packed sequences: what it means, the CPU path, and the switch to other implementations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smaug.ops.implementation import refuse
from smaug.tokens import Lengths

# Scores of one chunk, in elements: about what the second-level cache of one core holds in fp32.
_CHUNK = 1 << 19


class _Bucket(NamedTuple):
    """Query sequences of one shape. Rows are a slice where they lie together, else an index."""

    sequences: int
    len_q: int
    len_k: int
    rows_q: slice | Tensor
    rows_k: slice | Tensor
    segments: Tensor | None  # (sequences * len_k,) index into segment_bias, flattened


def _offsets(cu_seqlens: Tensor, lengths: Sequence[int]) -> np.ndarray:
    if lengths:
        return _starts(cu_seqlens.shape[0] - 1, lengths)
    return cu_seqlens.detach().cpu().numpy().astype(np.int64)  # the read; none when the host knows the lengths


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
) -> tuple[int, list[_Bucket]]:
    """Where the tail of the queries begins, and the buckets."""
    if kv_ids is None and lengths_q and lengths_k:
        count = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
        return _known_plan(*count, segments, tuple(lengths_q), tuple(lengths_k), cu_seqlens_q.device)
    cu_q, cu_k = _offsets(cu_seqlens_q, lengths_q), _offsets(cu_seqlens_k, lengths_k)
    return int(cu_q[-1]), _buckets(cu_q, cu_k, kv_ids, segments, cu_seqlens_q.device)


@functools.lru_cache(16)  # the layers of an encoder share it, forward and backward
def _known_plan(
    count_q: int,
    count_k: int,
    segments: bool,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    device: torch.device,
) -> tuple[int, list[_Bucket]]:
    cu_q, cu_k = _starts(count_q, lengths_q), _starts(count_k, lengths_k)
    return int(cu_q[-1]), _buckets(cu_q, cu_k, None, segments, device)


def _buckets(
    cu_q: np.ndarray, cu_k: np.ndarray, kv_ids: Tensor | None, segments: bool, device: torch.device
) -> list[_Bucket]:
    """Query sequences grouped by (queries, keys); those with no query or no key are left out."""
    len_q, seg_len = np.diff(cu_q), np.diff(cu_k)
    kv = np.arange(len(len_q))[:, None] if kv_ids is None else kv_ids.detach().cpu().numpy().reshape(len(len_q), -1)
    if kv_ids is None:
        each = seg_len[:, None]
    else:
        each = np.where(kv >= 0, seg_len[np.maximum(kv, 0)] if len(seg_len) else 0, 0)
    len_k = each.sum(1)
    shape = len_q * (int(len_k.max(initial=0)) + 1) + len_k
    order = np.argsort(shape, kind="stable")
    edges = np.flatnonzero(np.diff(shape[order])) + 1
    out = []
    for group in np.split(order, edges):
        if not len(group):
            continue
        nq, nk = int(len_q[group[0]]), int(len_k[group[0]])
        if nq == 0 or nk == 0:
            continue
        rows_q = _rows(cu_q[group], np.full(len(group), nq), device)
        part = each[group].reshape(-1)
        rows_k = _rows(cu_k[np.maximum(kv[group], 0)].reshape(-1), part, device)
        index = None
        if segments:
            number = (group[:, None] * kv.shape[1] + np.arange(kv.shape[1])).reshape(-1)
            index = torch.from_numpy(np.repeat(number, part)).to(device)
        out.append(_Bucket(len(group), nq, nk, rows_q, rows_k, index))
    return out


def _rows(start: np.ndarray, length: np.ndarray, device: torch.device) -> slice | Tensor:
    """The rows start[i] .. start[i] + length[i], one after the other."""
    start, length = start[length > 0], length[length > 0]
    if (start[1:] == start[:-1] + length[:-1]).all():
        return slice(int(start[0]), int(start[0] + length.sum()))
    before = np.cumsum(length) - length
    rows = np.repeat(start - before, length) + np.arange(length.sum())
    return torch.from_numpy(rows).to(device)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(out: Tensor | None, like: Tensor, rows: slice | Tensor, x: Tensor) -> Tensor:
    """x at ``rows`` of out, which is made when first needed: x itself when it is all there is."""
    if isinstance(rows, slice):
        if rows.stop - rows.start == like.shape[0]:
            return x.reshape(like.shape).contiguous()
        out = like.new_zeros(like.shape) if out is None else out
        out[rows].view(x.shape).copy_(x)
    else:
        out = like.new_zeros(like.shape) if out is None else out
        out.index_copy_(0, rows, x.reshape(-1, *out.shape[1:]))
    return out


def _add(out: Tensor, rows: slice | Tensor, x: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows].view(x.shape).add_(x)
    else:
        # in order of the index, so the sum is the same on every run
        out.index_add_(0, rows, x.reshape(-1, *out.shape[1:]).to(out.dtype))


def _heads_first(x: Tensor, count: int, heads_kv: int) -> Tensor:
    """(count * L, H, E) -> (count * H_kv, L * H // H_kv, E): the query heads of a group are rows of one product."""
    _, h, e = x.shape
    return x.reshape(count, -1, heads_kv, h // heads_kv, e).transpose(1, 2).reshape(count * heads_kv, -1, e)


def _rows_first(x: Tensor, count: int, group: int) -> Tensor:
    """The inverse of `_heads_first`, as a view (count, L, H_kv, group, E)."""
    heads_kv = x.shape[0] // count
    return x.view(count, heads_kv, -1, group, x.shape[-1]).transpose(1, 2)


def _flash_is_best(q: Tensor, group: int) -> bool:
    # Measured on one thread of an EPYC with AVX512-BF16: torch's CPU flash kernel wins in fp32; in bf16 its backward is
    # three times slower than matrix products. fp16 products are slow on a CPU.
    return q.device.type == "cpu" and group == 1 and q.dtype in (torch.float16, torch.float32)


def _chunks(batch: int, rows: int, keys: int) -> tuple[range, int, range, int]:
    """Steps over the batch and, where one entry is more than a chunk, over its rows."""
    step = max(1, _CHUNK // max(1, rows * keys))
    row_step = rows if rows * keys <= 8 * _CHUNK else max(1, 8 * _CHUNK // keys)
    return range(0, batch, step), step, range(0, rows, row_step), row_step


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    if q.dtype == acc:
        if bias is None:
            return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        return torch.baddbmm(bias[:, None, :], q, k.transpose(1, 2), alpha=scale)
    s = torch.bmm(q, k.transpose(1, 2)).to(acc).mul_(scale)
    return s if bias is None else s.add_(bias[:, None, :])


def _bucket_bias(
    bucket: _Bucket, heads_kv: int, segment_bias: Tensor | None, key_bias: Tensor | None, acc: torch.dtype
) -> Tensor | None:
    """(count * H_kv, len_k): what is added to the logits of each key."""
    bias = None
    if segment_bias is not None and bucket.segments is not None:
        bias = segment_bias.reshape(-1).index_select(0, bucket.segments).to(acc)
    if key_bias is not None:
        keys = _take(key_bias, bucket.rows_k).to(acc)
        bias = keys if bias is None else bias + keys
    if bias is None:
        return None
    return bias.view(bucket.sequences, 1, -1).expand(-1, heads_kv, -1).reshape(bucket.sequences * heads_kv, -1)


@torch.library.custom_op("smaug::attention", mutates_args=())
def _attention(
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
    t_q, h, e = q.shape
    heads_kv = k.shape[1]
    group = h // heads_kv
    acc = torch.promote_types(q.dtype, torch.float32)
    end, buckets = _plan(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias is not None, lengths_q, lengths_k)
    o: Tensor | None = None
    lse = q.new_zeros((h, t_q), dtype=acc)
    lse[:, :end] = -torch.inf
    scores = q.new_zeros((k.shape[0] if key_scores else 0,), dtype=acc)
    uses = torch.zeros_like(scores) if kv_ids is not None else None

    for bucket in buckets:
        n, nq, nk = bucket.sequences, bucket.len_q, bucket.len_k
        q_, k_, v_ = _take(q, bucket.rows_q), _take(k, bucket.rows_k), _take(v, bucket.rows_k)
        bias = _bucket_bias(bucket, heads_kv, segment_bias, key_bias, acc)
        if bias is None and not key_scores and _flash_is_best(q, group):
            o_, lse_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.view(n, -1, h, e).transpose(1, 2) for x in (q_, k_, v_)), scale=scale
            )
            o = _put(o, q, bucket.rows_q, o_.transpose(1, 2))
            _put_lse(lse, bucket.rows_q, lse_.transpose(0, 1).reshape(h, -1))
            continue
        q_, k_, v_ = (_heads_first(x, n, heads_kv) for x in (q_, k_, v_))
        o_ = q_.new_empty(q_.shape)
        lse_ = q_.new_empty(q_.shape[:2], dtype=acc)
        received = q_.new_zeros((n * heads_kv, nk), dtype=acc) if key_scores else None
        batches, step, row_steps, row_step = _chunks(n * heads_kv, nq * group, nk)
        for b in batches:
            part = slice(b, b + step)
            for r in row_steps:
                rows = slice(r, r + row_step)
                s = _logits(q_[part, rows], k_[part], scale, None if bias is None else bias[part], acc)
                top = s.amax(-1, keepdim=True)
                if bias is not None:
                    top = top.masked_fill(top == -torch.inf, 0)  # a bias may hide every key
                p = s.sub_(top).exp_()
                total = p.sum(-1, keepdim=True)
                lse_[part, rows] = (top + total.log()).squeeze(-1)
                share = total.reciprocal() if bias is None else torch.where(total > 0, 1 / total, 0)
                if received is not None:
                    if key_scores == "cls":
                        first = max(0, min(group, r + row_step) - r)  # rows of the first query in this step
                        received[part] += (p[:, :first] * share[:, :first]).sum(1)
                    else:
                        received[part] += torch.bmm(share.transpose(1, 2), p).squeeze(1)
                torch.mul(torch.bmm(p.to(q.dtype), v_[part]), share, out=o_[part, rows]) if q.dtype == acc else (
                    o_[part, rows].copy_(torch.bmm(p.to(q.dtype), v_[part]) * share)
                )
        o = _put(o, q, bucket.rows_q, _rows_first(o_, n, group))
        _put_lse(lse, bucket.rows_q, _rows_first(lse_[..., None], n, group).reshape(n * nq, h).t())
        if received is not None:
            mean = received.view(n, heads_kv, nk).sum(1).div_(h * (1 if key_scores == "cls" else nq)).view(-1)
            _add(scores, bucket.rows_k, mean)
            if uses is not None:
                _add(uses, bucket.rows_k, torch.ones_like(mean))
    if uses is not None:
        scores = scores / uses.clamp(min=1)
    return (q.new_zeros(q.shape) if o is None else o), lse, scores


def _put_lse(lse: Tensor, rows: slice | Tensor, x: Tensor) -> None:
    if isinstance(rows, slice):
        lse[:, rows] = x
    else:
        lse.index_copy_(1, rows, x)


@_attention.register_fake
def _(
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
    acc = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=acc),
        q.new_empty((k.shape[0] if key_scores else 0,), dtype=acc),
    )


@torch.library.custom_op("smaug::attention_backward", mutates_args=())
def _attention_backward(
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
    _, h, e = q.shape
    heads_kv = k.shape[1]
    group = h // heads_kv
    acc = torch.promote_types(q.dtype, torch.float32)
    _, buckets = _plan(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias is not None, lengths_q, lengths_k)
    shared = kv_ids is not None  # a key row may serve several query sequences, so its gradients are summed
    dq: Tensor | None = None
    dkv: list[Tensor | None] = [x.new_zeros(x.shape, dtype=acc) if shared else None for x in (k, v)]
    dsegment = q.new_zeros(segment_bias.shape if bias_grad and segment_bias is not None else (0,), dtype=acc)
    dkey = q.new_zeros(key_bias.shape if bias_grad and key_bias is not None else (0,), dtype=acc)
    if grad is None:
        grad = q.new_zeros(q.shape)

    for bucket in buckets:
        n, nq, nk = bucket.sequences, bucket.len_q, bucket.len_k
        q_, k_, v_ = _take(q, bucket.rows_q), _take(k, bucket.rows_k), _take(v, bucket.rows_k)
        g_, o_ = _take(grad, bucket.rows_q), _take(o, bucket.rows_q)
        lse_ = lse[:, bucket.rows_q] if isinstance(bucket.rows_q, slice) else lse.index_select(1, bucket.rows_q)
        bias = _bucket_bias(bucket, heads_kv, segment_bias, key_bias, acc)
        if bias is None and grad_lse is None and _flash_is_best(q, group):
            g_, q_, k_, v_, o_ = (x.view(n, -1, h, e).transpose(1, 2) for x in (g_, q_, k_, v_, o_))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g_, q_, k_, v_, o_, lse_.view(h, n, nq).transpose(0, 1), 0.0, False, scale=scale
            )
            dq_, dk_, dv_ = (x.transpose(1, 2) for x in grads)
        else:
            delta = (g_.to(acc) * o_.to(acc)).sum(-1, keepdim=True)
            lse_ = lse_.t().reshape(n * nq, h, 1)
            if grad_lse is not None:
                dlse = (
                    grad_lse[:, bucket.rows_q]
                    if isinstance(bucket.rows_q, slice)
                    else grad_lse.index_select(1, bucket.rows_q)
                )
                delta = delta - dlse.t().unsqueeze(-1)
            if bias is not None:
                hidden = lse_ == -torch.inf  # no key: every share is 0, whatever the gradient says
                lse_, delta = lse_.masked_fill(hidden, torch.inf), delta.masked_fill(hidden, 0)
            g_, q_, k_, v_, lse_, delta = (_heads_first(x, n, heads_kv) for x in (g_, q_, k_, v_, lse_, delta))
            dq_, dk_, dv_ = (x.new_empty(x.shape) for x in (q_, k_, v_))
            dbias = q_.new_zeros((n * heads_kv, nk), dtype=acc) if bias_grad else None
            batches, step, row_steps, row_step = _chunks(n * heads_kv, nq * group, nk)
            for b in batches:
                part = slice(b, b + step)
                for i, r in enumerate(row_steps):
                    rows = slice(r, r + row_step)
                    s = _logits(q_[part, rows], k_[part], scale, None if bias is None else bias[part], acc)
                    p = s.sub_(lse_[part, rows]).exp_()
                    dp = torch.bmm(g_[part, rows], v_[part].transpose(1, 2))
                    ds = (dp if dp.dtype == acc else dp.to(acc)).sub_(delta[part, rows]).mul_(p)
                    if dbias is not None:
                        dbias[part] += ds.sum(1)
                    ds, p = ds.to(q.dtype), p.to(q.dtype)
                    empty = q.new_empty(())
                    torch.baddbmm(empty, ds, k_[part], beta=0, alpha=scale, out=dq_[part, rows])
                    add = 1 if i else 0
                    torch.baddbmm(dk_[part], ds.transpose(1, 2), q_[part, rows], beta=add, alpha=scale, out=dk_[part])
                    torch.baddbmm(dv_[part], p.transpose(1, 2), g_[part, rows], beta=add, out=dv_[part])
            dq_ = _rows_first(dq_, n, group)
            dk_, dv_ = _rows_first(dk_, n, 1), _rows_first(dv_, n, 1)
            if dbias is not None:
                keys = dbias.view(n, heads_kv, nk).sum(1).view(-1)
                if segment_bias is not None and bucket.segments is not None:
                    dsegment.view(-1).index_add_(0, bucket.segments, keys)
                if key_bias is not None:
                    _add(dkey, bucket.rows_k, keys)
        dq = _put(dq, q, bucket.rows_q, dq_)
        for i, x in enumerate((dk_, dv_)):
            out = dkv[i]
            if shared and out is not None:
                _add(out, bucket.rows_k, x)
            else:
                dkv[i] = _put(out, k, bucket.rows_k, x)
    dq, dk, dv = (x.new_zeros(x.shape) if g is None else g for g, x in zip((dq, *dkv), (q, k, v), strict=True))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsegment, dkey


@_attention_backward.register_fake
def _(
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
    acc = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(segment_bias.shape if bias_grad and segment_bias is not None else (0,), dtype=acc),
        q.new_empty(key_bias.shape if bias_grad and key_bias is not None else (0,), dtype=acc),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cu_q, cu_k, kv_ids, segment_bias, key_bias, scale, _, lengths_q, lengths_k = inputs
    o, lse, scores = output
    ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k, kv_ids, segment_bias, key_bias)
    ctx.scale, ctx.lengths = scale, (lengths_q, lengths_k)
    ctx.mark_non_differentiable(scores)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None and grad_lse is None:
        return (None,) * 12
    segment_bias, key_bias = ctx.saved_tensors[8:]
    wants = ctx.needs_input_grad
    dq, dk, dv, dsegment, dkey = torch.ops.smaug.attention_backward(
        grad, grad_lse, *ctx.saved_tensors, ctx.scale, wants[6] or wants[7], *ctx.lengths
    )
    return (
        dq,
        dk,
        dv,
        None,
        None,
        None,
        dsegment.to(segment_bias.dtype) if wants[6] else None,
        dkey.to(key_bias.dtype) if wants[7] else None,
        *(None,) * 4,
    )


_attention.register_autograd(_backward, setup_context=_setup)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: list[int],
    cu_k: list[int],
    kv_ids: list[list[int]],
    segment_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    key_scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, a query sequence at a time; autograd differentiates it."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    # 0, which every input has a part in: gradients are 0, not missing, where no query has a key
    zero = torch.stack([x[:0].sum().to(acc) for x in (q, k, v, segment_bias, key_bias) if x is not None]).sum()
    o = q.new_zeros(q.shape) + zero.to(q.dtype)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=acc) + zero
    lse[:, : cu_q[-1]] = -torch.inf
    scores, uses = (q.new_zeros(k.shape[0], dtype=acc) for _ in range(2))
    for s, segments in enumerate(kv_ids):
        mine = slice(cu_q[s], cu_q[s + 1])
        rows = [r for j in segments if j >= 0 for r in range(cu_k[j], cu_k[j + 1])]
        if mine.start == mine.stop or not rows:
            continue
        keys = k[rows].to(acc).repeat_interleave(group, 1)
        logits = torch.einsum("qhe,khe->hqk", q[mine].to(acc), keys) * scale
        if segment_bias is not None:
            each = [segment_bias[s, m].expand(cu_k[j + 1] - cu_k[j]) for m, j in enumerate(segments) if j >= 0]
            logits = logits + torch.cat(each).to(acc)
        if key_bias is not None:
            logits = logits + key_bias[rows].to(acc)
        seen = logits.amax(-1, keepdim=True) > -torch.inf  # false where a bias hides every key
        safe = torch.where(seen, logits, 0)
        share = torch.where(seen, safe.softmax(-1), 0)
        lse[:, mine] = torch.where(seen.squeeze(-1), safe.logsumexp(-1), -torch.inf)
        o[mine] = torch.einsum("hqk,khe->qhe", share, v[rows].to(acc).repeat_interleave(group, 1)).to(q.dtype)
        if key_scores:
            received = (share[:, 0] if key_scores == "cls" else share.mean(1)).mean(0).detach().to(acc)
            scores = scores.index_add(0, torch.tensor(rows, device=q.device), received)
            uses = uses.index_add(0, torch.tensor(rows, device=q.device), torch.ones_like(received))
    return o, lse, (scores / uses.clamp(min=1) if key_scores else scores[:0])


def _outside(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_q: int | Tensor | None,
    max_k: int | Tensor | None,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
) -> Tensor:
    """One of other people's kernels, for comparison; it is used or refused, never replaced."""
    module = {"torch": "torch.nn.attention.varlen", "flash_attn": "flash_attn", "xformers": "xformers.ops"}[impl]
    name = {"torch": "varlen_attn", "flash_attn": "flash_attn_varlen_func", "xformers": "memory_efficient_attention"}[
        impl
    ]
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f'impl="{impl}" needs {module}.{name}, which is not installed here; use impl="auto".'
        ) from error
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(
            f'impl="{impl}" runs only on CUDA tensors of 16 bits, and these are {q.dtype} on {q.device.type}; '
            'use impl="auto".'
        )
    bound_q = q.shape[0] if max_q is None else int(max_q)
    bound_k = k.shape[0] if max_k is None else int(max_k)
    if impl == "torch":
        o = function(q, k, v, cu_q, cu_k, bound_q, bound_k, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    elif impl == "flash_attn":
        o = function(q, k, v, cu_q, cu_k, bound_q, bound_k, softmax_scale=scale)
    else:
        if not lengths_q or not lengths_k or q.shape[1] != k.shape[1]:
            raise RuntimeError(
                'impl="xformers" needs lengths_q and lengths_k on the host and as many key as query heads; '
                'pass them, or use impl="auto".'
            )
        count = cu_q.shape[0] - 1
        each = [list(x) * count if len(x) == 1 else list(x) for x in (lengths_q, lengths_k)]
        mask = importlib.import_module("xformers.ops.fmha").attn_bias.BlockDiagonalMask.from_seqlens(*each)
        o = function(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]
    tail = torch.arange(q.shape[0], device=q.device) >= cu_q[-1]
    return o.masked_fill(tail[:, None, None], 0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    kv_ids: Tensor | None = None,
    segment_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    key_scores: Literal["cls", "mean"] | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    lengths_q: Lengths = None,
    lengths_k: Lengths = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    return_attn_probs: bool = False,
    impl: str = "auto",
) -> Any:
    """Attention within packed sequences -> o (T_q, H, E)[, lse (H, T_q)][, scores (T_k,)].

        logits = scale * q k^T + segment_bias + key_bias;   o = softmax(logits) v;   lse = logsumexp(logits)

    q (T_q, H, E), k and v (T_k, H_kv, E): bf16, fp16, fp32 (fp64 for tests), H a multiple of H_kv, E a multiple of 8
    from 16 to 256. Bidirectional. scale defaults to E ** -0.5.
    cu_seqlens_q  (S_q + 1,) int32, query sequence s owns rows cu_seqlens_q[s] .. cu_seqlens_q[s + 1].
    cu_seqlens_k  (S_k + 1,) int32, key sequences; left out: the query sequences, self-attention.
    kv_ids        (S_q,) or (S_q, M) int32: the key sequences a query sequence attends to, as one concatenation; -1
                  is none. Left out: its own number. Nothing is copied to give many queries the same keys.
    segment_bias  (S_q, M) fp32, added to the logits of all keys of that segment. key_bias (T_k,) fp32, to those of
                  that key (log of its size). Both get gradients; -inf hides.
    return_lse    lse is fp32 and differentiable. A query with no keys: o 0, lse -inf, gradients 0.
    key_scores    scores (T_k,) fp32, detached: the attention a key received, mean over heads, from its sequence's
                  first query ("cls") or as a mean over the queries ("mean"), biases included. With kv_ids the mean
                  over the query sequences that used it. Unused keys 0.
    max_seqlen_*  accepted for the sake of pasted calls, not needed and not read.
    lengths_*     host hints, `PackedTokens.lengths`: for FLOP counts on meta, and so that impl="reference" and
                  devices without a kernel need not read cu_seqlens. They must be true. torch.compile leaves them out.

    Rows at or after cu_seqlens[-1] are the tail: not read, output 0 (lse 0), gradient 0; NaN there does no harm.

    Gradients, with g that of o: dP = g v^T, delta = rowsum(P * dP), dS = P * (dP - delta + dlse). Sums are fp32.
    Deterministic. Cost 4 * H * E * sum(len_q * len_k) FLOPs forward, 2.5 times that backward.

    impl "auto": on a CPU, sequences of one shape in one call, matrix products in chunks that fit the cache or torch's
    CPU flash kernel, whichever was measured faster. 16-bit products round the logits to 16 bits, as eager PyTorch
    does. "reference": the formula in a loop; reads cu_seqlens on the host unless lengths are given. "torch",
    "flash_attn", "xformers": those kernels, without ids, biases, lse or scores. FlashAttention, Dao et al. 2022.
    """
    if causal:
        raise ValueError(
            "attention is bidirectional; for causal masks use torch.nn.functional.scaled_dot_product_attention."
        )
    if dropout_p:
        raise ValueError(
            "attention has no dropout; apply torch.nn.functional.dropout to its output or drop whole tokens."
        )
    if return_attn_probs:
        raise ValueError('attention never forms its weights; ask for key_scores="cls" or "mean", or return_lse=True.')
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be (T_q, H, E) and k, v (T_k, H_kv, E), but they are {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}."
        )
    h, e = q.shape[1:]
    if h % k.shape[1]:
        raise ValueError(f"{h} query heads are no multiple of {k.shape[1]} key heads.")
    if e % 8 or not 16 <= e <= 256:
        raise ValueError(f"head width {e} is not offered; use a multiple of 8 from 16 to 256, padded with zeros.")
    if key_scores not in (None, "cls", "mean"):
        raise ValueError(f'key_scores={key_scores!r} is unknown; use "cls", "mean" or None.')
    if cu_seqlens_k is None:
        cu_seqlens_k, lengths_k = cu_seqlens_q, lengths_q
    s_q = cu_seqlens_q.shape[0] - 1
    if kv_ids is None:
        if cu_seqlens_k.shape[0] - 1 != s_q:
            raise ValueError(
                f"{s_q} query sequences and {cu_seqlens_k.shape[0] - 1} key sequences do not pair up; pass kv_ids."
            )
    elif kv_ids.shape[0] != s_q or kv_ids.ndim > 2:
        raise ValueError(f"kv_ids must be ({s_q},) or ({s_q}, M), but is {tuple(kv_ids.shape)}.")
    segments = 1 if kv_ids is None or kv_ids.ndim == 1 else kv_ids.shape[1]
    if segment_bias is not None and segment_bias.shape != (s_q, segments):
        raise ValueError(f"segment_bias must be ({s_q}, {segments}), but is {tuple(segment_bias.shape)}.")
    if key_bias is not None and key_bias.shape != k.shape[:1]:
        raise ValueError(f"key_bias must be ({k.shape[0]},), one a key row, but is {tuple(key_bias.shape)}.")
    if impl not in ("auto", "triton", "reference", "torch", "flash_attn", "xformers"):
        raise ValueError(
            f'impl={impl!r} is unknown; use "auto", "triton", "reference", "torch", "flash_attn" or "xformers".'
        )
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        q, k, v = q.to(low), k.to(low), v.to(low)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, but are {q.dtype}, {k.dtype} and {v.dtype}; cast them.")
    scale = e**-0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        lengths_q = lengths_k = None  # not even looked at: a tuple's length would be compiled in
    host_q = [] if lengths_q is None else [lengths_q] if isinstance(lengths_q, int) else list(lengths_q)
    host_k = [] if lengths_k is None else [lengths_k] if isinstance(lengths_k, int) else list(lengths_k)
    if impl == "reference":
        pairs = [[s] for s in range(s_q)] if kv_ids is None else kv_ids.reshape(s_q, segments).tolist()
        cu_q, cu_k = (_offsets(c, n).tolist() for c, n in ((cu_seqlens_q, host_q), (cu_seqlens_k, host_k)))
        o, lse, scores = _reference(q, k, v, cu_q, cu_k, pairs, segment_bias, key_bias, scale, key_scores or "")
    elif impl in ("auto", "triton"):
        refuse(impl, "attention", q)
        o, lse, scores = _attention(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias, key_bias),
            *(scale, key_scores or "", host_q, host_k),
        )
    else:
        if any(x is not None for x in (kv_ids, segment_bias, key_bias, key_scores)) or return_lse:
            raise RuntimeError(
                f'impl="{impl}" has no kv_ids, biases, key_scores or differentiable lse; use impl="auto" for these.'
            )
        return _outside(impl, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, max_seqlen_q, max_seqlen_k, host_q, host_k)
    if not return_lse and key_scores is None:
        return o
    return (o, *((lse,) if return_lse else ()), *((scores,) if key_scores else ()))


def _pairs(
    t_q: int, t_k: int, cu_q: Tensor, cu_k: Tensor, kv_ids: Tensor | None, lengths_q: Any, lengths_k: Any
) -> int:
    """sum(len_q * len_k): from host lengths, else from cu_seqlens, else (meta without a hint) as if all were equal."""

    def lengths(cu: Tensor, host: Any, rows: int) -> np.ndarray:
        count = cu.shape[0] - 1
        if host or _has_values(cu):
            return np.diff(_offsets(cu, [int(n) for n in host])).astype(float)
        return np.full(count, rows / max(count, 1))

    len_q, len_k = lengths(cu_q, lengths_q, t_q), lengths(cu_k, lengths_k, t_k)
    if kv_ids is None:
        return round(float((len_q * len_k).sum()))
    if _has_values(kv_ids):
        kv = kv_ids.detach().cpu().numpy().reshape(len(len_q), -1)
        return round(float((len_q * np.where(kv >= 0, len_k[np.maximum(kv, 0)], 0).sum(1)).sum()))
    segments = kv_ids.numel() // max(kv_ids.shape[0], 1)
    return round(float(len_q.sum() * segments * (len_k.mean() if len(len_k) else 0)))


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and type(x) is Tensor


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_ids: Tensor | None,
    segment_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    key_scores: str,
    lengths_q: Any,
    lengths_k: Any,
    out_val: Any = None,
) -> int:
    return 4 * q.shape[1] * q.shape[2] * _pairs(q.shape[0], k.shape[0], cu_q, cu_k, kv_ids, lengths_q, lengths_k)


def _backward_flops(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_ids: Tensor | None,
    *rest: Any,
    out_val: Any = None,
) -> int:
    return 10 * q.shape[1] * q.shape[2] * _pairs(q.shape[0], k.shape[0], cu_q, cu_k, kv_ids, rest[-2], rest[-1])


FLOPS = {torch.ops.smaug.attention: _flops, torch.ops.smaug.attention_backward: _backward_flops}
