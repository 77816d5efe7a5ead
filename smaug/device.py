"""What this machine is, and the fastest correct way to run on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smaug.ops.implementation import load_kernels


@dataclass(frozen=True)
class Way:
    """How a run computes: chosen once, at its start."""

    device: torch.device
    dtype: torch.dtype  # of products and activations; weights and optimiser are fp32
    impl: str  # of the ops
    why: str  # for people

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def choose(fast: bool, device: str = "auto") -> Way:
    """`--fast`: the fastest correct way here; without it, the plain reference in fp32, the same everywhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here. Use --device cpu, or mend the driver.")
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    if not fast:
        return Way(torch.device(kind), torch.float32, "reference", "plain reference ops, fp32 (add --fast for speed)")
    if kind == "cuda":
        status = load_kernels()
        how = "Triton kernels" if status == "ok" else f"plain PyTorch operations: {status}"
        return Way(torch.device(kind), torch.bfloat16, "auto", f"bf16; {how}")
    _keep_memory()
    if _cpu_has_bf16():
        return Way(
            torch.device(kind), torch.bfloat16, "auto", "bf16, since the processor multiplies it; fused attention"
        )
    return Way(torch.device(kind), torch.float32, "auto", "fp32, since the processor has no bf16; fused attention")


def _keep_memory() -> None:
    """Tells glibc to keep freed memory. By default a large block goes back to the system, and every page of the next
    one costs a fault: 8,000 of them a step of recipe smaug, 5 % of its time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in every C library
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def _cpu_has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def describe(device: torch.device) -> str:
    """One line: processor or GPU, cores, memory, versions."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        what = f"{_processor()}, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    return f"{what}; Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def matrix_rate(way: Way, now: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a matrix product in the run's precision, the best of a few in about 0.1 s of the clock `now`.

    A 1024-cube, on a GPU an 8192-cube: there a smaller one takes less time than its start.
    """
    side = 8192 if way.device.type == "cuda" else 1024
    a = torch.randn(side, side, device=way.device, dtype=way.dtype)
    best = 0.0
    start = now()
    while now() - start < 0.1 or best == 0.0:
        before = now()
        b = a @ a
        if way.device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * len(b) ** 3 / (now() - before))
    return best


def copy_rate(device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Bytes/s of a copy inside the device's memory, read and written ones together, the best of a few in about 0.1 s.

    128 MiB on a processor, which no cache of one holds with its copy, and 1 GiB on a GPU.
    """
    a = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    b = a.clone()  # whose pages have all been touched
    best = 0.0
    start = now()
    while now() - start < 0.1 or best == 0.0:
        before = now()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * a.nbytes / (now() - before))
    return best
