"""What pytest sees in every benchmark: the fixture that times and notes, and the option for the whole sweep.

pytest benchmarks/ --benchmark-only                      # under four minutes on two cores
pytest benchmarks/ --benchmark-only --full               # every point
pytest benchmarks/ --benchmark-only --benchmark-json=x.json && python -m benchmarks.plots x.json
"""

import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from smaug import ops
from smaug.device import describe

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.launches import launches
from benchmarks.timing import peak_memory

del sys.path[0]  # or transformers would take our folder `kernels` for its own package

functorch_config.donated_buffer = False  # else a compiled function's backward runs once, and cannot be timed alone
SECONDS = 0.4  # of timing for each number, unless --full asks for more
VERSIONS = {name: importlib.metadata.version(name) for name in ("smaug", "torch", "triton")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every point of the sweep, not a few of each op")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark, device, request):
    """timed(function, shape, dtype, least_bytes): times a call and keeps beside it what it was and what it took.

    FLOPs, launches and peak memory are those of the function itself, each counted once outside the time: a rival that
    computes more, or in more pieces, is told by it. least_bytes: inputs read once and outputs written once, the same
    for every provider. As many rounds as fit in the time. countable: False if FLOPs and launches cannot be counted,
    as in a compiled function, whose kernels are no calls of aten.
    """

    def timed(
        function: Callable[[], object],
        shape: str,
        dtype: torch.dtype,
        least_bytes: int | None = None,
        countable: bool = True,
    ) -> None:
        def once() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        ops.register_flops()
        _register_cpu_sdpa()
        began = time.perf_counter()
        once()  # compiles what is compiled
        first = time.perf_counter() - began
        flops = None
        if countable:
            with FlopCounterMode(display=False) as counter:
                function()
            flops = counter.get_total_flops()
        memory = peak_memory(once, device)
        began = time.perf_counter()
        once()
        seconds = SECONDS * (5 if request.config.getoption("--full") else 1)
        fit = max(3, min(200, math.ceil(seconds / (time.perf_counter() - began))))
        benchmark.pedantic(once, rounds=fit, warmup_rounds=1)
        benchmark.group = f"{request.node.originalname} {shape} {dtype}"
        benchmark.extra_info |= VERSIONS | {
            "machine": describe(device),
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "gflop": None if flops is None else flops / 1e9,
            "least_mb": None if least_bytes is None else least_bytes / 1e6,
            "peak_mb": memory / 1e6,
            "first_call_s": first,
            "launches": launches(function) if countable else None,
        }
        if flops and benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["gflop_per_second"] = flops / 1e9 / statistics.median(benchmark.stats.stats.data)

    return timed


def _register_cpu_sdpa() -> None:
    """torch counts SDPA on a GPU, but not what it calls on a CPU; the arguments are the same."""
    aten = torch.ops.aten
    for op, formula in (
        (aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
    ):
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
