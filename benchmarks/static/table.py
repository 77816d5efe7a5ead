"""The table of variants: made, kept as CSV, compared and shown. A variant is a kernel as it is compiled once."""

from __future__ import annotations

import csv
import multiprocessing
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.static import judge, traffic
from benchmarks.static.cases import ARCHITECTURES, Case, recorded
from smaug.kernels.launch import Launch

GOLDEN = Path(__file__).parents[1] / "results" / "static.csv"
NAMES = ("key", "kernel", "architecture", "case", "dtypes", "configuration")
NUMBERS = (
    *("registers", "stack", "spills", "shared", "blocks", "warps", "hmma", "hgmma", "utchmma", "ldgsts", "utmaldg"),
    *("global", "wide", "atomics", "mufu", "mufu_per_product"),
    *traffic.COLUMNS,
)
EXACT = {"stack", "spills", "shared", "atomics", "warps", *traffic.COLUMNS}
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    key: str
    case: Case
    launch: Launch
    architecture: int

    def names(self) -> Row:
        values = self.launch.name, f"sm_{self.architecture}", self.case.name
        texts = judge.dtypes(self.launch), judge.configuration(self.launch)
        return dict(zip(NAMES, (self.key, *values, *texts), strict=True))


def variants() -> dict[str, Variant]:
    """By key, each once, under the first case that it comes from. Architectures take turns, case by case."""
    found: dict[str, Variant] = {}
    for each in zip(*(recorded(architecture) for architecture in ARCHITECTURES), strict=True):
        for architecture, (case, launched) in zip(ARCHITECTURES, each, strict=True):
            key = judge.key(launched, architecture)
            found.setdefault(key, Variant(key, case, launched, architecture))
    return found


def sample(variants: dict[str, Variant]) -> dict[str, Variant]:
    """One variant of each kernel of ours, the one with the lowest key: a draw that holds until the kernel changes."""
    chosen: dict[str, Variant] = {}
    for key in sorted(variants):
        if variants[key].case.ours:
            chosen.setdefault(variants[key].launch.name, variants[key])
    return {variant.key: variant for variant in chosen.values()}


def work(wanted: Iterable[Variant]) -> dict[str, dict[str, Any]]:
    """By key, what the interpreter counts of each; empty where it says nothing of the kernel."""
    names = {variant.key: traffic.name(variant.case.name, variant.launch) for variant in wanted}
    found = traffic.counts(sorted(set(names.values()))) if names else {}
    return {key: dict.fromkeys(traffic.COLUMNS, "") | found[name] for key, name in names.items()}


_to_make: list[Variant] = []  # read by the processes that are forked: a launch holds kernels and cannot be sent


def _facts(number: int) -> tuple[str, dict[str, Any]]:
    variant = _to_make[number]
    return variant.key, judge.facts(variant.launch, variant.architecture)


def make(
    wanted: dict[str, Variant],
    known: dict[str, Row],
    jobs: int = 1,
    keep: Callable[[dict[str, Row]], None] = lambda rows: None,
    with_work: bool = True,
) -> dict[str, Row]:
    """Rows of the variants wanted, in their order; those known are not compiled. `keep` gets what is there so far.

    with_work: also what the interpreter counts, which takes it minutes.
    """
    global _to_make
    _to_make = [variant for key, variant in wanted.items() if key not in known]
    numbers = {key: {column: row[column] for column in NUMBERS} for key, row in known.items()}
    counted = work(_to_make) if with_work else {}

    def rows() -> dict[str, Row]:
        return {key: {**variant.names(), **numbers[key]} for key, variant in wanted.items() if key in numbers}

    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        try:
            for done, (key, facts) in enumerate(pool.imap(_facts, range(len(_to_make))), 1):
                numbers[key] = facts | counted.get(key, {})
                if done % 20 == 0:  # an end by Ctrl-C or a time limit loses little
                    keep(rows())
        finally:
            keep(rows())
    return rows()


