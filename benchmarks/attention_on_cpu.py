"""Our attention on a CPU against the best of its rivals, point by point.

    python -m benchmarks.attention_on_cpu              # 15 minutes; writes benchmarks/results/attention_on_cpu.csv
    python -m benchmarks.attention_on_cpu --report     # the table of what is there

Every point of bench_attention's grid, forward alone and forward with backward, fp32 and bf16, one thread. Providers
take turns in a random order, since who ran before decides what is in the cache, and each keeps its fastest of n, so
that what else the machine does falls on all alike. The rivals: padded, looped and nested SDPA, and FlexAttention, which
has no backward on a CPU. `eager`, attention written out as timm, MAE and EViT have it, is timed beside them: on equal
lengths in bf16 it is faster than every SDPA.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.attention_rivals import (
    BATCH,
    DISTRIBUTIONS,
    KEEP,
    PROVIDERS,
    Unavailable,
    inputs,
    lengths_of,
)
from benchmarks.timing import pass_of

RESULTS = Path(__file__).parent / "results" / "attention_on_cpu.csv"
RIVALS = ("padded_sdpa", "looped_sdpa", "nested_sdpa", "flex")
NAMES = ("smaug", *RIVALS, "eager")
POINT = ("dtype", "pass", "distribution", "keep", "batch")
ROUNDS = 7, 200  # of a provider, at least and at most
SLOW = 8.0  # a rival this many times slower than the fastest is timed once


def race(lengths: list[int], dtype: torch.dtype, passed: str, seconds: float) -> dict[str, float]:
    """Milliseconds by provider, the least of its rounds; none where it cannot run."""
    *leaves, grad = (x.detach() for x in inputs(lengths, dtype))
    runs = {}
    for name in NAMES:
        own = [x.clone().requires_grad_() for x in leaves]
        try:
            with torch.set_grad_enabled(passed != "forward"):
                runs[name] = pass_of(passed, PROVIDERS[name](*own, lengths), own, grad)
        except Unavailable:
            continue
        runs[name]()
    least, order = dict.fromkeys(runs, math.inf), random.Random(0)
    began, done = time.perf_counter(), 0
    while done < ROUNDS[0] or (done < ROUNDS[1] and time.perf_counter() - began < seconds):
        best = min(least.values())
        for name in order.sample(list(runs), len(runs)):
            if done and least[name] > SLOW * best:
                continue
            start = time.perf_counter()
            runs[name]()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
        done += 1
    return least


def table(rows: list[dict[str, str]]) -> str:
    """The ratios to the best rival: geometric mean, worst point, and the same with eager among the rivals."""
    lines = [
        "| | points | geometric mean | worst | with `eager` as a rival | worst |",
        "|---|---|---|---|---|---|",
    ]
    groups = {(row["pass"], row["dtype"]): None for row in rows}
    for passed, dtype in groups:
        mine = [row for row in rows if (row["pass"], row["dtype"]) == (passed, dtype)]
        cells = []
        for names in (RIVALS, (*RIVALS, "eager")):
            ratios = [min(float(row[n]) for n in names if row[n]) / float(row["smaug"]) for row in mine]
            worst = mine[ratios.index(min(ratios))]
            where = f"{worst['distribution']}, {float(worst['keep']):.0%}, {worst['batch']}"
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            cells += [f"{mean:.2f}x", f"{min(ratios):.2f}x ({where})"]
        name = "forward" if passed == "forward" else "forward and backward"
        lines.append(f"| {name}, {dtype} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    report: bool = False,
    seconds: float = 1.5,
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    passes: tuple[Literal["forward", "step"], ...] = ("forward", "step"),
) -> None:
    """Race on a CPU.

    report: only print what the file has. seconds: of rounds at each point. dtypes, passes: rows to make again; the
    others stay as the file has them.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = {tuple(row[name] for name in POINT): row for row in csv.DictReader(file)}
    if not report:
        torch.set_num_threads(1)
        torch._dynamo.config.recompile_limit = 1000  # FlexAttention is compiled for each shape
        for dtype, passed, *point in itertools.product(dtypes, passes, DISTRIBUTIONS, KEEP, BATCH):
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            least = race(lengths_of(*point), kind, passed, seconds)
            row = dict(zip(POINT, map(str, (dtype, passed, *point)), strict=True))
            row |= {name: f"{least[name]:.3f}" if name in least else "" for name in NAMES}
            print(*row.values(), flush=True)
            rows[tuple(row[name] for name in POINT)] = row
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*POINT, *NAMES], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows.values())
    if not rows:
        raise SystemExit(f"{RESULTS} is not there; make it with `python -m benchmarks.attention_on_cpu`.")
    print(table(list(rows.values())))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
