"""Starting kernels: the one door that every launch goes through, so that launches can be counted and compiled offline.

Without a GPU a launcher runs on `meta` tensors inside `record()`: nothing starts, and every launch is kept with its
grid, arguments and configuration. `compile_for` then builds such a launch for any architecture through Triton's own
just-in-time path, so what is judged is what a GPU would run: the same specialisation of integers, the same alignment.

Nothing is tuned at run time. A launcher's own choice of tile sizes, warps, stages and registers can be replaced from a
JSON file that SMAUG_KERNEL_CONFIG names; it is read once, before the first launch:

    {"attention_forward": [{"architecture": 90, "width": 64, "dtype": "bfloat16", "BLOCK_M": 128, "num_warps": 8}],
     "_embed": [{"BLOCK_M": 64}]}

Of a kernel's entries the first whose conditions hold counts; what it does not name stays as the launcher has it.
Conditions, each optional: `architecture` (80, 86, 89, 90, 100); `dtype` of what the kernel computes on; `width`: of a
head for attention, a patch for pixel_loss, a token elsewhere (random_mask: how many patches it ranks; noise has none).
Settings: those of SETTINGS, num_warps, num_stages and maxnreg (registers a thread). Other tiles may add sums in another
order.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

VARIABLE = "SMAUG_KERNEL_CONFIG"
SETTINGS: dict[str, tuple[str, ...]] = {  # by kernel, what may be set beside OPTIONS; the rest follows from shapes
    "attention_forward": ("BLOCK_M", "BLOCK_N"),
    "attention_scores": ("BLOCK_M", "BLOCK_N"),
    "attention_backward_queries": ("BLOCK_M", "BLOCK_N"),
    "attention_backward_keys": ("BLOCK_M", "BLOCK_N"),
    "attention_backward_biases": ("BLOCK",),
    "_embed": ("BLOCK_M", "BLOCK_D", "BLOCK_K"),
    "_dweight": ("BLOCK_D", "BLOCK_P", "BLOCK_M"),
    "_tables": ("BLOCK", "BLOCK_S", "BLOCK_D"),
    "_dvideo": ("BLOCK_M", "BLOCK_P", "BLOCK_K"),
    "_gather": ("ROWS", "COLUMNS"),
    "_scatter": ("ROWS", "COLUMNS", "IDS"),
    "_fill_grad_of_a_split": ("HOLES", "COLUMNS", "IDS"),
    "_fill_grad_of_all": ("COLUMNS",),
    "_mass": ("SCORES",),
    "_select": ("ROWS", "COLUMNS", "SCORES", "GROUPS"),
    "_backward": ("ROWS", "COLUMNS", "SCORES"),
    "_differences": (),
    "_mean": ("BLOCK",),
    "_scale": ("BLOCK",),
    "_mask": (),
    "_noise": ("BLOCK",),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
CONDITIONS = ("architecture", "dtype", "width")


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


def address(x: torch.Tensor) -> int:
    """Where x begins, in bytes; while launches are recorded, when it may have no memory, within what would be its."""
    return x.data_ptr() if _recorded is None else int(x.storage_offset()) * x.element_size()


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


def configured(kernel: Any, chosen: dict[str, Any], dtype: torch.dtype, width: int) -> dict[str, Any]:
    """What a launcher chose for a kernel, with what the file of SMAUG_KERNEL_CONFIG says instead of it."""
    path = os.environ.get(VARIABLE)
    if not path:
        return chosen
    here = {"architecture": architecture(), "dtype": str(dtype).removeprefix("torch."), "width": width}
    for entry in _entries(path).get(kernel.__name__, []):
        if all(entry.get(name, value) == value for name, value in here.items()):
            return chosen | {name: value for name, value in entry.items() if name not in CONDITIONS}
    return chosen


@functools.cache
def _entries(path: str) -> dict[str, list[dict[str, Any]]]:
    """The file, or a ValueError of one sentence that says what is wrong with it and where."""
    try:
        kernels = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{VARIABLE}={path} cannot be read: {error.strerror}; correct it or unset it.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; correct it or unset {VARIABLE}.") from error
    if not isinstance(kernels, dict):
        raise ValueError(f'{path} must be an object of kernels, as {{"attention_forward": [{{"BLOCK_M": 128}}]}}.')
    for kernel, entries in kernels.items():
        if kernel not in SETTINGS:
            raise ValueError(f"{path}: there is no kernel {kernel!r}; the kernels are {', '.join(SETTINGS)}.")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f'{path}: {kernel} must be a list of entries, as [{{"num_warps": 8}}].')
        known = (*SETTINGS[kernel], *OPTIONS, *CONDITIONS)
        for number, entry in enumerate(entries):
            for name, value in entry.items():
                at = f"{path}: {kernel}[{number}]"
                if name not in known:
                    raise ValueError(f"{at} has {name!r}, which {kernel} does not know; it knows {', '.join(known)}.")
                if name == "dtype":
                    if not isinstance(getattr(torch, str(value), None), torch.dtype):
                        raise ValueError(f'{at}: dtype {value!r} is none; name one of torch, as "bfloat16".')
                elif type(value) is not int or value < 1:
                    raise ValueError(f"{at}: {name} is {value!r}; give a positive integer.")
                elif (name in SETTINGS[kernel] or name == "num_warps") and value & (value - 1):
                    raise ValueError(f"{at}: {name} is {value}; Triton takes powers of two.")
    return kernels


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
