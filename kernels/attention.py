"""Attention within packed sequences on a GPU; what it means is said in `smaug.ops.attention`. T = rows, S = sequences.

    logits = scale * q k^T + segment_bias + key_bias;   P = softmax(logits);   o = P v;   lse = logsumexp(logits)
    dP = g v^T;  dS = P * (dP - delta), delta = rowsum(g * o) - dlse;  dq = scale dS k;  dk = scale dS^T q;  dv = P^T g

FlashAttention-2, Dao 2023, section 3: one program owns a tile of rows and walks the other side; P stays on the chip.

Grid. Tiles are cut without knowing a length on the host: sequence s owns the tiles from cu[s] // BLOCK + s on, which
is always enough, and a program finds its s by binary search. The tail counts as one more sequence, which has no keys
and is used by nobody, so it is written with zeros: T // BLOCK + S + 1 tiles, times heads. One without rows stops.

Launches. Forward: query tiles. Scores: key tiles, from the lse. Backward: query tiles give dq, delta and a sum of dS
for each (tile, head, segment); key tiles give dk, dv and a sum of dS for each (key head, key); where a bias wants its
gradient a third launch adds these sums up. A key tile finds its queries by scanning kv_ids in ascending order. Every
output has one writer that adds in a fixed order: no atomics, equal bits on every run.

Cost. 4 * H * E * sum(len_q * len_k) FLOPs forward, 14 backward (two products are formed twice), 2 for "mean" scores.
Bytes: q, o once; k, v once for each query tile of their sequences, mostly from the L2 cache. Workspace backward: delta,
4 * H * T_q bytes, and where biases have gradients 4 * (H * M * query tiles + H_kv * T_k).

Copies. The side that a program walks (k, v; or q, g) comes through tensor descriptors where the architecture has them
and through pointers below and for fp32: `_streamed` decides, `_load` is the source of both. At equal tiles that frees
up to a third of the registers; the loop has about as many instructions at widths 64 and 128 and up to 21 % more where
heads come in two parts, each of which is waited for. What that is worth in time nobody has measured. The tile that
stays comes through pointers everywhere: a descriptor for it would cost registers (64 wide, sm_90: 82 to 98 in the
forward pass).

16-bit inputs go to tensor cores and are summed in fp32; fp32 inputs are multiplied in fp32 ("ieee"). Exponents are
base 2, as the hardware's are, with the factor folded into scale and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

from smaug.kernels.launch import OPTIONS, address, architecture, configured, launch

# By width, for (forward and scores, backward for queries, backward for keys): BLOCK_M queries, BLOCK_N keys, num_warps,
# num_stages and, where the assembler would rather spill than run one program less, registers a thread. Chosen for
# sequences of 16 to 400 tokens by compiling, not by timing: 3 stages so that copies overlap, no spills, and at most
# 101,376 bytes of shared memory, which every device from sm_80 on has; sm_100 has twice that, and its 256 wide takes
# some. Through descriptors (sm_90, sm_100) tiles may be wider: those that issue the fewest instructions for a logit of
# those that do not spill. tests/kernels/test_compiled_attention.py checks.
_TABLE: dict[int, tuple[tuple[int, ...], ...]] = {
    32: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3, 168)),
    64: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    80: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    96: ((64, 32, 4, 3), (64, 32, 4, 3), (16, 64, 4, 3)),
    128: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3)),
    256: ((64, 32, 8, 2), (16, 64, 8, 2), (32, 32, 8, 2)),
}
_EXCEPTIONS: dict[tuple[int, int, int], tuple[int, ...]] = {  # (device, width, which of the three)
    (80, 64, 1): (64, 32, 4, 3, 224),
    (80, 80, 2): (16, 64, 4, 3),
    (86, 64, 1): (64, 32, 4, 2),
    (86, 80, 1): (32, 32, 4, 3),
    (86, 80, 2): (16, 64, 4, 2),
    (86, 96, 1): (32, 32, 4, 3),
    (86, 96, 2): (16, 16, 4, 3),
    (86, 128, 2): (32, 32, 8, 3),
    (90, 96, 2): (32, 64, 4, 3),
    (90, 128, 0): (64, 32, 4, 3, 168),
    (90, 128, 2): (16, 64, 4, 3),
    (100, 32, 0): (64, 32, 4, 3, 168),
    (100, 64, 0): (64, 32, 4, 3, 168),
    (100, 80, 0): (64, 32, 4, 3, 168),
    (100, 80, 2): (32, 64, 4, 2),
    (100, 96, 2): (16, 64, 4, 2),
    (100, 128, 2): (32, 32, 4, 3, 224),
}
_FP32 = {  # as _TABLE, without tensor cores; a width of 256 cannot be kept from spilling backward
    32: ((32, 32, 8, 1, 80), (32, 32, 8, 1), (32, 32, 8, 1, 96)),
    64: ((32, 32, 8, 1, 128), (32, 32, 8, 1), (32, 32, 8, 1, 128)),
    80: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    96: ((32, 32, 8, 1, 168), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 32, 8, 1), (16, 16, 8, 1), (32, 32, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_SCAN_LIMIT = 16384  # entries of kv_ids that every key tile reads; beyond it an index is sorted once
_LOG2E = 1.4426950408889634
LOG2E = tl.constexpr(_LOG2E)
LN2 = tl.constexpr(1 / _LOG2E)
CHUNK = tl.constexpr(1024)  # entries of kv_ids that are looked at together

# None of these may choose a kernel: lengths change with every batch. Strides of rows are in units of 8 elements, which
# tells the compiler that rows are aligned for 16-byte accesses.
_VARYING = (
    *("scale", "heads", "heads_kv", "rows_q", "rows_k", "sequences_q", "sequences_k", "segments"),
    *("stride_q", "stride_k", "stride_v", "stride_g", "stride_cu", "stride_cu_q", "stride_cu_k"),
)


@triton.jit
def _tile(cu, stride_cu, sequences, rows, BLOCK: tl.constexpr):
    """What this program owns: (sequence, first row, number of rows); the tail is the sequence after the last."""
    tile = tl.program_id(0)
    low = tile * 0
    high = low + sequences
    while low < high:  # the last s with cu[s] // BLOCK + s <= tile
        middle = (low + high + 1) // 2
        reached = tl.load(cu + middle * stride_cu).to(tl.int32) // BLOCK + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    start = tl.load(cu + low * stride_cu).to(tl.int32)
    end = tl.load(cu + (low + 1) * stride_cu, mask=low < sequences, other=rows).to(tl.int32)
    first = start + (tile - start // BLOCK - low) * BLOCK
    return low, first, tl.minimum(end - first, BLOCK)


@triton.jit
def _rows_of(cu, stride_cu, sequence, exists):
    """First row of a sequence and the row after its last; 0, 0 if it does not exist."""
    start = tl.load(cu + sequence * stride_cu, mask=exists, other=0).to(tl.int32)
    return start, tl.load(cu + (sequence + 1) * stride_cu, mask=exists, other=0).to(tl.int32)


@triton.jit
def _segment(kv_ids, segment_bias, cu_k, stride_cu_k, s, m, segments, exists):
    """Segment m of query sequence s: its first key, the key after its last, and its bias in base 2."""
    j = s
    if kv_ids is not None:
        j = tl.load(kv_ids + s * segments + m, mask=exists, other=-1).to(tl.int32)
    start, end = _rows_of(cu_k, stride_cu_k, j, exists & (j >= 0))
    bias = 0.0
    if segment_bias is not None:
        bias = tl.load(segment_bias + s * segments + m, mask=exists, other=0.0).to(tl.float32) * LOG2E
    return start, end, bias


@triton.jit
def _key_bias(key_bias, first, count, BLOCK: tl.constexpr):
    """What is added to the logits of BLOCK keys, in base 2: their bias, and -inf to those that are not there."""
    n = tl.arange(0, BLOCK)
    bias = tl.where(n < count, 0.0, float("-inf"))
    if key_bias is not None:
        bias += tl.load(key_bias + first + n, mask=n < count, other=0.0).to(tl.float32) * LOG2E
    return bias


@triton.jit
def _base(lse, h, rows_q, first, count, BLOCK: tl.constexpr):
    """The lse of BLOCK queries in base 2; +inf, so that every share is 0, to those without keys or not there."""
    m = tl.arange(0, BLOCK)
    value = tl.load(lse + tl.cast(h, tl.int64) * rows_q + first + m, mask=m < count, other=float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def _uses(kv_ids, starts, j, sequences_q, sequences_k, segments):
    """The first use of key sequence j and the end of them: numbers of entries of kv_ids, or places in their order."""
    exists = j < sequences_k  # nobody uses the tail
    if starts is not None:
        use = tl.load(starts + j, mask=exists, other=0).to(tl.int32)
        stop = tl.load(starts + j + 1, mask=exists, other=0).to(tl.int32)
    elif kv_ids is not None:
        stop = tl.where(exists, sequences_q * segments, 0)
        use = _next_use(kv_ids, starts, j, j * 0, stop)
    else:
        use = j
        stop = tl.where(exists, j + 1, j)
    return use, stop


@triton.jit
def _next_use(kv_ids, starts, j, use, stop):
    """The first use at or after ``use``, or ``stop``."""
    found = use
    if kv_ids is not None and starts is None:
        found = stop
        while (use < stop) & (found == stop):
            at = use + tl.arange(0, CHUNK)
            ids = tl.load(kv_ids + at, mask=at < stop, other=-1).to(tl.int32)
            found = tl.min(tl.where(ids == j, at, stop), 0)
            use += CHUNK
    return found


@triton.jit
def _user(order, segment_bias, cu_q, stride_cu_q, use, segments, SHARED: tl.constexpr):
    """Who uses the keys: the first row of the query sequence, the row after its last, and the segment's bias."""
    entry = use
    if order is not None:
        entry = tl.load(order + use).to(tl.int32)
    s = entry
    if SHARED:
        s = entry // segments
    start, end = _rows_of(cu_q, stride_cu_q, s, True)
    bias = 0.0
    if segment_bias is not None:
        bias = tl.load(segment_bias + entry).to(tl.float32) * LOG2E
    return start, end, bias