def read(path: Path = GOLDEN) -> dict[str, Row]:
    """Rows by key; none where the file is missing or has other columns."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [*NAMES, *NUMBERS]:
            return {}
        return {row["key"]: row for row in reader}


def write(rows: dict[str, Row], path: Path = GOLDEN) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*NAMES, *NUMBERS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def named(row: Row) -> str:
    return f"{row['kernel']} {row['architecture']} ({row['case']}; {row['dtypes']}; {row['configuration']})"


def changes(before: Row | None, now: Row) -> list[str]:
    """What differs by more than the table lets it: nothing that is exact, 8 registers, 5 % of a count (or one)."""
    if before is None:
        return ["is not in the table; make it with `python -m benchmarks.static --all`"]
    found = []
    for column in (name for name in NUMBERS if name in now):
        old, new = (float(row[column] or 0) for row in (before, now))
        allowed = 0 if column in EXACT else 8 if column == "registers" else max(1.0, 0.05 * old)
        if abs(new - old) > allowed:
            found.append(f"{column} was {before[column]}, is {now[column]}")
    return found


def failures(rows: dict[str, Row]) -> list[str]:
    found = []
    for row in rows.values():
        reasons = judge.wrong(row["kernel"], int(row["architecture"].removeprefix("sm_")), row)
        if reasons and not row["kernel"].startswith("padded_"):
            found.append(f"{named(row)}: {'; '.join(reasons)}")
    return found


def markdown(rows: dict[str, Row]) -> str:
    """A line a kernel, the worst of its variants over all architectures; static, no speed."""
    lines = [
        "| kernel | variants | registers | spills | shared KB | blocks an SM | tensor-core instructions | async copies "
        "| 16-byte share of global accesses | atomics | MUFU a product | FLOPs issued / useful | bytes moved / least |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_kernel: dict[str, list[Row]] = {}
    for row in rows.values():
        by_kernel.setdefault(row["kernel"], []).append(row)
    for kernel, mine in sorted(by_kernel.items(), key=lambda item: (item[0].startswith("padded_"), item[0])):
        numbers = {column: [float(row[column] or 0) for row in mine] for column in NUMBERS}
        # tensor cores make no fp32 products, so the fewest are looked for among the others
        wanted = [row for row in mine if "float16" in row["dtypes"]] or mine
        products = [sum(int(row[name]) for name in ("hmma", "hgmma", "utchmma")) for row in wanted]
        copies = [sum(int(row[name]) for name in ("ldgsts", "utmaldg")) for row in wanted]
        share = min(w / g if g else 0 for w, g in zip(numbers["wide"], numbers["global"], strict=True))
        cells = [
            f"`{kernel}`" + (" (yardstick)" if kernel.startswith("padded_") else ""),
            str(len(mine)),
            f"{max(numbers['registers']):.0f}",
            f"{max(max(numbers['spills']), max(numbers['stack'])):.0f}",
            f"{max(numbers['shared']) / 1024:.1f}",
            f"{min(numbers['blocks']):.0f}",
            f"{min(products):.0f}" if max(products) else "",
            f"{min(copies):.0f}" if max(copies) else "",
            f"{share:.0%}",
            f"{max(numbers['atomics']):.0f}",
            f"{max(numbers['mufu_per_product']):.1f}" if max(products) else "",
            *(_both(max(numbers[column]), max(numbers[f"{column}_197"])) for column in ("issued", "moved")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_by_width(rows)])


def _by_width(rows: dict[str, Row]) -> list[str]:
    """Self-attention beside the yardstick, by the width of a head: bf16 on sm_80."""
    found: dict[str, dict[int, str]] = {}
    for row in rows.values():
        width = re.search(r"\bE=(\d+)", row["configuration"])
        if (
            width
            and row["architecture"] == "sm_80"
            and "bfloat16" in row["dtypes"]
            and row["case"] in ("self", "padded")
        ):
            cell = f"{_both(*(float(row[name] or 0) for name in ('issued', 'issued_197')))}, "
            cell += _both(*(float(row[name] or 0) for name in ("moved", "moved_197")))
            found.setdefault(row["kernel"], {})[int(width[1])] = cell
    widths = sorted({width for cells in found.values() for width in cells})
    lines = ["| FLOPs issued / useful, bytes moved / least |" + "".join(f" width {w} |" for w in widths)]
    lines.append("|---|" + "---|" * len(widths))
    for kernel, cells in sorted(found.items()):
        lines.append(f"| `{kernel}` |" + "".join(f" {cells.get(width, '')} |" for width in widths))
    return lines


def _both(first: float, with_197: float) -> str:
    return f"{first:.1f}" * (first > 0) + f" ({with_197:.1f})" * (with_197 > 0)
