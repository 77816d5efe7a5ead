"""Runs, read back from their folders: what each reached, what it had cost by then, and in words what is not known.

Costs are those of the ledger. A run of an older smaug has none: its costs are the sums that its log lines hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smaug import ledger
from smaug.data.journal import one_line
from smaug.report.published import NAMES

SCORES = {"retrieval": ("t2v_r1", "R@1"), "qa": ("acc", "accuracy"), "mc": ("acc", "accuracy")}  # by task


@dataclass(frozen=True)
class Point:
    """A score, and what had been spent in training when it was reached. None: not known."""

    step: int
    score: float  # fraction
    hours: float | None  # device-hours, waiting for data included, evaluations left out
    clips: float | None
    flops: float | None  # of the model


@dataclass(frozen=True)
class Evaluated:
    """What scores are scores of; those of equal ones may stand on one axis."""

    name: str  # of a data set that smaug knows; "" for one's own
    files: tuple[str, ...]
    shapes: tuple[int, ...]  # clips of the embedded set: train, val, test
    task: str

    @property
    def score(self) -> str:
        return SCORES[self.task][1]

    def __str__(self) -> str:
        names = " + ".join(one_line(Path(file).name) for file in self.files)
        name = f"{self.name} ({names})" if self.name and names else self.name or names
        return name + {"qa": ", open questions", "mc": ", multiple choice"}.get(self.task, "")


@dataclass(frozen=True)
class Run:
    folder: Path
    name: str  # short, and of one run alone in a report
    config: dict[str, Any]  # config.json, or as much of it as result.json knows
    result: dict[str, Any]  # result.json; empty until a run is finished
    rows: list[dict[str, Any]]  # metrics.jsonl
    ledger: ledger.Ledger | None
    on: Evaluated
    curve: list[Point]  # on the split val, while it trained
    end: Point | None  # on the split of result.json
    hours: float | None  # device-hours of training so far
    finished: bool
    state: str  # finished, or how far it is
    skipped: int  # files
    notes: list[str]  # what a reader of its numbers must know

    @property
    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["recipe"]
        return found

    @property
    def machine(self) -> str:
        if self.ledger and self.ledger.turns:
            return "; then ".join(dict.fromkeys(turn.machine for turn in self.ledger.turns))
        return str(self.config.get("machine", "a machine that is not known"))

    def phases(self) -> dict[str, float]:
        """Device-seconds by phase, forward in one; {} without a ledger."""
        merged: dict[str, float] = {}
        for phase, seconds in (self.ledger.total().seconds if self.ledger else {}).items():
            name = phase.partition(":")[0]
            merged[name] = merged.get(name, 0.0) + seconds
        return merged

    def utilisation(self) -> tuple[float | None, str]:
        """The model's FLOPs as a share of what the devices could have computed in training, and by which rate."""
        if self.ledger is None:
            return None, "without a ledger its FLOPs are not known"
        total = self.ledger.total()
        if not total.rate:
            return None, "no one rate of its devices is known"
        return total.utilisation, f"{total.rate:.3g} FLOP/s ({total.rate_is})"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Each folder once, in their order."""
    once = list({folder.resolve(): folder for folder in folders}.values())
    return [read(folder, name) for folder, name in zip(once, short_names(once), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [one_line(name) for name in names]


def read(folder: Path, name: str) -> Run:
    """A run. ValueError, one line, for a folder that holds none, or a file of it that is damaged beyond use."""
    config, result = _json(folder / "config.json"), _json(folder / "result.json")
    if not config and not result:
        raise ValueError(f"{one_line(str(folder))} {_why_no_run(folder)}")
    notes: list[str] = []
    if not config:
        notes += ["its config.json is missing: the recipe, the command and the machine are what result.json says"]
        config = {key: result[key] for key in ("machine", "size", "init") if key in result}
        config["recipe"] = {"name": result.get("recipe", "unknown"), "task": result.get("task", "retrieval")}
    if not isinstance(config.get("recipe"), dict) or config["recipe"].get("task", "retrieval") not in SCORES:
        raise ValueError(f"{folder / 'config.json'} has no recipe that this version of smaug knows")
    rows = _rows(folder / "metrics.jsonl", notes)
    book: ledger.Ledger | None = None
    if (folder / "ledger.json").exists():
        try:
            book = ledger.read(folder)
        except ValueError as error:
            notes += [f"{error}; so its costs are those of the log lines, without phases"]
    else:
        notes += [
            "no ledger.json, as of an older smaug: device-hours are of steps and of waiting for data, without "
            "checkpoints and without what a kill made to be done again; phases and stages are not known"
        ]
    key = SCORES[config["recipe"].get("task", "retrieval")][0]
    curve = _curve(rows, book, key)
    end = _end(result, book, key)
    last = int(max((row["step"] for row in rows), default=result.get("step", 0)))
    finished = bool(result) and result.get("step", 0) >= last
    return Run(
        folder, name, config, result, rows, book, _evaluated(config["recipe"], result), curve, end,
        hours=_hours(rows, result, book), finished=finished, state=_state(folder, config["recipe"], result, last),
        skipped=_skipped(folder, result), notes=[*notes, *_caveats(config, result, rows, book, curve)],
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def _why_no_run(folder: Path) -> str:
    """... and the nearest that is one."""
    try:
        if folder.is_dir():
            inside = [path.name for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
            if inside:
                return (
                    f"holds no run but {len(inside)} folders that do: name them, as {folder}/* or {folder / inside[0]}"
                )
            return f"holds no run: there is no {folder / 'config.json'}"
        beside = [path.name for path in folder.parent.iterdir() if (path / "config.json").exists()]
    except OSError:
        return f"is not there; there is no folder {folder.parent} either"
    near = get_close_matches(folder.name, beside, n=1, cutoff=0.5)
    what = "is a file, and a run is a folder" if folder.exists() else "is not there"
    return what + (f"; did you mean {folder.parent / near[0]}?" if near else "")


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Log lines in the order of their steps; one that a kill has cut is left out."""
    rows, damaged = [], 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row["step"], int | float) else []
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        notes += [f"{damaged} line{'s' * (damaged > 1)} of its metrics.jsonl cannot be read and are left out"]
    return sorted(rows, key=lambda row: row["step"])


