"""Compiling kernels before they are needed, so that no training step waits for a compiler."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smaug import kernels
from smaug.ops.implementation import KERNELS


@functools.cache
def launchers() -> dict[Any, Callable[..., Any]]:
    modules = {name: importlib.import_module(f"smaug.kernels.{name}") for name in KERNELS}
    return {
        getattr(torch.ops.smaug, op).default: getattr(modules[name], op) for name, ops in KERNELS.items() for op in ops
    }


class OnKernels(TorchDispatchMode):
    """Sends the registered ops to their launchers, whatever the device of the tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return launchers().get(func, func)(*args, **(kwargs or {}))


class _Address:
    """What the compiler looks at of a tensor: its type, and whether 16 divides its address. Memory comes in blocks that
    start at multiples of 512 bytes, so that a view's offset decides."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self._offset = x.dtype, int(x.storage_offset()) * x.element_size()

    def data_ptr(self) -> int:
        return self._offset


class _Parameters(TorchDispatchMode):
    """Remembers the real tensors that the block may leave a gradient at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.requires_grad and x.is_leaf:
                self.seen[id(x)] = x
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def warmup() -> Generator[list[str], None, None]:
    """Compiles the kernels that the block would start, and runs nothing -> their names, filled in at its end.

        with ops.warmup():
            loss, _ = training_step(model, recipe, batch)  # under the autocast of the training
            loss.backward()

    Inside, tensors have shapes and types but no values: real ones go in and stay as they are, what comes out is of no
    use, parameters get no gradient, and reading a value on the host raises. A kernel is compiled once for each
    combination of types and widths; lengths and batch sizes need no second block, a stage that prunes otherwise does.
    Compiled kernels are kept in Triton's cache on disk too. Where the kernels cannot run (no CUDA device, no Triton),
    the block runs all the same and nothing is compiled.
    """
    names: list[str] = []
    parameters = _Parameters()
    with contextlib.ExitStack() as stack:
        launches: list[Any] = []
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if torch.cuda.is_available() and kernels.triton_status() == "ok":
            from smaug.kernels import launch  # imports Triton

            launches = stack.enter_context(launch.record(launch.architecture()))
            stack.enter_context(OnKernels())
        stack.enter_context(parameters)
        try:
            yield names
        finally:
            for x in parameters.seen.values():
                if isinstance(x.grad, FakeTensor):
                    x.grad = None
    for launched in launches:
        device = next(x.device for x in launched.args if isinstance(x, Tensor))
        args = [_Address(x) if isinstance(x, FakeTensor) else x for x in launched.args]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            launched.kernel.warmup(*args, grid=launched.grid, **launched.meta)
    names += dict.fromkeys(launched.name for launched in launches)
