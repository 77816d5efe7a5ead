"""Where a training step's time and FLOPs go, part by part: `python -m benchmarks.where_time_goes`.

Forward and backward together, see `parts.times`: shares of a step that is timed without the profiler; steps of the
variants alternate. FLOPs by part are those of the forward. `bench_train_step` does the same for any recipe and size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console

from benchmarks import parts
from benchmarks.bench_time_to_result import RESULTS, Trial, append, variant
from smaug import device
from smaug.step import training_step


@dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = ("smaug", "dense")
    steps: int = 20
    results: Path = RESULTS / "where_time_goes.csv"


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


def flops(trial: Trial) -> tuple[int, Counter[str]]:
    """Of the whole step, and of the forward by part."""
    with trial.way.autocast():
        batch = trial.loader.batch(trial.steps)
        return parts.flops(lambda: training_step(trial.model, trial.recipe, batch)[0].backward())


def main() -> None:
    options, console = tyro.cli(Options, description=__doc__), Console()
    trials = {name: warm(name) for name in options.variants}
    taken: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(options.steps):
        for name, trial in trials.items():
            before = trial.seconds
            trial.step()
            taken[name].append(trial.seconds - before)
    for name, trial in trials.items():
        (total, counted), whole = flops(trial), 1e3 * median(taken[name])
        booked: Counter[str] = Counter()
        for (phase, part), time in parts.times(trial.step, 5, trial.way.device).items():
            booked[phase if phase == "optimizer" else part] += time
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
