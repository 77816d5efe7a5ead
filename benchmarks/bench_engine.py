"""What the training engine costs, on this machine's CPU: a second process, checkpoints, and the loop itself.

    python -m benchmarks.bench_engine                                  # about eight minutes on two idle cores
    python -m benchmarks.bench_engine --report                         # the table of what is in the results

Three runs of `smaug.train` take turns, at the same batch and seed, and each round in another order:

    one      one process of two threads
    two      two gloo processes of one thread each, started by torchrun
    saving   `one` with a checkpoint every few steps

The targets: `two` at least 0.9x as fast as `one`; a checkpoint a minute costs under 2 % of a run; the loop outside
forward, backward, clipping and optimizer takes under 3 % of a step, and of it the ledger under 1 %. A ratio is that of
two runs of one round, which are neighbours in time; the table has the median of the rounds and their range. First steps
are left out, evaluation is not run. `timed_train` says what a phase is. Where others use the machine as well, all of it
is noise: the results have the load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.bench_time_to_result import RESULTS, append, read
from smaug.recipe import load
from smaug.run import refuse

WAYS = ("one", "two", "saving")
PHASES = ("forward", "backward", "clipping", "optimizer", "waiting", "saving", "ledger", "rest")
COMPUTED = PHASES[:4]
MINUTE = 60.0  # seconds between checkpoints, for the share that they cost


@dataclass(frozen=True)
class Options:
    recipes: tuple[str, ...] = ("smaug", "mac")
    size: Literal["tiny", "small", "base"] = "tiny"
    shapes: tuple[int, int, int] | None = None  # clips of the embedded set; default: all at tiny, else 64, 16, 16
    pairs: int | None = None  # a step; default: the recipe's batch
    rounds: int = 3
    steps: int = 60  # of each run that are timed
    warm_up: int = 15  # steps before them; until then memory is new
    save_every: int = 10  # steps, of the runs that save
    ways: tuple[Literal["one", "two", "saving"], ...] = WAYS
    results: Path = RESULTS / "engine.csv"
    report: bool = False  # run nothing


def command(name: str, way: str, options: Options, folder: Path) -> list[str]:
    """The line that trains, and leaves its times in folder/times.json."""
    shapes = options.shapes or (None if options.size == "tiny" else (64, 16, 16))  # decoded, 6,000 at 224 are 14 GB
    every = options.save_every if way == "saving" else 10**9
    engine = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if way == "two" else []
    return [
        sys.executable, *engine, "-m", "benchmarks.timed_train", str(folder / "times.json"),
        name, "--size", options.size, "--fast", "--device", "cpu", "--run-dir", str(folder / "run"),
        "--max-steps", str(options.warm_up + options.steps), "--checkpoint-every", str(every),
        *(["--data.batch", str(options.pairs)] if options.pairs else []),
        *(["--data.shapes", *map(str, shapes)] if shapes else []),
    ]  # fmt: skip


def timed(name: str, way: str, options: Options) -> tuple[str, list[dict[str, float]]]:
    """What the machine is to a process, and seconds by phase of each step after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        line = command(name, way, options, Path(folder))
        threads = {"OMP_NUM_THREADS": "1" if way == "two" else "2"}
        root = str(Path(__file__).parents[1])
        ran = subprocess.run(line, env=os.environ | threads, cwd=root, capture_output=True, text=True)
        if ran.returncode:
            said = [text for text in ran.stderr.splitlines() if text.startswith("smaug:")] or [ran.stderr[-2000:]]
            raise ValueError(f"{' '.join(line[1:])} ended with {ran.returncode}: {said[0]}")
        times = json.loads((Path(folder) / "times.json").read_text())
    return times["machine"], times["steps"][options.warm_up :]


def row(
    options: Options, began: str, number: int, name: str, way: str, machine: str, steps: Sequence[dict[str, float]]
) -> dict[str, object]:
    """A run as a line of the results: means over its steps, so that one a tenth of which saves counts it by a tenth."""
    saves = sum("saving" in step for step in steps)
    return {
        "began": began,  # the call; its rounds are comparable
        "round": number,
        "recipe": name,
        "size": options.size,
        "pairs": options.pairs or load(name, options.size).data.batch,
        "way": way,
        "steps": len(steps),
        "ms": f"{1e3 * mean(sum(step.values()) for step in steps):.2f}",
        "median_ms": f"{1e3 * median(sum(step.values()) for step in steps):.2f}",
        **{f"{phase}_ms": f"{1e3 * mean(step.get(phase, 0.0) for step in steps):.3f}" for phase in PHASES},
        "saves": saves,
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: 2 are our own
        "machine": machine,
    }


