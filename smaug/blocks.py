"""What is done to every transformer block of a model, in place: compiled, or recomputed in the backward.

Parameters, their names and the state_dict stay as they are. A block is replaced method by method and not wrapped, so
that hooks (those of `fully_shard`, say) stay outside of what is compiled, and pruning can run between its halves.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smaug.model.fusion import FusionBlock
from smaug.model.layers import Block
from smaug.model.model import Model

# The pieces that anybody calls: all of a block, its halves, and what computes for a part of the tokens.
PIECES: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("forward", "attend", "mlp", "end"),
    FusionBlock: ("attend", "project", "see"),
}


def compile_blocks(model: Model, backend: str | Callable[..., Any] = "inductor") -> None:
    """Every transformer block of the model by `torch.compile`: one graph a piece and kind of block, for all lengths.

    A kind is what no batch changes: widths, precision, with or without gradients, whether sequences are of one length.
    Blocks of one kind share a graph, so depth costs no compile time. It compiles when a piece is first called. Call it
    before `checkpoint_blocks`, `fully_shard` and DDP.

    ValueError for a model of impl="reference", whose attention is a Python loop over lengths, and where inductor finds
    no C++ compiler for a model on the CPU.
    """
    if model.impl == "reference":
        raise ValueError("the plain reference cannot be compiled, since it loops over sequences; add --fast")
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a while, which every command would pay

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise ValueError(
                f"--compile needs a C++ compiler such as g++; install one, or leave it out: {error}"
            ) from None
    # Two sizes that are equal by chance in the first batch would be compiled in as equal, and the next would compile
    # anew. There is no such option of torch.compile, so it is set for the process.
    torch.fx.experimental._config.use_duck_shape = False
    # A limit of its own: kinds share the code of a method, and torch's 8 are few for two encoders, a decoder and an
    # evaluation. Beyond it torch raises, as it does for a graph break.
    how: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend, "recompile_limit": 32}
    _replace(model, lambda method: torch.compile(method, **how))


def checkpoint_blocks(model: nn.Module) -> None:
    """Every piece of every transformer block keeps its inputs alone and is computed again in the backward.

    Chen et al. 2016, section 3, by block. Losses and gradients are the same to the bit where the block itself is
    deterministic. Without gradients it changes nothing. Call it after `compile_blocks`.
    """
    _replace(model, _recomputed)


def _recomputed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def recomputed(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*inputs, **options)
        # Blocks draw nothing from torch's generators.
        return checkpoint(method, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return recomputed


def _replace(model: nn.Module, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Each piece of each block by `made(piece)`, made once for all blocks. As a method bound to its block: a copy of
    the model (a teacher, say) gets pieces that are bound to the copies."""
    once = functools.cache(made)
    for block in _blocks(model):
        for name in PIECES[type(block)]:
            setattr(block, name, types.MethodType(once(getattr(block, name).__func__), block))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module) in PIECES)