@triton.jit
def _load(
    x, rest, first, stride, head, count,
    ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Columns FROM .. FROM + WIDTH of one head of ROWS rows; 0 beyond count and beyond E. x, rest: see `_streamed`."""
    if isinstance(x, tl.tensor_descriptor):
        tile = load_ragged(rest if FROM else x, first, count, [head, 0, FROM], ragged_dim=1).reshape(ROWS, WIDTH)
    else:
        rows, columns = tl.arange(0, ROWS), FROM + tl.arange(0, WIDTH)
        mask = (rows < count)[:, None]
        if FROM + WIDTH > E:
            mask = mask & (columns < E)[None, :]
        at = x + tl.cast(first, tl.int64) * stride * 8 + head * E  # 64 bits: rows * stride may pass 2^31
        tile = tl.load(at + rows[:, None] * (stride * 8) + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _store(x, first, head, heads, count, value, FROM: tl.constexpr, E: tl.constexpr):
    """The inverse of `_load`, to a contiguous (T, heads, E)."""
    rows, columns = tl.arange(0, value.shape[0]), FROM + tl.arange(0, value.shape[1])
    mask = (rows < count)[:, None]
    if FROM + value.shape[1] > E:
        mask = mask & (columns < E)[None, :]
    at = x + tl.cast(first, tl.int64) * heads * E + head * E
    tl.store(at + rows[:, None] * (heads * E) + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # the default for fp32 is tf32, which has 10 bits


@triton.jit(do_not_specialize=_VARYING)
def attention_forward(
    q, k, k_rest, v, v_rest, o, lse, cu_q, cu_k, kv_ids, segment_bias, key_bias,
    scale, rows_q, sequences_q, segments,
    stride_q, stride_k, stride_v, stride_cu_q, stride_cu_k,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    h, heads = tl.program_id(1), tl.num_programs(1)
    s, first, count = _tile(cu_q, stride_cu_q, sequences_q, rows_q, BLOCK_M)
    if count <= 0:
        return
    exists = s < sequences_q
    q1 = _load(q, None, first, stride_q, h, count, BLOCK_M, 0, E1, E)
    acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
    if E2:
        q2 = _load(q, None, first, stride_q, h, count, BLOCK_M, E1, E2, E)
        acc2 = tl.zeros((BLOCK_M, E2), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for m in range(segments if kv_ids is not None else 1):
        start, end, bias = _segment(kv_ids, segment_bias, cu_k, stride_cu_k, s, m, segments, exists)
        for n in range(start, end, BLOCK_N):
            k1 = _load(k, k_rest, n, stride_k, h // GROUP, end - n, BLOCK_N, 0, E1, E)
            logits = _dot(q1, k1.T)
            if E2:
                k2 = _load(k, k_rest, n, stride_k, h // GROUP, end - n, BLOCK_N, E1, E2, E)
                logits = _dot(q2, k2.T, logits)
            logits = logits * (scale * LOG2E) + (_key_bias(key_bias, n, end - n, BLOCK_N) + bias)[None, :]
            higher = tl.maximum(top, tl.max(logits, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # biases may hide every key so far
            p = tl.exp2(logits - safe[:, None])
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(p, 1)
            top = higher
            v1 = _load(v, v_rest, n, stride_v, h // GROUP, end - n, BLOCK_N, 0, E1, E)
            acc1 = _dot(p.to(v1.dtype), v1, acc1 * shrink[:, None])
            if E2:
                v2 = _load(v, v_rest, n, stride_v, h // GROUP, end - n, BLOCK_N, E1, E2, E)
                acc2 = _dot(p.to(v2.dtype), v2, acc2 * shrink[:, None])
    seen, total = total > 0, tl.where(total > 0, total, 1.0)
    share = tl.where(seen, 1 / total, 0.0)
    _store(o, first, h, heads, count, acc1 * share[:, None], 0, E)
    if E2:
        _store(o, first, h, heads, count, acc2 * share[:, None], E1, E)
    value = tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf"))
    rows = tl.arange(0, BLOCK_M)
    at = lse + tl.cast(h, tl.int64) * rows_q + first + rows
    tl.store(at, tl.where(exists, value, 0.0), mask=rows < count)


@triton.jit(do_not_specialize=_VARYING)
def attention_scores(
    q, q_rest, k, lse, scores, cu_q, cu_k, kv_ids, order, starts, segment_bias, key_bias,
    scale, heads, rows_q, rows_k, sequences_q, sequences_k, segments,
    stride_q, stride_k, stride_cu_q, stride_cu_k,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, GROUP: tl.constexpr,
    FIRST_ONLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    j, first, count = _tile(cu_k, stride_cu_k, sequences_k, rows_k, BLOCK_N)
    if count <= 0:
        return
    received = tl.zeros((BLOCK_N,), tl.float32)
    uses = 0
    key = _key_bias(key_bias, first, count, BLOCK_N)
    use, stop = _uses(kv_ids, starts, j, sequences_q, sequences_k, segments)
    while use < stop:
        start, end, bias = _user(order, segment_bias, cu_q, stride_cu_q, use, segments, kv_ids is not None)
        if FIRST_ONLY:
            end = tl.minimum(end, start + 1)
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for h in range(heads):
            k1 = _load(k, None, first, stride_k, h // GROUP, count, BLOCK_N, 0, E1, E)
            if E2:
                k2 = _load(k, None, first, stride_k, h // GROUP, count, BLOCK_N, E1, E2, E)
            for m in range(start, end, BLOCK_M):
                q1 = _load(q, q_rest, m, stride_q, h, end - m, BLOCK_M, 0, E1, E)
                logits = _dot(k1, q1.T)
                if E2:
                    q2 = _load(q, q_rest, m, stride_q, h, end - m, BLOCK_M, E1, E2, E)
                    logits = _dot(k2, q2.T, logits)
                base = _base(lse, h, rows_q, m, end - m, BLOCK_M)
                p = tl.exp2(logits * (scale * LOG2E) + (key + bias)[:, None] - base[None, :])
                mean += tl.sum(p, 1)
        received += mean / (heads * tl.maximum(end - start, 1)).to(tl.float32)
        uses += tl.where(end > start, 1, 0)
        use = _next_use(kv_ids, starts, j, use + 1, stop)
    n = tl.arange(0, BLOCK_N)
    tl.store(scores + first + n, received / tl.maximum(uses, 1).to(tl.float32), mask=n < count)


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_queries(
    grad, grad_lse, q, k, k_rest, v, v_rest, o, lse, delta, dq, segment_sums,
    cu_q, cu_k, kv_ids, segment_bias, key_bias,
    scale, rows_q, sequences_q, segments,
    stride_g, stride_q, stride_k, stride_v, stride_cu_q, stride_cu_k,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    h, heads = tl.program_id(1), tl.num_programs(1)
    s, first, count = _tile(cu_q, stride_cu_q, sequences_q, rows_q, BLOCK_M)
    if count <= 0:
        return
    exists = s < sequences_q
    there = exists & (tl.arange(0, BLOCK_M) < count)  # nothing of the tail is read
    live = tl.where(exists, count, 0)
    q1 = _load(q, None, first, stride_q, h, live, BLOCK_M, 0, E1, E)
    g1 = _load(grad, None, first, stride_g, h, live, BLOCK_M, 0, E1, E)
    o1 = _load(o, None, first, heads * (E // 8), h, live, BLOCK_M, 0, E1, E)
    d = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
    if E2:
        q2 = _load(q, None, first, stride_q, h, live, BLOCK_M, E1, E2, E)
        g2 = _load(grad, None, first, stride_g, h, live, BLOCK_M, E1, E2, E)
        o2 = _load(o, None, first, heads * (E // 8), h, live, BLOCK_M, E1, E2, E)
        d += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
        acc2 = tl.zeros((BLOCK_M, E2), tl.float32)
    at = tl.cast(h, tl.int64) * rows_q + first + tl.arange(0, BLOCK_M)
    if grad_lse is not None:
        d -= tl.load(grad_lse + at, mask=there, other=0.0).to(tl.float32)
    base = _base(lse, h, rows_q, first, live, BLOCK_M)
    d = tl.where(base == float("inf"), 0.0, d)  # no keys: every share is 0, whatever the gradients say
    tl.store(delta + at, d, mask=there)
    for m in range(segments if kv_ids is not None else 1):
        start, end, bias = _segment(kv_ids, segment_bias, cu_k, stride_cu_k, s, m, segments, exists)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for n in range(start, end, BLOCK_N):
            k1 = _load(k, k_rest, n, stride_k, h // GROUP, end - n, BLOCK_N, 0, E1, E)
            v1 = _load(v, v_rest, n, stride_v, h // GROUP, end - n, BLOCK_N, 0, E1, E)
            logits = _dot(q1, k1.T)
            dp = _dot(g1, v1.T)
            if E2:
                k2 = _load(k, k_rest, n, stride_k, h // GROUP, end - n, BLOCK_N, E1, E2, E)
                v2 = _load(v, v_rest, n, stride_v, h // GROUP, end - n, BLOCK_N, E1, E2, E)
                logits = _dot(q2, k2.T, logits)
                dp = _dot(g2, v2.T, dp)
            key = _key_bias(key_bias, n, end - n, BLOCK_N) + bias
            ds = tl.exp2(logits * (scale * LOG2E) + key[None, :] - base[:, None]) * (dp - d[:, None])
            if segment_sums is not None:
                sums += tl.sum(ds, 1)
            acc1 = _dot(ds.to(k1.dtype), k1, acc1)
            if E2:
                acc2 = _dot(ds.to(k2.dtype), k2, acc2)
        if segment_sums is not None:
            number = (tl.program_id(0).to(tl.int64) * heads + h) * segments + m
            tl.store(segment_sums + number, tl.sum(sums))
    _store(dq, first, h, heads, count, acc1 * scale, 0, E)
    if E2:
        _store(dq, first, h, heads, count, acc2 * scale, E1, E)


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_keys(
    grad, grad_rest, q, q_rest, k, v, lse, delta, dk, dv, key_sums,
    cu_q, cu_k, kv_ids, order, starts, segment_bias, key_bias,
    scale, rows_q, rows_k, sequences_q, sequences_k, segments,
    stride_g, stride_q, stride_k, stride_v, stride_cu_q, stride_cu_k,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1), tl.num_programs(1)
    j, first, count = _tile(cu_k, stride_cu_k, sequences_k, rows_k, BLOCK_N)
    if count <= 0:
        return
    live = tl.where(j < sequences_k, count, 0)
    k1 = _load(k, None, first, stride_k, head, live, BLOCK_N, 0, E1, E)
    v1 = _load(v, None, first, stride_v, head, live, BLOCK_N, 0, E1, E)
    dk1, dv1 = tl.zeros((BLOCK_N, E1), tl.float32), tl.zeros((BLOCK_N, E1), tl.float32)
    if E2:
        k2 = _load(k, None, first, stride_k, head, live, BLOCK_N, E1, E2, E)
        v2 = _load(v, None, first, stride_v, head, live, BLOCK_N, E1, E2, E)
        dk2, dv2 = tl.zeros((BLOCK_N, E2), tl.float32), tl.zeros((BLOCK_N, E2), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    key = _key_bias(key_bias, first, live, BLOCK_N)
    use, stop = _uses(kv_ids, starts, j, sequences_q, sequences_k, segments)
    while use < stop:
        start, end, bias = _user(order, segment_bias, cu_q, stride_cu_q, use, segments, kv_ids is not None)
        for g in range(GROUP):
            h = head * GROUP + g
            for m in range(start, end, BLOCK_M):
                q1 = _load(q, q_rest, m, stride_q, h, end - m, BLOCK_M, 0, E1, E)
                g1 = _load(grad, grad_rest, m, stride_g, h, end - m, BLOCK_M, 0, E1, E)
                logits = _dot(k1, q1.T)
                dp = _dot(v1, g1.T)
                if E2:
                    q2 = _load(q, q_rest, m, stride_q, h, end - m, BLOCK_M, E1, E2, E)
                    g2 = _load(grad, grad_rest, m, stride_g, h, end - m, BLOCK_M, E1, E2, E)
                    logits = _dot(k2, q2.T, logits)
                    dp = _dot(v2, g2.T, dp)
                base = _base(lse, h, rows_q, m, end - m, BLOCK_M)
                rows = tl.arange(0, BLOCK_M)
                d = tl.load(delta + tl.cast(h, tl.int64) * rows_q + m + rows, mask=rows < end - m, other=0.0)
                p = tl.exp2(logits * (scale * LOG2E) + (key + bias)[:, None] - base[None, :])
                ds = p * (dp - d[None, :])
                if key_sums is not None:
                    sums += tl.sum(ds, 1)
                dv1 = _dot(p.to(g1.dtype), g1, dv1)
                dk1 = _dot(ds.to(q1.dtype), q1, dk1)
                if E2:
                    dv2 = _dot(p.to(g2.dtype), g2, dv2)
                    dk2 = _dot(ds.to(q2.dtype), q2, dk2)
        use = _next_use(kv_ids, starts, j, use + 1, stop)
    _store(dk, first, head, heads, count, dk1 * scale, 0, E)
    _store(dv, first, head, heads, count, dv1, 0, E)
    if E2:
        _store(dk, first, head, heads, count, dk2 * scale, E1, E)
        _store(dv, first, head, heads, count, dv2, E1, E)
    if key_sums is not None:
        n = tl.arange(0, BLOCK_N)
        tl.store(key_sums + head.to(tl.int64) * rows_k + first + n, sums, mask=n < count)


@triton.jit
def _add_segment_sums(
    sums, out, cu_q, stride_cu_q, s, heads, segments, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of query sequence s, over its tiles and the heads."""
    start, end = _rows_of(cu_q, stride_cu_q, s, True)
    tile = (start // BLOCK_M + s).to(tl.int64)
    lines = tl.cdiv(end - start, BLOCK_M) * heads
    n = tl.arange(0, BLOCK)
    for m in range(0, segments, BLOCK):
        total = tl.zeros((BLOCK,), tl.float32)
        for line in range(0, lines, BLOCK):
            at = (tile * heads + line + n)[:, None] * segments + (m + n)[None, :]
            mask = (line + n < lines)[:, None] & (m + n < segments)[None, :]
            total += tl.sum(tl.load(sums + at, mask=mask, other=0.0), 0)
        tl.store(out + s.to(tl.int64) * segments + m + n, total, mask=m + n < segments)


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_biases(
    segment_sums, key_sums, dsegment, dkey, cu_q,
    heads, heads_kv, rows_k, sequences_q, segments,
    stride_cu_q,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    keys_from = 0
    if dsegment is not None:
        keys_from = sequences_q
        if program < sequences_q:
            _add_segment_sums(segment_sums, dsegment, cu_q, stride_cu_q, program, heads, segments, BLOCK_M, BLOCK)
    if dkey is not None:  # noqa: SIM102  decided when it is compiled, the next when it runs
        if program >= keys_from:
            at = (program - keys_from).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for h in range(heads_kv):
                total += tl.load(key_sums + tl.cast(h, tl.int64) * rows_k + at, mask=at < rows_k, other=0.0)
            tl.store(dkey + at, total, mask=at < rows_k)


def _widths(e: int) -> tuple[int, int]:
    """A head's width as one or two powers of two: 80 is 64 + 16, where 128 would be 60 % more work for tensor cores."""
    whole = max(16, triton.next_power_of_2(e))
    rest = max(16, triton.next_power_of_2(e - whole // 2))
    return (whole // 2, rest) if 32 < e <= 128 and rest < whole // 2 else (whole, 0)  # above 128 two parts spill


def _rows(x: Tensor) -> Tensor:
    """x (T, H, E) itself if it suits `_load`, as views of one projection do: rows in one piece and aligned."""
    fits = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) % 8 == 0 and x.stride(0) < 1 << 24
    return x if fits and address(x) % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _streamed(x: Tensor, rows: str, blocks: dict[str, Any]) -> tuple[Any, Any]:
    """Where `_load` takes tiles of x (T, H, E) from, blocks[rows] high: x and None, or descriptors of its two parts.

    Descriptors, which copy a tile by one instruction of one thread, where the device has them and for 16 bits; pointers
    for fp32 and for sm_120, which has sm_86's configurations. They are of the whole x and made here, in some 4 us of
    Python each; `load_ragged` tells each load where its sequence ends, beyond which the hardware puts zeros. Made
    in the kernel they would take some 100 instructions, a fence and 128 bytes of workspace for every sequence.
    """
    if x.dtype == torch.float32 or not 90 <= architecture() < 120:
        return x, None
    x = x if x.shape[0] else x.new_empty((1, *x.shape[1:]))  # a descriptor of nothing would have no address
    parts = [
        create_ragged_descriptor(x.transpose(0, 1), (1, blocks[rows], width), ragged_dim=1) if width else None
        for width in (blocks["E1"], blocks["E2"])
    ]
    return parts[0], parts[1]


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _configuration(which: int, q: Tensor, key_scores: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel: 0 forward or scores, 1 backward for queries, 2 backward for keys."""
    e1, e2 = _widths(q.shape[2])
    width = min(w for w in _TABLE if w >= e1 + e2)
    device = architecture()
    device = 86 if device in (86, 89) or device >= 120 else min(device // 10 * 10, 100)
    entry = _EXCEPTIONS.get((device, width, which), _TABLE[width][which])
    if q.dtype == torch.float32:
        entry = _FP32[width][which]
    block_m, block_n, num_warps, num_stages, *registers = entry
    if key_scores == "cls":
        block_m = 16  # one row of it counts
    chosen = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
    chosen |= {"maxnreg": registers[0]} if registers else {}
    kernel = (attention_forward, attention_backward_queries, attention_backward_keys)[which]
    chosen = configured(attention_scores if key_scores else kernel, chosen, q.dtype, q.shape[2])
    options = {name: chosen.pop(name) for name in OPTIONS if name in chosen}
    return dict(E=q.shape[2], E1=e1, E2=e2, **chosen), options


def _index(kv_ids: Tensor | None, sequences_k: int) -> tuple[Tensor | None, Tensor | None]:
    """For many entries: their numbers sorted by key sequence, and where each key sequence's begin."""
    if kv_ids is None or kv_ids.numel() <= _SCAN_LIMIT:
        return None, None
    found, order = kv_ids.reshape(-1).sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(sequences_k + 1, dtype=found.dtype, device=found.device))


def _check(q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise RuntimeError(f'the attention kernel takes bf16, fp16 and fp32, not {q.dtype}; use impl="reference".')


def attention(
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
    _check(q)
    (t_q, h, _), (t_k, h_kv, _) = q.shape, k.shape
    s_q, s_k = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
    q, k, v = _rows(q), _rows(k), _rows(v)
    kv_ids, segment_bias, key_bias = _plain(kv_ids), _plain(segment_bias), _plain(key_bias)
    segments = 1 if kv_ids is None else kv_ids.numel() // max(s_q, 1)
    strides = q.stride(0) // 8, k.stride(0) // 8, v.stride(0) // 8
    stride_cu = cu_seqlens_q.stride(0), cu_seqlens_k.stride(0)
    o, lse = q.new_empty(q.shape), q.new_empty((h, t_q), dtype=torch.float32)
    blocks, options = _configuration(0, q)
    launch(
        attention_forward,
        (t_q // blocks["BLOCK_M"] + s_q + 1, h),
        *(q, *_streamed(k, "BLOCK_N", blocks), *_streamed(v, "BLOCK_N", blocks), o, lse),
        *(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias, key_bias),
        *(scale, t_q, s_q, segments, *strides, *stride_cu),
        GROUP=h // h_kv,
        **blocks,
        **options,
    )
    scores = q.new_empty((t_k if key_scores else 0,), dtype=torch.float32)
    if key_scores:
        order, starts = _index(kv_ids, s_k)
        blocks, options = _configuration(0, q, key_scores)
        launch(
            attention_scores,
            (t_k // blocks["BLOCK_N"] + s_k + 1,),
            *(*_streamed(q, "BLOCK_M", blocks), k, lse, scores),
            *(cu_seqlens_q, cu_seqlens_k, kv_ids, order, starts, segment_bias, key_bias),
            *(scale, h, t_q, t_k, s_q, s_k, segments, *strides[:2], *stride_cu),
            GROUP=h // h_kv,
            FIRST_ONLY=key_scores == "cls",
            **blocks,
            **options,
        )
    return o, lse, scores


def attention_backward(
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
    _check(q)
    (t_q, h, _), (t_k, h_kv, _) = q.shape, k.shape
    s_q, s_k = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
    grad = q.new_zeros(q.shape) if grad is None else grad
    grad, q, k, v, o, lse = _rows(grad), _rows(q), _rows(k), _rows(v), o.contiguous(), lse.contiguous()
    grad_lse, kv_ids = _plain(grad_lse), _plain(kv_ids)
    segment_bias, key_bias = _plain(segment_bias), _plain(key_bias)
    segments = 1 if kv_ids is None else kv_ids.numel() // max(s_q, 1)
    strides = grad.stride(0) // 8, q.stride(0) // 8, k.stride(0) // 8, v.stride(0) // 8
    stride_cu = cu_seqlens_q.stride(0), cu_seqlens_k.stride(0)
    empty = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), empty(h, t_q)
    of_segments, of_keys = (bias_grad and bias is not None for bias in (segment_bias, key_bias))

    blocks, options = _configuration(1, q)
    block_m = blocks["BLOCK_M"]
    tiles = t_q // block_m + s_q + 1
    segment_sums = empty(tiles, h, segments) if of_segments else None
    launch(
        attention_backward_queries,
        (tiles, h),
        *(grad, grad_lse, q, *_streamed(k, "BLOCK_N", blocks), *_streamed(v, "BLOCK_N", blocks)),
        *(o, lse, delta, dq, segment_sums),
        *(cu_seqlens_q, cu_seqlens_k, kv_ids, segment_bias, key_bias),
        *(scale, t_q, s_q, segments, *strides, *stride_cu),
        GROUP=h // h_kv,
        **blocks,
        **options,
    )
    blocks, options = _configuration(2, q)
    order, starts = _index(kv_ids, s_k)
    key_sums = empty(h_kv, t_k) if of_keys else None
    launch(
        attention_backward_keys,
        (t_k // blocks["BLOCK_N"] + s_k + 1, h_kv),
        *(*_streamed(grad, "BLOCK_M", blocks), *_streamed(q, "BLOCK_M", blocks), k, v, lse, delta, dk, dv, key_sums),
        *(cu_seqlens_q, cu_seqlens_k, kv_ids, order, starts, segment_bias, key_bias),
        *(scale, t_q, t_k, s_q, s_k, segments, *strides, *stride_cu),
        GROUP=h // h_kv,
        **blocks,
        **options,
    )
    dsegment = empty(s_q, segments) if of_segments else empty(0)
    dkey = empty(t_k) if of_keys else empty(0)
    if of_segments or of_keys:
        sums = configured(attention_backward_biases, dict(BLOCK=32, num_warps=1), q.dtype, q.shape[2])
        launch(
            attention_backward_biases,
            (s_q * of_segments + triton.cdiv(t_k, sums["BLOCK"]) * of_keys,),
            *(segment_sums, key_sums, dsegment if of_segments else None, dkey if of_keys else None, cu_seqlens_q),
            *(h, h_kv, t_k, s_q, segments, cu_seqlens_q.stride(0)),
            BLOCK_M=block_m,
            **sums,
        )
    return dq, dk, dv, dsegment, dkey


torch.library.register_kernel("smaug::attention", "cuda", attention)
torch.library.register_kernel("smaug::attention_backward", "cuda", attention_backward)