def table(rows: Sequence[dict[str, str]]) -> Table:
    """The targets by recipe, size and pairs, from the newest call that measured them."""
    found = Table("", "target", "median", "of rounds", "rounds")
    for kind in dict.fromkeys((r["recipe"], r["size"], r["pairs"]) for r in rows):
        own = [r for r in rows if (r["recipe"], r["size"], r["pairs"]) == kind]
        rounds: dict[str, dict[str, dict[str, float]]] = {}
        columns = ("ms", "steps", "saves", *(f"{phase}_ms" for phase in PHASES))
        for r in own:
            if r["began"] == own[-1]["began"]:
                numbers = {key: float(r[key] or 0) for key in columns}  # early ones have no ledger
                rounds.setdefault(r["round"], {})[r["way"]] = numbers

        def line(said: str, target: str, values: Sequence[float], form: str) -> None:
            if values:
                least, most = form.format(min(values)), form.format(max(values))
                found.add_row(said, target, form.format(median(values)), f"{least} to {most}", str(len(values)))

        every = list(rounds.values())
        one = [r["one"] for r in every if "one" in r]
        twos = [(r["one"], r["two"]) for r in every if "one" in r and "two" in r]
        saving = [(r["one"], r["saving"]) for r in every if "one" in r and r.get("saving", {}).get("saves")]
        still = [b["saving_ms"] * b["steps"] / b["saves"] for _, b in saving]
        costs = [(b["ms"] - a["ms"]) * b["steps"] / b["saves"] for a, b in saving]
        found.add_row("{}, {}, {} pairs".format(*kind), style="bold")
        line("ms a step, one process", "", [r["ms"] for r in one], "{:.1f}")
        line("two processes / one", ">= 0.90x", [a["ms"] / b["ms"] for a, b in twos], "{:.2f}x")
        line("step outside what computes", "< 3 %", [outside(r) for r in one], "{:.1%}")
        line("of it waiting for data", "", [r["waiting_ms"] / r["ms"] for r in one], "{:.1%}")
        line("of it the ledger", "< 1 %", [r["ledger_ms"] / r["ms"] for r in one if r["ledger_ms"]], "{:.2%}")
        line("ms that stand still for a checkpoint", "", still, "{:.0f}")
        line("ms that a checkpoint costs in all", "", costs, "{:.0f}")
        line("of a run with one a minute", "< 2 %", [cost / 1e3 / MINUTE for cost in costs], "{:.2%}")
        found.add_section()
    return found


def outside(numbers: dict[str, float]) -> float:
    return 1 - sum(numbers[f"{phase}_ms"] for phase in COMPUTED) / numbers["ms"]


def main() -> int:
    options, console = tyro.cli(Options, prog="python -m benchmarks.bench_engine", description=__doc__), Console()
    try:
        if not options.report:
            run(options, console)
        if not options.results.exists():
            raise ValueError(f"there is no {options.results}; leave --report out to measure")
        console.print(table(read(options.results)))
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        console.print("stopped; runs that had ended are in the results", highlight=False)
        return 130
    return 0


def run(options: Options, console: Console) -> None:
    if min(options.rounds, options.steps, options.save_every) < 1 or options.warm_up < 1:
        raise ValueError("--rounds, --steps, --warm-up and --save-every must be at least 1")
    for name in options.recipes:
        load(name, options.size)  # a wrong name ends here, not after minutes
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    for number in range(options.rounds):
        for name in options.recipes:
            turned = options.ways[number % len(options.ways) :] + options.ways[: number % len(options.ways)]
            for way in turned:
                made = row(options, began, number, name, way, *timed(name, way, options))
                append(options.results, list(made), [list(made.values())])
                console.print(
                    f"round {number}  {name:<12}{way:<8}{made['ms']} ms a step, load {made['load']}", highlight=False
                )


if __name__ == "__main__":
    sys.exit(main())
