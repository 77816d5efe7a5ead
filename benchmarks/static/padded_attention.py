"""Plain attention over a padded batch, as a yardstick: what does the packed kernel pay for being packed?

FlashAttention-2, Dao 2023, algorithms 1 and 2, written from the paper. q, k, v (B, H, N, E), all sequences padded to N;
`lengths` (B,) hides the padding of the keys. dq apart from dk and dv, as ours: the paper adds dq up with atomics. No
ids, no biases, no scores, and its tiles are ours, so that what differs is the packing, and on sm_90 and sm_100 that
ours come through tensor descriptors.

    P = softmax(scale q k^T);  o = P v;  delta = rowsum(g * o);  dS = P * (g v^T - delta)
    dq = scale dS k;  dk = scale dS^T q;  dv = P^T g
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.attention import LOG2E, _configuration
from smaug.kernels.launch import launch

_VARYING = ("scale", "n", "heads")


@triton.jit
def _at(head, n, first, BLOCK: tl.constexpr, E: tl.constexpr):
    """Offsets of BLOCK rows of a head in a contiguous (B * H, N, E)."""
    rows = first + tl.arange(0, BLOCK)
    return (head.to(tl.int64) * n + rows)[:, None] * E + tl.arange(0, E)[None, :], (rows < n)[:, None]


@triton.jit(do_not_specialize=_VARYING)
def padded_forward(
    q, k, v, o, lse, lengths, scale, n, heads, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    length = tl.load(lengths + head // heads)
    at_q, real = _at(head, n, first, BLOCK_M, E)
    q_ = tl.load(q + at_q, mask=real, other=0.0)
    acc = tl.zeros((BLOCK_M, E), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for j in range(0, length, BLOCK_N):
        at_k, there = _at(head, n, j, BLOCK_N, E)
        k_ = tl.load(k + at_k, mask=there, other=0.0)
        v_ = tl.load(v + at_k, mask=there, other=0.0)
        logits = tl.dot(q_, k_.T) * (scale * LOG2E)
        logits = tl.where((j + tl.arange(0, BLOCK_N) < length)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_.dtype), v_, acc * shrink[:, None])
        top = higher
    tl.store(o + at_q, (acc / total[:, None]).to(o.dtype.element_ty), mask=real)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + head.to(tl.int64) * n + rows, top + tl.log2(total), mask=rows < n)  # base 2


@triton.jit(do_not_specialize=_VARYING)
def padded_backward_queries(
    g, q, k, v, o, lse, delta, dq, lengths, scale, n, heads,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    length = tl.load(lengths + head // heads)
    at_q, real = _at(head, n, first, BLOCK_M, E)
    q_ = tl.load(q + at_q, mask=real, other=0.0)
    g_ = tl.load(g + at_q, mask=real, other=0.0)
    o_ = tl.load(o + at_q, mask=real, other=0.0)
    d = tl.sum(g_.to(tl.float32) * o_.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * n + rows
    tl.store(delta + at, d, mask=rows < n)
    base = tl.load(lse + at, mask=rows < n, other=float("inf"))
    acc = tl.zeros((BLOCK_M, E), tl.float32)
    for j in range(0, length, BLOCK_N):
        at_k, there = _at(head, n, j, BLOCK_N, E)
        k_ = tl.load(k + at_k, mask=there, other=0.0)
        v_ = tl.load(v + at_k, mask=there, other=0.0)
        logits = tl.dot(q_, k_.T) * (scale * LOG2E)
        logits = tl.where((j + tl.arange(0, BLOCK_N) < length)[None, :], logits, float("-inf"))
        ds = tl.exp2(logits - base[:, None]) * (tl.dot(g_, v_.T) - d[:, None])
        acc = tl.dot(ds.to(k_.dtype), k_, acc)
    tl.store(dq + at_q, (acc * scale).to(dq.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=_VARYING)
def padded_backward_keys(
    g, q, k, v, lse, delta, dk, dv, lengths, scale, n, heads,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    length = tl.load(lengths + head // heads)
    at_k, real = _at(head, n, first, BLOCK_N, E)
    k_ = tl.load(k + at_k, mask=real, other=0.0)
    v_ = tl.load(v + at_k, mask=real, other=0.0)
    dk_, dv_ = tl.zeros((BLOCK_N, E), tl.float32), tl.zeros((BLOCK_N, E), tl.float32)
    seen = (first + tl.arange(0, BLOCK_N) < length)[:, None]
    for i in range(0, n, BLOCK_M):  # padded queries too: their gradient is whatever the caller gave
        at_q, there = _at(head, n, i, BLOCK_M, E)
        q_ = tl.load(q + at_q, mask=there, other=0.0)
        g_ = tl.load(g + at_q, mask=there, other=0.0)
        rows = i + tl.arange(0, BLOCK_M)
        base = tl.load(lse + head.to(tl.int64) * n + rows, mask=rows < n, other=float("inf"))
        d = tl.load(delta + head.to(tl.int64) * n + rows, mask=rows < n, other=0.0)
        logits = tl.where(seen, tl.dot(k_, q_.T) * (scale * LOG2E), float("-inf"))
        p = tl.exp2(logits - base[None, :])
        dv_ = tl.dot(p.to(g_.dtype), g_, dv_)
        ds = p * (tl.dot(v_, g_.T) - d[None, :])
        dk_ = tl.dot(ds.to(q_.dtype), q_, dk_)
    tl.store(dk + at_k, (dk_ * scale).to(dk.dtype.element_ty), mask=real)
    tl.store(dv + at_k, dv_.to(dv.dtype.element_ty), mask=real)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """-> o, and lse in base 2. q, k, v contiguous (B, H, N, E), E a power of 2; lengths (B,) at least 1."""
    blocks, options = _tiles(0, q)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = triton.cdiv(q.shape[2], blocks["BLOCK_M"]), q.shape[0] * q.shape[1]
    scale = q.shape[3] ** -0.5
    launch(padded_forward, grid, q, k, v, o, lse, lengths, scale, q.shape[2], q.shape[1], **blocks, **options)
    return o, lse


def padded_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    rest = q.shape[3] ** -0.5, q.shape[2], q.shape[1]
    blocks, options = _tiles(1, q)
    grid = triton.cdiv(q.shape[2], blocks["BLOCK_M"]), q.shape[0] * q.shape[1]
    launch(padded_backward_queries, grid, g, q, k, v, o, lse, delta, dq, lengths, *rest, **blocks, **options)
    blocks, options = _tiles(2, q)
    grid = triton.cdiv(q.shape[2], blocks["BLOCK_N"]), q.shape[0] * q.shape[1]
    launch(padded_backward_keys, grid, g, q, k, v, lse, delta, dk, dv, lengths, *rest, **blocks, **options)
    return dq, dk, dv


def _tiles(which: int, q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    blocks, options = _configuration(which, q[0])
    return {name: blocks[name] for name in ("E", "BLOCK_M", "BLOCK_N")}, options
