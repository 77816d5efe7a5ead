"""The parts of a training step: which of them an operation belongs to, and what each costs in time and FLOPs."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from smaug import ops
from smaug.model.frame_selector import FrameSelector
from smaug.model.fusion import Fusion
from smaug.model.text_encoder import TextEncoder
from smaug.model.video_encoder import VideoEncoder
from smaug.objectives.answer import Answer
from smaug.objectives.mc import Mc
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm

PARTS: dict[str, tuple[type, str]] = {
    "video encoder": (VideoEncoder, "forward"),
    "text encoder": (TextEncoder, "forward"),
    "fusion encoder": (Fusion, "forward"),
    "frame selector": (FrameSelector, "forward"),
    **{kind.__name__.lower(): (kind, "__call__") for kind in (Vtc, Vtm, Mlm, Mvm, Mc, Answer)},
}


@contextlib.contextmanager
def around(enter: Callable[[str], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """While it is on, the forward of every part runs in `enter(its name)`. What a part calls is of that part: the
    decoder that spells answers has the layers of the fusion encoder."""
    inside = False

    def entered(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return call(*args, **kwargs)
            inside = True
            try:
                with enter(name):
                    return call(*args, **kwargs)
            finally:
                inside = False

        return inner

    with contextlib.ExitStack() as patches:
        for name, (kind, method) in PARTS.items():
            patches.enter_context(mock.patch.object(kind, method, entered(name, getattr(kind, method))))
        yield


def flops(run: Callable[[], object]) -> tuple[int, Counter[str]]:
    """Of a forward and backward as a whole, and of the forward by part."""
    ops.register_flops()
    by_part: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(name: str) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        by_part[name] += counter.get_total_flops() - before

    with FlopCounterMode(display=False) as counter, around(counted):
        run()
    return counter.get_total_flops(), by_part


def times(step: Callable[[], object], steps: int, device: torch.device) -> Counter[tuple[str, str]]:
    """Self time of torch's operations by (phase, part), in us: on a GPU that of the kernels that they start. Phases are
    "backward", "optimizer", those of a `ledger.Stopwatch`, and of all that is in none "forward".

    An operation of the backward belongs to the part whose forward it undoes; the profiler links the two by sequence
    numbers. The profiler itself costs time, so its times are shares of a step that is timed without it.
    """
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with around(lambda name: record_function(f"part {name}")), profile(activities=kinds) as recorded:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    events = [event for event in recorded.events() or () if event.device_type == DeviceType.CPU]
    undone = {e.sequence_nr: _part(e) for e in events if e.sequence_nr >= 0 and _node(e) is None}
    found: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.name.startswith(("part ", "phase ", "Optimizer.zero_grad")):
            continue
        time, node = event.self_device_time_total if cuda else event.self_cpu_time_total, _node(event)
        if node is not None:
            found["backward", undone.get(node.sequence_nr, "rest")] += time
            continue
        phase = _above(event, "phase ", "Optimizer.step")
        named = "forward" if phase is None else phase.name.removeprefix("phase ")
        found["optimizer" if named.startswith("Optimizer") else named, _part(event)] += time
    return found


def _above(event: Any, *prefixes: str) -> Any:
    """The innermost event with such a name that this one lies in, or is; None if there is none."""
    while event is not None and not event.name.startswith(prefixes):
        event = event.cpu_parent
    return event


def _node(event: Any) -> Any:
    """The node of the graph in whose backward an event lies, if any."""
    return _above(event, "autograd::engine::evaluate_function")


def _part(event: Any) -> str:
    part = _above(event, "part ")
    return "rest" if part is None else str(part.name.removeprefix("part "))
