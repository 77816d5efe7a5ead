"""How many kernels a function would start on a GPU, counted on any device.

    python -m benchmarks.launches            # the step of recipe smaug, ours and eager; --size base

A call of aten counts 1, unless it is a view or only allocates; so does a tensor made of host numbers, as it would be
copied to the GPU. An op of smaug counts what its Triton launcher starts when it is given the same arguments on meta.
Not counted are what one call of aten starts beyond its first kernel (a sort starts several) and what only a GPU would
do (CUDA's autocast runs norms in fp32 and casts around them).

Calls are kept in two parts. **Dense** is what `F.linear`, `F.layer_norm` and `F.gelu` run, forward and backward, with
the casts of autocast and the sums of their gradients, and the addition of a linear layer's result to a tensor of its
own shape, which is what a residual connection is. **Outside** is all the rest. Both hold whoever wrote the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from smaug.kernels import launch
from smaug.ops.warmup import launchers

# Besides views: they allocate, rename what is there, or have no tensor.
ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "promote_types"}
DENSE = (F.linear, F.layer_norm, F.gelu)
ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Launches(TorchDispatchMode):
    """Counts by name, `dense` and `outside`, of what runs while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self._in_dense = False  # forward: within a dense function
        self._nodes: set[int] = set()  # backward: sequence numbers of the autograd nodes that these have made
        self._forward = _Forward(self)

    def __enter__(self) -> Launches:
        self._forward.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._forward.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()  # None in the forward
        dense = self._in_dense if node is None else node._sequence_nr() in self._nodes
        found = self.dense if dense else self.outside
        if func in launchers():
            found.update(_started(func, args, kwargs))
        else:
            name = func._schema.name.removeprefix("aten::")
            if name == "lift_fresh" or not (func.is_view or name in ALLOCATES):
                found[name] += 1
        return func(*args, **kwargs)


class _Forward(TorchFunctionMode):
    """Tells `Launches` when a dense function runs and which autograd nodes it made."""

    def __init__(self, counter: Launches) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (func in DENSE or (func in ADDS and self._is_residual(*args))):
            return func(*args, **kwargs)
        first = torch._C._autograd._get_sequence_nr()
        self.counter._in_dense = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.counter._in_dense = False
        self.counter._nodes.update(range(first, torch._C._autograd._get_sequence_nr()))
        if func is F.linear:
            result.of_linear = True
        return result

    @staticmethod
    def _is_residual(a: Any, b: Any) -> bool:
        pair = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        return pair and (hasattr(a, "of_linear") or hasattr(b, "of_linear"))


def _started(func: Any, args: Any, kwargs: Any) -> Counter[str]:
    """What the Triton launcher of an op of smaug starts, the calls of aten in it included."""

    def on_meta(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, on_meta, (args, kwargs))
    with launch.record() as launched, Launches() as inner:
        launchers()[func](*args, **kwargs)
    return inner.outside + inner.dense + Counter(f"smaug::{each.name}" for each in launched if all(each.grid))


def launches(function: Callable[[], object]) -> int:
    """Kernels that a call of the function would start on a GPU, dense or not."""
    with Launches() as counter:
        function()
    return counter.dense.total() + counter.outside.total()


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as in the published code of MAE, EViT and BERT; mask is bool, True where a key is, or is added."""
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ v


def table(name: str = "smaug", size: str = "tiny", pairs: int = 16) -> dict[str, Launches]:
    """Forward and backward of a training step on the CPU, as `--fast` has it: under bf16 autocast, without AdamW."""
    from benchmarks.bench_train_step import VOCABULARY, batch_of, loss_of  # imports pytest, which others need not have
    from smaug.recipe import load
    from smaug.run import build

    recipe = load(name, size)
    batch = batch_of(recipe, pairs, torch.device("cpu"))
    model = build(recipe, VOCABULARY, "auto")
    found = {}
    for label, provider, attention in (
        ("ours", "fast", F.scaled_dot_product_attention),
        ("eager", "eager", F.scaled_dot_product_attention),
        ("eager, attention written out", "eager", written_out),
    ):
        loss = loss_of(provider, model, recipe, batch)
        model.zero_grad()
        with mock.patch.object(F, "scaled_dot_product_attention", attention), Launches() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            value.backward()
        found[label] = counter
    return found


def main(name: str = "smaug", size: str = "tiny", pairs: int = 16) -> None:
    found = table(name, size, pairs)
    ours = found["ours"].outside.total()
    print("| | total | dense | outside | outside / ours |\n|---|---|---|---|---|")
    for label, counter in found.items():
        dense, outside = counter.dense.total(), counter.outside.total()
        print(f"| {label} | {dense + outside} | {dense} | {outside} | {outside / ours:.2f} |")


if __name__ == "__main__":
    tyro.cli(main)
