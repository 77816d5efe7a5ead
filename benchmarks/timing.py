"""What every benchmark shares beside pytest's fixture: the passes, torch.compile, clocks, and memory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.profiler import ProfilerActivity, profile

from smaug.ledger import Stopwatch

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
    """torch.compile(function), or skips the test: on a CPU it needs a C++ compiler."""
    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except RuntimeError as error:
            import pytest  # what no test uses need not have it

            pytest.skip(f"torch.compile needs a C++ compiler here: {error}")
    return torch.compile(function, **kwargs)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds. A single thread has a clock of its own, which stands still while other work is on its core."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


@contextlib.contextmanager
def in_phases(watch: Stopwatch, **calls: tuple[Any, *tuple[str, ...]]) -> Iterator[None]:
    """While it is on, these calls, each (owner, names), run in the phase of their keyword, every backward in
    "backward", and what AdamW does in "optimizer": whatever loop makes them, and however they lie in each other."""

    def entered(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with watch.phase(phase):
                return call(*args, **kwargs)

        return inner

    timed = [
        *((phase, owner, name) for phase, (owner, *names) in calls.items() for name in names),
        ("backward", torch.autograd, "backward"),  # Tensor.backward calls it
        ("optimizer", torch.optim.AdamW, "step"),
        ("optimizer", torch.optim.AdamW, "zero_grad"),
    ]
    with contextlib.ExitStack() as patches:
        for phase, owner, name in timed:
            patches.enter_context(mock.patch.object(owner, name, entered(phase, getattr(owner, name))))
        yield


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
