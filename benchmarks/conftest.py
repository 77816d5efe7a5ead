"""What the benchmarks share: how a function is timed, and what is kept beside the time."""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from smaug import ops
from smaug.device import describe


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark, device):
    """timed(function, shape, dtype, rounds): times it, and notes machine, versions, shape, FLOPs and FLOP/s.

    FLOPs are those that the function computes, counted once outside the time; a rival that computes more is told by it.
    """

    def timed(function: Callable[[], object], shape: str, dtype: torch.dtype, rounds: int = 10) -> None:
        ops.register_flops()
        _register_cpu_sdpa()
        with FlopCounterMode(display=False) as counter:
            function()

        def once() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=rounds, warmup_rounds=2)
        flops = counter.get_total_flops()
        benchmark.extra_info |= {
            "machine": describe(device),
            "torch": torch.__version__,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "gflop": flops / 1e9,
        }
        if benchmark.stats is not None:  # None with --benchmark-disable
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
