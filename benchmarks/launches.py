"""How many kernels a function would start on a GPU, counted on any device.

A call of aten counts 1, unless it is a view or only allocates; an op of smaug counts what its Triton launcher starts
when it is given the same arguments on meta. Not counted are what one call of aten starts beyond its first kernel (a
sort starts several) and what only a GPU would do (CUDA's autocast runs norms in fp32 and casts around them).

Calls are kept in two parts. **Dense** is what `F.linear`, `F.layer_norm` and `F.gelu` run, forward and backward, with
the casts of autocast and the sums of their gradients, and the addition of a linear layer's result to a tensor of its
own shape, which is what a residual connection is. **Outside** is all the rest. Both hold whoever wrote the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.static.cases import LAUNCHERS
from smaug.kernels import launch

# Besides views: they allocate, or rename what is there.
ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
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
        if func in LAUNCHERS:
            found.update(_started(func, args, kwargs))
        elif not func.is_view and func._schema.name.removeprefix("aten::") not in ALLOCATES:
            found[func._schema.name] += 1
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
        LAUNCHERS[func](*args, **kwargs)
    return inner.outside + inner.dense + Counter(f"smaug::{each.name}" for each in launched if all(each.grid))


def launches(function: Callable[[], object]) -> int:
    """Kernels that a call of the function would start on a GPU, dense or not."""
    with Launches() as counter:
        function()
    return counter.dense.total() + counter.outside.total()
