"""Where a training step's time and FLOPs go, part by part: `python -m benchmarks.where_time_goes`.

Time is the self time of torch's operations, forward and backward. One of the backward belongs to the part whose forward
it undoes; torch's profiler links the two by sequence numbers. Since the profiler itself costs time, the parts are
shares of a step timed without it; steps of the variants alternate. FLOPs are counted by torch's counter, by part those
of the forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_time_to_result import RESULTS, Trial, append, variant
from smaug import device, ops
from smaug.model.frame_selector import FrameSelector
from smaug.model.fusion import Fusion
from smaug.model.text_encoder import TextEncoder
from smaug.model.video_encoder import VideoEncoder
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.step import training_step

PARTS: dict[str, tuple[type, str]] = {
    "video encoder": (VideoEncoder, "forward"),
    "text encoder": (TextEncoder, "forward"),
    "fusion encoder": (Fusion, "forward"),
    "frame selector": (FrameSelector, "forward"),
    **{kind.__name__.lower(): (kind, "__call__") for kind in (Vtc, Vtm, Mlm, Mvm)},
}
counter: FlopCounterMode | None = None  # while FLOPs are counted
forward: Counter[str] = Counter()


@dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = ("smaug", "dense")
    steps: int = 20
    results: Path = RESULTS / "where_time_goes.csv"


def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def inner(*args: Any, **kwargs: Any) -> Any:
        before = counter.get_total_flops() if counter else 0
        with record_function(f"part {name}"):
            result = call(*args, **kwargs)
        if counter:
            forward[name] += counter.get_total_flops() - before
        return result

    return inner


def warm(name: str) -> Trial:
    """With pruning at its final rate, as in most steps of a run."""
    chosen = variant(name)
    trial = Trial(dataclasses.replace(chosen, optim=dataclasses.replace(chosen.optim, min_lr=1.0)))
    prune = dataclasses.replace(chosen.model.video.prune, warmup=0.0)
    video = dataclasses.replace(chosen.model.video, prune=prune)
    trial.recipe = dataclasses.replace(trial.recipe, model=dataclasses.replace(trial.recipe.model, video=video))
    for _ in range(30):  # until the heap has grown to its size, pages fault
        trial.step()
    return trial


def shares(trial: Trial, steps: int) -> Counter[str]:
    """Self time by part, in any unit."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(steps):
            with record_function("part rest"):
                trial.step()
    events = prof.events()
    assert events is not None

    def part(event: Any) -> str | None:
        while event is not None:
            if event.name.startswith("part "):
                return str(event.name[5:])
            event = event.cpu_parent
        return None

    undone = {e.sequence_nr: part(e) for e in events if e.sequence_nr >= 0 and not backward(e)}
    found: Counter[str] = Counter()
    for event in events:
        node = backward(event)
        if node is not None:
            found[undone.get(node.sequence_nr) or "rest"] += event.self_cpu_time_total
        elif "AdamW" in event.name or (event.cpu_parent is not None and "AdamW" in event.cpu_parent.name):
            found["optimizer"] += event.self_cpu_time_total
        elif not event.name.startswith(("part ", "Optimizer")):
            found[part(event) or "rest"] += event.self_cpu_time_total
    return found


def backward(event: Any) -> Any:
    """The node of the graph in whose backward an event lies, if any."""
    while event is not None and not event.name.startswith("autograd::engine::evaluate_function"):
        event = event.cpu_parent
    return event


def flops(trial: Trial) -> tuple[Counter[str], int]:
    """Of the forward by part, and of the whole step."""
    global counter
    forward.clear()
    with trial.way.autocast(), FlopCounterMode(display=False) as counter:
        training_step(trial.model, trial.recipe, trial.loader.batch(trial.steps))[0].backward()
    whole, counter = counter.get_total_flops(), None
    return forward, whole


def main() -> None:
    options, console = tyro.cli(Options, description=__doc__), Console()
    ops.register_flops()
    for name, (kind, method) in PARTS.items():
        setattr(kind, method, watched(name, getattr(kind, method)))
    trials = {name: warm(name) for name in options.variants}
    taken: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(options.steps):
        for name, trial in trials.items():
            before = trial.seconds
            trial.step()
            taken[name].append(trial.seconds - before)
    for name, trial in trials.items():
        (counted, total), booked, whole = flops(trial), shares(trial, 5), 1e3 * median(taken[name])
        rows = [
            [name, part, f"{whole * time / booked.total():.1f}", f"{counted[part] / 1e9:.2f}"]
            for part, time in booked.most_common()
        ]
        rows.append([name, "all", f"{whole:.1f}", f"{counted.total() / 1e9:.2f}", f"{total / 1e9:.2f}"])
        append(options.results, ["variant", "part", "ms", "gflop_forward", "gflop", "machine"],
               [[*row, *[""] * (5 - len(row)), device.describe(trial.way.device)] for row in rows])  # fmt: skip
        for row in rows:
            console.print("  ".join(row), highlight=False)


if __name__ == "__main__":
    main()
