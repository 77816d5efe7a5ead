"""Starting kernels: the one door that every launch goes through, so that launches can be counted and compiled offline.

Without a GPU a launcher runs on `meta` tensors inside `record()`: nothing starts, and every launch is kept with its
grid, arguments and configuration. `compile_for` then builds such a launch for any architecture through Triton's own
just-in-time path, so what is judged is what a GPU would run: the same specialisation of integers, the same alignment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Launch:
    """A kernel as it was about to start."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]  # constants, num_warps, num_stages

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


_recorded: list[Launch] | None = None
_architecture: int | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta); inside `record()` only written down. An empty grid starts nothing."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):
        # Triton starts a kernel on the current device, which need not be that of the tensors.
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **meta)


@contextlib.contextmanager
def record(architecture: int = 80) -> Generator[list[Launch], None, None]:
    """Launches of the block, kept and not started, with the configurations of an architecture (80, 86, 89, 90, 100)."""
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _architecture = before


def architecture() -> int:
    """The compute capability that launchers choose their configuration for, as 80 or 90."""
    if _architecture is not None:
        return _architecture
    if triton.knobs.runtime.interpret:
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class _Offline:
    """What Triton asks of a driver before it compiles, answered without a device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def _offline(capability: int) -> Generator[None, None, None]:
    active = driver._active
    driver._active = _Offline(capability)
    try:
        yield
    finally:
        driver._active = active


def compile_for(launched: Launch, capability: int) -> Any:
    """Compiles a recorded launch for an architecture, no device needed -> Triton's CompiledKernel (asm, metadata)."""
    with _offline(capability):
        return launched.kernel.warmup(*launched.args, grid=launched.grid, **launched.meta)


def specialisation(launched: Launch, capability: int) -> str:
    """What Triton would tell this launch apart by from others of its kernel: types, alignments, constants, options."""
    with _offline(capability):
        binder = launched.kernel.device_caches[capability][-1]
        _, types, options = binder(*launched.args, **launched.meta)
    return str((types, sorted(options.items())))
