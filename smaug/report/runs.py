"""Runs, read back from their folders: what each reached, what it had cost by then, and in words what is not known.

Costs are those of the ledger, and without one they are not known.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smaug import ledger
from smaug.data.journal import one_line
from smaug.ledger import Turn
from smaug.report.published import NAMES

SCORES = {"retrieval": ("t2v_r1", "R@1"), "qa": ("acc", "accuracy"), "mc": ("acc", "accuracy")}  # by task


@dataclass(frozen=True)
class Point:
    """A score, and what had been spent in training when it was reached. None: not known."""

    step: int
    score: float  # fraction
    hours: float | None  # device-hours, waiting for data included, evaluations left out
    clips: int | None
    flops: float | None  # of the model


@dataclass(frozen=True)
class Evaluated:
    """What scores are scores of; those of equal ones may stand on one axis."""

    name: str  # of a data set that smaug knows; "" for one's own
    files: tuple[str, ...]  # names; of one's own, which may be called the same, whole paths
    shapes: tuple[int, ...]  # clips of the embedded set: val, test
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
    config: dict[str, Any]  # config.json
    result: dict[str, Any]  # result.json; empty until a run is finished
    rows: list[dict[str, Any]]  # metrics.jsonl
    ledger: ledger.Ledger | None
    on: Evaluated
    curve: list[Point]  # on the split val, while it trained
    end: Point | None  # on the split of result.json
    finished: bool
    state: str  # finished, or how far it is
    skipped: int  # files
    notes: list[str]  # what a reader of its numbers must know

    @property
    def recipe(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["recipe"]
        return found

    @functools.cached_property
    def total(self) -> Turn | None:
        return self.ledger.total() if self.ledger else None

    @property
    def hours(self) -> float | None:
        """Device-hours of training so far."""
        return self.total.training_seconds / 3600 if self.total else None

    @property
    def turns(self) -> list[Turn]:
        """Those that were recorded: not what a run had done before there were ledgers, see `ledger.behind`."""
        return [turn for turn in self.ledger.turns if turn.device] if self.ledger else []

    def of_turns(self, name: str) -> str:
        """What its turns say, or else its configuration; "" if neither does."""
        values = [str(getattr(turn, name)) for turn in self.turns] or [str(self.config.get(name, ""))]
        return "; then ".join(dict.fromkeys(values))

    @property
    def machine(self) -> str:
        return self.of_turns("machine") or "a machine that is not known"

    def phases(self) -> dict[str, float]:
        """Device-seconds by phase, forward in one; {} without a ledger."""
        merged: dict[str, float] = defaultdict(float)
        for phase, seconds in (self.total.seconds if self.total else {}).items():
            merged[phase.partition(":")[0]] += seconds
        return dict(merged)

    def tokens_kept(self) -> float | None:
        """Share of a dense model's tokens that its encoders have computed."""
        computed, dense = ledger.encoded(self.total.tokens) if self.total else (0, 0)
        return computed / dense if dense else None

    def utilisation(self) -> tuple[float | None, str]:
        """The model's FLOPs as a share of what the devices could have computed in training, and by which rate."""
        if self.total is None:
            return None, "without a ledger its FLOPs are not known"
        if self.total.utilisation is None:
            return None, "it has not trained yet" if self.total.rate else "no one rate of its devices is known"
        return self.total.utilisation, f"{self.total.rate:.3g} FLOP/s ({self.total.rate_is})"


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
    if not config:
        raise ValueError(f"{one_line(str(folder))} {_why_no_run(folder)}")
    notes: list[str] = []
    if not isinstance(config.get("recipe"), dict) or config["recipe"].get("task", "retrieval") not in SCORES:
        raise ValueError(f"{folder / 'config.json'} has no recipe that this version of smaug knows")
    rows = _rows(folder / "metrics.jsonl", notes)
    book: ledger.Ledger | None = None
    try:
        book = ledger.read(folder)
    except ValueError as error:
        notes += [f"what it has cost is not known: {error}"]
    key = SCORES[config["recipe"].get("task", "retrieval")][0]
    curve = _curve(rows, book, key)
    end = _end(result, book, key)
    last = int(max([result.get("step", 0), *(row["step"] for row in rows)]))
    finished = bool(result) and result.get("step", 0) >= last
    state = f"finished at step {last}" if finished else _unfinished(folder, config["recipe"], result, last)
    return Run(
        folder, name, config, result, rows, book, _evaluated(config["recipe"]), curve, end, finished, state,
        skipped=_skipped(folder, result), notes=[*notes, *_caveats(config, rows, book, curve)],
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
    """In the order of time, which after a kill is not that of the steps; first what was scored before there was a
    ledger, at costs that nobody knows."""
    results = book.results if book else ()
    known = [_point(one, key) for one in results if one.split == "val" and key in one.scores]
    first = known[0].step if known else math.inf
    scored = [row for row in rows if row.get(f"val_{key}") is not None and row["step"] < first]
    return [Point(int(row["step"]), row[f"val_{key}"], None, None, None) for row in scored] + known


def _point(result: ledger.Result, key: str) -> Point:
    return Point(result.step, result.scores[key], result.training_seconds / 3600, result.clips, result.flops)


def _end(result: dict[str, Any], book: ledger.Ledger | None, key: str) -> Point | None:
    """The score of result.json, at its cost when it was first reached: the run may have gone on since."""
    if result.get(key) is None:
        return None
    step = int(result.get("step", 0))
    same = (one for one in (book.results if book else ()) if (one.step, one.scores.get(key)) == (step, result[key]))
    first = next(same, None)
    return _point(first, key) if first else Point(step, result[key], None, None, None)


def _evaluated(recipe: dict[str, Any]) -> Evaluated:
    task, data = recipe.get("task", "retrieval"), recipe.get("data") or {}
    if not data.get("manifest"):
        return Evaluated("shapes", (), tuple(data.get("shapes", ())[1:]), task)
    files = tuple(map(str, data.get("eval_manifest") or data["manifest"]))
    form = data.get("format") or ""
    return Evaluated(NAMES.get(form, form), tuple(Path(file).name for file in files) if form else files, (), task)


def _unfinished(folder: Path, recipe: dict[str, Any], result: dict[str, Any], last: int) -> str:
    files = [folder / name for name in ("config.json", "metrics.jsonl", "ledger.json")]
    seconds = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    steps = recipe.get("optim", {}).get("steps")
    where = f"at step {last}" + (f" of {steps}" if steps else "") if last else "before its first log line"
    after = f", after a result at step {result.get('step')}" if result else ""
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
    return (
        f"not finished{after}: {where}, last written {seconds / size:.0f} {unit} ago, so it still runs or was stopped"
    )


def _skipped(folder: Path, result: dict[str, Any]) -> int:
    path = folder / "skipped.txt"
    return len(path.read_text(errors="replace").splitlines()) if path.exists() else int(result.get("skipped", 0))


def _caveats(
    config: dict[str, Any], rows: list[dict[str, Any]], book: ledger.Ledger | None, curve: list[Point]
) -> list[str]:
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
        if unknown := sum(turn.steps for turn in book.turns if not turn.device):
            notes += [f"of its first {unknown} steps the hours are known, but not their phases, tokens and FLOPs"]
        devices = list(dict.fromkeys(turn.device_name for turn in book.turns if turn.device))
        if len(devices) > 1:
            notes += [f"its hours are of several devices, added as they are: {', '.join(devices)}"]
        again = sum(turn.to_step - turn.from_step for turn in book.turns) - max(turn.to_step for turn in book.turns)
        if again > 0:
            notes += [f"{again} steps were done again after a kill, and are paid for twice"]
    left_out = max((row.get("nonfinite_steps") or 0 for row in rows), default=0)
    if left_out:
        notes += [f"{left_out:.0f} steps were left out, since their gradients were not finite"]
    return notes
