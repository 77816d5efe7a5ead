"""Runs side by side: `python -m smaug.report RUN [RUN ...] [--baseline RUN]`.

Writes a page for a browser (HTML, one file that needs no network): score against device-hours beside published results,
time by phase, tokens by stage, losses, environments and commands. Prints the result as a table.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from smaug.report.compare import COSTS, Comparison, compare
from smaug.report.page import page
from smaug.report.published import PUBLISHED
from smaug.report.runs import Run, read_runs
from smaug.report.words import device, headline, hours, other_costs, sentence
from smaug.run import refuse, warn, write


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]  # folders of runs
    out: Path | None = None  # the page; default: report.html, but none with --json alone or without plotly
    baseline: Path | None = None  # run that the others are held against
    target: float | None = None  # score (0.4 is 40 %) to hold them to; default: the highest that both reached
    json: Path | None = None  # the numbers as JSON, in a file or with - on the terminal, which then shows nothing else


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.report", description=__doc__)
    console = Console(markup=False, quiet=options.json == Path("-"))  # a folder may be called run[1]
    try:
        out = check(options)
        folders = [*options.runs, *([options.baseline] if options.baseline else [])]
        runs = read_runs(folders)
        comparisons: list[Comparison] = []
        if options.baseline:
            base = next(run for run in runs if run.folder.resolve() == options.baseline.resolve())
            comparisons = [compare(run, base, options.target) for run in runs if run is not base]
        if out:
            write(out, page(runs, comparisons))
        if options.json:
            text = json.dumps(numbers(runs, comparisons), indent=2)
            if options.json == Path("-"):
                print(text)
            else:
                write(options.json, text)
        show(console, runs, comparisons)
        for path in filter(None, (out, options.json)):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        return 0
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


def check(options: Options) -> Path | None:
    """Where the page goes; None for none. Refuses what would fail after the work."""
    if not options.runs:
        raise ValueError("name at least one run: python -m smaug.report RUN [RUN ...]")
    if options.target is not None and (options.baseline is None or not 0 < options.target <= 1):
        raise ValueError("--target is a share (0.4 is 40 %) that runs are held to against a --baseline")
    out = options.out or (None if options.json else Path("report.html"))
    for flag, path in (("--out", out), ("--json", options.json)):
        if path and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; name a file in it")
        if path and not path.parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {path.parent}")
    if out and out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} is a page, so its name must end in .html")
    if out and importlib.util.find_spec("plotly") is None:
        lacking = "the page needs plotly: pip install -c constraints.txt -e '.[plots]'"
        if options.out:
            raise ValueError(lacking)
        warn([f"{lacking}. Without it there is the table alone"])
        return None
    return out


def show(console: Console, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> None:
    table = Table(title=headline(runs, comparisons), title_justify="left", title_style="bold", caption_justify="left")
    on = list(dict.fromkeys(run.on for run in runs))
    for column in ("run", "recipe", *(["data, score"] if len(on) > 1 else [])):
        table.add_column(column, overflow="fold")
    for column in ("end", "best val", "device-hours", "tokens", "use"):
        table.add_column(column, justify="right")
    for run in runs:
        best, kept, (used, _) = max((p.score for p in run.curve), default=None), run.tokens_kept(), run.utilisation()
        cells = [run.name, str(run.recipe.get("name", "?")), *([f"{run.on}, {run.on.score}"] if len(on) > 1 else [])]
        cells += [f"{run.end.score:.1%}" if run.end else "", "" if best is None else f"{best:.1%}", hours(run.hours)]
        table.add_row(*cells, "" if kept is None else f"{kept:.0%}", "" if used is None else f"{used:.1%}")
    scores = f"{on[0].score} on {on[0]}: at the end, and the best on val" if len(on) == 1 else "scores as named"
    table.caption = f"{scores}; tokens of the encoders, of a dense model's; use of the devices' rate"
    console.print(table)
    for run in runs:
        lines = [run.state] * (not run.finished) + run.notes
        for line in lines:
            console.print(f"{run.name}: {line}", highlight=False, soft_wrap=True)
    for one in comparisons:
        console.print(sentence(one), style="bold", highlight=False, soft_wrap=True)
        if by := other_costs(one):
            console.print(f"  {by}", highlight=False, soft_wrap=True)
        for warning in one.warnings:
            console.print(f"  warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def numbers(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What the page shows, for programs. Scores are fractions; what is not known is null."""
    return {
        "version": 1,
        "headline": headline(runs, comparisons),
        "runs": [
            {
                "run": str(run.folder), "name": run.name, "recipe": run.recipe.get("name"),
                "size": run.config.get("size"), "data": str(run.on), "score": run.on.score, "state": run.state,
                "finished": run.finished, "notes": run.notes, "device": device(run), "machine": run.machine,
                "command": run.config.get("command"), "device_hours": run.hours, "skipped": run.skipped,
                "curve": [asdict(point) for point in run.curve], "end": asdict(run.end) if run.end else None,
                "split": run.result.get("split"), "tokens_kept": run.tokens_kept(),
                "utilisation": run.utilisation()[0], "utilisation_of": run.utilisation()[1],
                "total": asdict(run.total) if run.total else None,
            }
            for run in runs
        ],
        "baseline": [
            {
                "run": one.run.name, "baseline": one.base.name, "said": sentence(one), "reached": one.score,
                "refused": one.refused or None, "warnings": one.warnings,
                **{
                    "device_hours" if cost == "hours" else cost: {
                        "run": one.spent.get(cost, (None, None))[0], "baseline": one.spent.get(cost, (None, None))[1],
                        "ratio": one.ratio(cost),
                    }
                    for cost in COSTS
                },
            }
            for one in comparisons
        ],
        "published": [asdict(one) for one in PUBLISHED],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
