"""What every benchmark shares beside pytest's fixture: the passes, torch.compile, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.profiler import ProfilerActivity, profile

PASSES = ("forward", "backward", "step")  # step is forward and backward together


def pass_of(name: str, run: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """What to time: run itself without gradients, the backward of one run kept, or both."""
    if name == "forward":
        return torch.no_grad()(run)
    if name == "backward":
        out = run()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(run(), leaves, grad)


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """torch.compile(function), or skips: on a CPU it needs a C++ compiler."""
    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except RuntimeError as error:
            pytest.skip(f"torch.compile needs a C++ compiler here: {error}")
    return torch.compile(function, **kwargs)


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at once beyond what was there before, counted in a run of its own."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
        function()
    events = [e for e in counted.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
