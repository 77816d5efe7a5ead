"""README's headline: what a score costs here, by the ledger; and what the cost model predicts for base on an A6000.

    python -m benchmarks.headline                # trains what is not there yet, half an hour on two cores
    python -m benchmarks.headline --report       # trains nothing

Both renew README.md. Four runs of `smaug.train --fast`, one after another: the sparse recipe, the dense baseline for as
many clips, the same of as few moments as the sparse recipe has, and the dense baseline with a schedule that is as much
shorter as its steps are slower, so that it ends after the same time. Their folders stay, for `python -m smaug.report
runs/headline/*`. On a machine that others use, too, the hours are noise.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks.bench_time_to_result import TARGETS
from benchmarks.scaling import rows_of
from smaug import cost, estimate, recipe
from smaug.report.compare import compare
from smaug.report.runs import Run, read_runs
from smaug.report.words import device, short
from smaug.run import refuse, write

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "docs/headline.png"
NAMES = ("smaug", "dense", "dense-two-moments", "dense-same-time")
TARGET = TARGETS[-1]  # R@1 on the val split; fixed long before these runs


@dataclass(frozen=True)
class Options:
    folder: Path = Path("runs/headline")
    readme: Path = ROOT / "README.md"
    eval_every: int = 60  # steps of the sparse recipe; dense runs are evaluated as often in their time
    report: bool = False


def train(options: Options, console: Console) -> None:
    """What is not finished yet; a run that was stopped goes on."""
    sparse, each = recipe.load("smaug"), max(1, options.eval_every)
    for name in NAMES:
        flags = ["--eval-every", str(each)]
        if name == "dense-two-moments":
            flags += ["--model.video.frames", str(sparse.model.video.frames)]
        if name == "dense-same-time":
            runs = read_runs([options.folder / "smaug", options.folder / "dense"])
            least = seconds_a_step(runs[0]) / seconds_a_step(runs[1])
            steps = round(least * sparse.optim.steps)
            flags = ["--eval-every", str(max(1, round(least * each))), "--optim.steps", str(steps)]
        folder = options.folder / name
        if (folder / "result.json").exists():
            continue
        chosen = name.partition("-")[0]
        line = [sys.executable, "-m", "smaug.train", chosen, "--fast", "--run-dir", str(folder), "--requeue", *flags]
        console.print(" ".join(line[1:]), highlight=False, soft_wrap=True)
        subprocess.run(line, check=True)
        if not (folder / "result.json").exists():
            raise ValueError(f"{folder} was stopped; the same line goes on with it")


def seconds_a_step(run: Run) -> float:
    assert run.ledger is not None
    total = run.ledger.total()
    return total.training_seconds / total.steps


def table(runs: Sequence[Run]) -> str:
    body: list[list[object]] = []
    dense = runs[1]
    for run in runs:
        assert run.end is not None and run.hours is not None and run.ledger is not None
        total = run.ledger.total()
        held = compare(run, dense, TARGET)
        (met, _), ratio = held.spent["hours"], held.ratio()
        spent = "never" if met is None else f"{3600 * met:.0f} s"
        body.append(
            [
                f"`{run.name}`", spent, f"**{ratio:.1f}x**" if ratio and run is not dense else "",
                f"{max(p.score for p in run.curve):.1%}", f"{run.end.score:.1%}", f"{run.hours:.3f}",
                short(total.clips), short(total.flops), f"{total.flops / total.training_seconds / 1e9:.0f}",
            ]
        )  # fmt: skip
    return rows_of(
        f"| run | to R@1 {TARGET:.0%} on val | dense / this | best on val | R@1 on test | device-hours of training | "
        "clips | FLOPs | GFLOP/s |",
        body,
    )


def predicted() -> str:
    """What size base would cost, on paper. There both have four frames."""
    options, size = estimate.parse([])
    [machine] = estimate.machines(options)
    found = estimate.estimate(options, size, machine)
    hours, dense = (found.hours(side.whole.seconds) for side in (found.this, found.dense))
    assert found.range is not None
    most, least = (f"{end:.0f} at {share:.0%}" for end, share in zip(found.range, cost.RANGE, strict=True))
    return (
        f"**Predicted, not measured**: `{options.recipe.name}` at {size}, {options.pairs / 1e6:g} M pairs for "
        f"{options.epochs:g} epochs, {hours:.0f} {machine.name}-hours against {dense:.0f} of the same frames with "
        f"nothing left out, **{found.ratio:.1f}x**, if products reach {options.efficiency:.0%} of the peak; {most}, "
        f"{least} (`python -m smaug.estimate`)."
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    """Score against device time, and where the time went."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install -c constraints.txt -e '.[plots]'") from None
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    looks = (("#1f5fbf", "-"), ("#d1495b", "--"), ("#2a9d8f", "-."), ("#8a6d1f", ":"))
    for run, (colour, line) in zip(runs, looks, strict=True):
        x, y = ([0.0, *(3600 * (p.hours or 0) for p in run.curve)], [0.0, *(100 * p.score for p in run.curve)])
        curves.plot(x, y, line, color=colour, marker="o", markersize=3, label=run.name)
        assert run.end is not None and run.hours is not None
        curves.plot(3600 * run.hours, 100 * run.end.score, "*", color=colour, markersize=11)
    curves.axhline(100 * TARGET, color="gray", lw=0.8, ls=":")
    curves.set(xlabel=f"device-seconds of training, {device(runs[0])}", ylabel="text to video R@1, %", ylim=(0, None))
    curves.set_title("on val of 500; star: on test", fontsize=9)
    curves.legend(frameon=False)
    shown = dict.fromkeys(("data", "forward", "backward", "optimizer", "checkpoint", "rest"))
    for y_, run in enumerate(runs):
        left, phases = 0.0, run.phases()
        for i, phase in enumerate(shown):
            taken = phases.get(phase, 0.0)
            bars.barh(y_, taken, left=left, color=f"C{i}", label=None if y_ else phase)
            left += taken
    bars.set_yticks(range(len(runs)), [run.name for run in runs])
    bars.invert_yaxis()
    bars.set(xlabel="device-seconds by phase, of the ledger")
    bars.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def renewed(page: str, text: str) -> str:
    start, end = "<!-- headline -->", "<!-- end of the headline -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the README needs one {start} and one {end} behind it")
    return page.partition(start)[0] + f"{start}\n\n{text}\n\n{end}" + page.partition(end)[2]


def main() -> int:
    options, console = tyro.cli(Options, description=__doc__), Console()
    try:
        page = options.readme.read_text()
        renewed(page, "")  # said before the work, not after it
        if not options.report:
            train(options, console)
        runs = read_runs([options.folder / name for name in NAMES])
        if left := [str(run.folder) for run in runs if not run.finished or not run.ledger or not run.curve]:
            raise ValueError(f"not finished, or without a ledger or scores on val: {', '.join(left)}")
        picture = options.readme.parent / PICTURE
        draw(runs, picture)
        date = max(turn.ended for run in runs if run.ledger for turn in run.ledger.turns)[:10]
        where = f"{runs[0].machine}, {date}, one seed; `python -m benchmarks.headline`."
        text = f"![score against device time]({PICTURE})\n\n{table(runs)}\n\n{where}\n\n{predicted()}"
        write(options.readme, renewed(page, text))
        console.print(text, highlight=False, soft_wrap=True)
    except subprocess.CalledProcessError as error:
        return error.returncode  # it has said why
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
