"""Attention over packed sequences: what it means, and the switch to the implementations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from smaug.ops import attention_cpu
from smaug.ops.attention_cpu import read_offsets
from smaug.ops.implementation import refuse
from smaug.tokens import Lengths

# Registered by hand and not by torch.library.custom_op, whose wrappers cost a quarter of a millisecond for each forward
# and backward: more than the attention of a few short sequences. A device without a kernel of its own runs these.
_library = torch.library.Library("smaug", "FRAGMENT")


def _define(name: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    return getattr(torch.ops.smaug, name).default


_attention = _define("attention", attention_cpu.forward)
_attention_backward = _define("attention_backward", attention_cpu.backward)


@torch.library.register_fake("smaug::attention", lib=_library)
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


@torch.library.register_fake("smaug::attention_backward", lib=_library)
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            o, lse, scores = _attention(*inputs)
        q, k, v, cu_q, cu_k, kv_ids, segment_bias, key_bias, scale, _, lengths_q, lengths_k = inputs
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k, kv_ids, segment_bias, key_bias)
        ctx.scale, ctx.lengths = scale, (lengths_q, lengths_k)
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)
        return o, lse, scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None and grad_lse is None:
            return (None,) * 12
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint computes what was saved anew at each look
        segment_bias, key_bias = saved[8:]
        wants = ctx.needs_input_grad
        dq, dk, dv, dsegment, dkey = _attention_backward(
            grad, grad_lse, *saved, ctx.scale, wants[6] or wants[7], *ctx.lengths
        )
        dsegment = dsegment.to(segment_bias.dtype) if wants[6] else None
        dkey = dkey.to(key_bias.dtype) if wants[7] else None
        return dq, dk, dv, None, None, None, dsegment, dkey, *(None,) * 4


def _differentiable(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Attention.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention(*inputs)


_library.impl("attention", torch._disable_dynamo(_differentiable), "Autograd")


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

    impl "auto": on a CPU (`attention_cpu.py`), sequences of one shape or of neighbouring lengths in one call: matrix
    products in chunks that fit the cache or torch's CPU flash kernel, whichever was measured faster. 16-bit products
    round the logits to 16 bits, as eager PyTorch does. "reference": the formula in a loop; reads cu_seqlens on the host
    unless lengths are given. "torch", "flash_attn", "xformers": those kernels, without ids, biases, lse or scores.
    FlashAttention, Dao et al. 2022.
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
        cu_q, cu_k = (read_offsets(c, n).tolist() for c, n in ((cu_seqlens_q, host_q), (cu_seqlens_k, host_k)))
        o, lse, scores = _reference(q, k, v, cu_q, cu_k, pairs, segment_bias, key_bias, scale, key_scores or "")
    elif impl in ("auto", "triton"):
        refuse(impl, "attention", q)
        # What the dispatcher would call first is called at once; a compiler has to see the op itself.
        call = _attention if torch.compiler.is_compiling() else _differentiable
        o, lse, scores = call(
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
            return np.diff(read_offsets(cu, [int(n) for n in host])).astype(float)
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