def _curve(rows: list[dict[str, Any]], book: ledger.Ledger | None, key: str) -> list[Point]:
    if book is not None:
        found = [_point(r, key, rows, book) for r in book.results if r.split == "val" and key in r.scores]
    else:
        found = [
            Point(
                int(row["step"]), row[f"val_{key}"], _hours_at(rows, row["step"]), at(rows, row["step"], "clips"), None
            )
            for row in rows
            if row.get(f"val_{key}") is not None
        ]
    return sorted(found, key=lambda point: point.step)


def at(rows: Sequence[dict[str, Any]], step: float, key: str) -> float | None:
    """A running sum at a step, straight between the log lines, from 0 at step 0; None beyond the last one."""
    before, value = 0.0, 0.0
    for row in rows:
        if row.get(key) is None:
            continue
        if row["step"] >= step:
            part = (step - before) / max(1e-9, row["step"] - before)
            return value + part * (float(row[key]) - value)
        before, value = row["step"], float(row[key])
    return None


def _hours_at(rows: list[dict[str, Any]], step: float) -> float | None:
    spent, waited = at(rows, step, "device_seconds"), at(rows, step, "data_seconds")
    return None if spent is None or waited is None else (spent + waited) / 3600


def _point(result: ledger.Result, key: str, rows: list[dict[str, Any]], book: ledger.Ledger) -> Point:
    hours = (result.device_seconds - result.evaluation_seconds) / 3600
    return Point(result.step, result.scores[key], hours, at(rows, result.step, "clips"), _flops(result.step, book))


def _flops(step: int, book: ledger.Ledger) -> float:
    """Spent up to a step, straight within each turn; what was done again counts as often as it was done."""
    spent = 0.0
    for turn in book.turns:
        done = min(step, turn.to_step) - turn.from_step
        if turn.from_step >= step:
            break
        spent += turn.flops * done / max(1, turn.to_step - turn.from_step)
    return spent


