"""Tokens out of a full grid by their ids, and back into it with something in every hole."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from smaug.ops.implementation import reference_of, refuse


def _slots(ids: Tensor, cu_seqlens: Tensor | None, count: int, length: int) -> Tensor:
    """For every row of ids its slot in (count * length,); count * length where it has none (id -1, or in the tail)."""
    none = count * length
    flat = ids.reshape(-1).long()
    row = torch.arange(flat.shape[0], device=ids.device)
    if cu_seqlens is None:
        sequence = row // max(ids.shape[1], 1)
        valid = flat >= 0
    else:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
        valid = (flat >= 0) & (row < cu_seqlens[-1])
    return torch.where(valid & (flat < length), sequence * length + flat, none)


@torch.library.custom_op("smaug::gather_tokens", mutates_args=())
def _gather(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count, length, d = x.shape
    slots = _slots(ids, cu_seqlens, count, length)
    if count * length == 0:
        return x.new_zeros((*ids.shape, d))
    out = x.reshape(-1, d).index_select(0, slots.clamp(max=count * length - 1))
    return out.masked_fill_((slots == count * length)[:, None], 0).view(*ids.shape, d)


@_gather.register_fake
def _(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[2]))


@torch.library.custom_op("smaug::scatter_tokens", mutates_args=())
def _scatter(x: Tensor, ids: Tensor, length: int, fill: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    d = x.shape[-1]
    count = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # one row more than the grid takes what has no slot
    out = x.new_zeros((count * length + 1, d)) if fill is None else fill.to(x.dtype).repeat(count * length + 1, 1)
    out.index_copy_(0, _slots(ids, cu_seqlens, count, length), x.reshape(-1, d))
    return out[:-1].view(count, length, d)


@_scatter.register_fake
def _(x: Tensor, ids: Tensor, length: int, fill: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    count = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((count, length, x.shape[-1]))


@torch.library.custom_op("smaug::scatter_fill_grad", mutates_args=())
def _fill_grad(grad: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count, length, d = grad.shape
    acc = torch.promote_types(grad.dtype, torch.float32)
    hole = grad.new_ones(count * length + 1, dtype=acc)
    hole[_slots(ids, cu_seqlens, count, length)] = 0
    return torch.mv(grad.reshape(-1, d).to(acc).t(), hole[:-1])


@_fill_grad.register_fake
def _(grad: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return grad.new_empty((grad.shape[2],), dtype=torch.promote_types(grad.dtype, torch.float32))


def _gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, ids, cu_seqlens = inputs
    ctx.save_for_backward(ids, cu_seqlens)
    ctx.length = x.shape[1]


def _gather_backward(ctx: Any, grad: Tensor, *, scatter: CustomOpDef) -> tuple[Any, ...]:
    ids, cu_seqlens = ctx.saved_tensors
    return scatter(grad, ids, ctx.length, None, cu_seqlens), None, None


def _scatter_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ids, _, fill, cu_seqlens = inputs
    ctx.save_for_backward(ids, cu_seqlens)
    ctx.fill_dtype = None if fill is None else fill.dtype


def _scatter_backward(ctx: Any, grad: Tensor, *, gather: CustomOpDef, fill_grad: CustomOpDef) -> tuple[Any, ...]:
    ids, cu_seqlens = ctx.saved_tensors
    dx = gather(grad, ids, cu_seqlens) if ctx.needs_input_grad[0] else None
    dfill = None
    if ctx.fill_dtype is not None and ctx.needs_input_grad[3]:
        dfill = fill_grad(grad, ids, cu_seqlens).to(ctx.fill_dtype)
    return dx, None, None, dfill, None


_gather_reference, _scatter_reference, _fill_grad_reference = map(reference_of, (_gather, _scatter, _fill_grad))
_gather.register_autograd(partial(_gather_backward, scatter=_scatter), setup_context=_gather_setup)
_scatter.register_autograd(
    partial(_scatter_backward, gather=_gather, fill_grad=_fill_grad), setup_context=_scatter_setup
)
_gather_reference.register_autograd(partial(_gather_backward, scatter=_scatter_reference), setup_context=_gather_setup)
_scatter_reference.register_autograd(
    partial(_scatter_backward, gather=_gather_reference, fill_grad=_fill_grad_reference), setup_context=_scatter_setup
)


def _check_ids(ids: Tensor, cu_seqlens: Tensor | None, op: str) -> None:
    if cu_seqlens is None and ids.ndim != 2:
        raise ValueError(f"{op}: ids must be (B, K) when there is no cu_seqlens, but is {tuple(ids.shape)}.")
    if cu_seqlens is not None and ids.ndim != 1:
        raise ValueError(
            f"{op}: ids must be (T,), one a packed row, when there is cu_seqlens, but is {tuple(ids.shape)}."
        )


def gather_tokens(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Tokens that stay: x (S, N, D) -> (S, K, D) for ids (S, K), or (T, D) for packed ids (T,) with cu_seqlens.

        out[s, k] = x[s, ids[s, k]]        packed: out[r] = x[s, ids[r]], row r of sequence s of cu_seqlens

    ids int, ascending and unique within a sequence (the backward stores, it does not add). An id of -1 (a [CLS] row),
    one that is N or more, and every row of the tail give zeros and no gradient. Backward: `scatter_tokens` with zeros.
    Memory bound: reads and writes T * D elements. Deterministic, no host read.
    """
    _check_ids(ids, cu_seqlens, "gather_tokens")
    count = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.ndim != 3 or x.shape[0] != count:
        raise ValueError(f"x must be ({count}, N, D), one grid a sequence, but is {tuple(x.shape)}.")
    refuse(impl, "gather_tokens", x)
    return (_gather_reference if impl == "reference" else _gather)(x, ids, cu_seqlens)


def scatter_tokens(
    x: Tensor,
    ids: Tensor,
    length: int,
    fill: Tensor | float = 0,
    cu_seqlens: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Tokens back in their places: x (S, K, D) with ids (S, K), or (T, D), ids (T,), cu_seqlens -> (S, length, D).

        out[s, ids[s, k]] = x[s, k], and fill everywhere else

    fill  a number or (D,), such as a mask token; its gradient is the sum over the holes, in fp32.
    ids int, ascending and unique within a sequence; -1, ``length`` or more, and rows of the tail are dropped and get
    gradient zero. Backward: `gather_tokens`. Memory bound. Deterministic, no host read. MAE, He et al. 2022, decoder.
    """
    _check_ids(ids, cu_seqlens, "scatter_tokens")
    if x.shape[:-1] != ids.shape:
        raise ValueError(f"x {tuple(x.shape)} must have one row for each of ids {tuple(ids.shape)}.")
    if isinstance(fill, Tensor):
        if fill.shape != x.shape[-1:]:
            raise ValueError(f"fill must be a number or ({x.shape[-1]},), but is {tuple(fill.shape)}.")
        hole: Tensor | None = fill
    else:
        hole = None if fill == 0 else x.new_full(x.shape[-1:], fill)
    refuse(impl, "scatter_tokens", x)
    return (_scatter_reference if impl == "reference" else _scatter)(x, ids, length, hole, cu_seqlens)


def _no_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0  # moves rows only


FLOPS = {
    torch.ops.smaug.gather_tokens: _no_flops,
    torch.ops.smaug.gather_tokens_reference: _no_flops,
    torch.ops.smaug.scatter_tokens: _no_flops,
    torch.ops.smaug.scatter_tokens_reference: _no_flops,
    torch.ops.smaug.scatter_fill_grad: _no_flops,
    torch.ops.smaug.scatter_fill_grad_reference: _no_flops,
}