def _end(result: dict[str, Any], book: ledger.Ledger | None, key: str) -> Point | None:
    if result.get(key) is None:
        return None
    step = int(result.get("step", 0))
    spent, flops = _hours([], result, book), None
    if book is not None:
        flops = _flops(step, book)
        for one in book.results:
            if one.split != "val" and one.step == step:  # the run may have gone on since
                spent = (one.device_seconds - one.evaluation_seconds) / 3600
    return Point(step, result[key], spent, result.get("clips"), flops)


def _hours(rows: list[dict[str, Any]], result: dict[str, Any], book: ledger.Ledger | None) -> float | None:
    """Of all training so far."""
    if book is not None:
        return book.total().training_seconds / 3600
    for sums in (result, *reversed(rows)):
        if "device_seconds" in sums:
            return float(sums["device_seconds"] + sums.get("data_seconds", 0.0)) / 3600
    return None


def _evaluated(recipe: dict[str, Any], result: dict[str, Any]) -> Evaluated:
    task, data = recipe.get("task", "retrieval"), recipe.get("data")
    if data is None:  # result.json alone
        split = f" {result.get('split', '')}"
        return Evaluated(str(result.get("evaluated_on", "data not known")).removesuffix(split), (), (), task)
    if not data.get("manifest"):
        return Evaluated("shapes", (), tuple(data.get("shapes", ())), task)
    files = tuple(map(str, data.get("eval_manifest") or data["manifest"]))
    form = data.get("format") or ""
    return Evaluated(NAMES.get(form, form), files, (), task)


def _state(folder: Path, recipe: dict[str, Any], result: dict[str, Any], last: int) -> str:
    if result and result.get("step", 0) >= last:
        return f"finished at step {result.get('step', last)}"
    files = [folder / name for name in ("config.json", "metrics.jsonl", "ledger.json")]
    seconds = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    steps = recipe.get("optim", {}).get("steps")
    where = f"at step {last}" + (f" of {steps}" if steps else "") if last else "before its first log line"
    after = f", after a result at step {result.get('step')}" if result else ""
    ago = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )
    return f"not finished{after}: {where}, last written {ago} ago, so it still runs or was stopped"


def _skipped(folder: Path, result: dict[str, Any]) -> int:
    path = folder / "skipped.txt"
    return len(path.read_text(errors="replace").splitlines()) if path.exists() else int(result.get("skipped", 0))


def _caveats(
    config: dict[str, Any], result: dict[str, Any], rows: list[dict[str, Any]], book: ledger.Ledger | None,
    curve: list[Point],
) -> list[str]:  # fmt: skip
    recipe, notes = config["recipe"], []
    if not curve:
        notes += ["no scores along the way, so it has no curve: train with --eval-every N"]
    if config.get("init"):
        notes += [f"it began from {one_line(str(config['init']))}, whose cost is not counted here"]
    model = recipe.get("model", {})
    starts = [model.get("video", {}).get("start"), model.get("text", {}).get("start")]
    if any(starts):
        notes += [f"it began from the weights of {' and '.join(filter(None, starts))}, whose cost is not counted here"]
    data = recipe.get("data") or {}
    if data.get("manifest"):
        own = "eval_manifest" if data.get("eval_manifest") else "manifest"
        notes += [f"val and test are the same files, those of --data.{own.replace('_', '-')}"]
        if own == "manifest":
            notes += ["it was evaluated on pairs that it was trained on"]
    if book is not None:
        devices = list(dict.fromkeys(turn.device_name for turn in book.turns))
        if len(devices) > 1:
            notes += [f"its hours are of several devices, added as they are: {', '.join(devices)}"]
        again = sum(turn.to_step - turn.from_step for turn in book.turns) - max(
            (t.to_step for t in book.turns), default=0
        )
        if again > 0:
            notes += [f"{again} steps were done again after a kill, and are paid for twice"]
    left_out = max((row.get("nonfinite_steps") or 0 for row in rows), default=0)
    if left_out:
        notes += [f"{left_out:.0f} steps were left out, since their gradients were not finite"]
    return notes
