"""Runs against a baseline: what each spent to reach the same score, or in words why that cannot be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smaug.report.runs import Point, Run

COSTS = {"hours": "device-hours", "clips": "clips", "flops": "FLOPs"}  # fields of Point


@dataclass(frozen=True)
class Comparison:
    run: Run
    base: Run
    score: float | None  # fraction that both are held to; None if there is none
    spent: dict[str, tuple[float | None, float | None]]  # by cost: the run's, the baseline's; None: never, or not known
    refused: str  # why there is no ratio; "" if there is one
    warnings: list[str]  # what makes the ratio say less than it seems to

    def ratio(self, cost: str = "hours") -> float | None:
        """How many times as much the baseline spent."""
        mine, theirs = self.spent.get(cost, (None, None))
        return theirs / mine if mine and theirs is not None else None


def reached(curve: Sequence[Point], target: float, cost: str = "hours") -> float | None:
    """What a curve had cost when it first met a score; None if it never does, or its costs are not known.

    The curve is straight between its points, and from nothing at a score of 0 to the first of them.
    """
    score = spent = 0.0
    for point in curve:
        now = getattr(point, cost)
        if now is None:
            return None
        if point.score >= target:
            return float(spent + (target - score) / (point.score - score) * (now - spent))
        score, spent = point.score, now
    return None


def compare(run: Run, base: Run, target: float | None) -> Comparison:
    """At `target`, above 0, or at the highest score that both curves reached."""
    refused = _refusal(run, base)
    if refused:
        return Comparison(run, base, None, {}, refused, [])
    best = [max(point.score for point in one.curve) for one in (run, base)]
    score = min(best) if target is None else target
    warnings = _warnings(run, base)
    if score <= 0:
        return Comparison(run, base, None, {}, "one of them never had a score above 0", warnings)
    spent = {cost: (reached(run.curve, score, cost), reached(base.curve, score, cost)) for cost in COSTS}
    for one, top in zip((run, base), best, strict=True):
        if top < score:
            refused += f"{'; ' * bool(refused)}{one.name} did not reach it, its best is {top:.1%}"
        elif one.curve[0].score > score:
            warnings += [f"{one.name} was above it at its first evaluation: its cost is a guess, straight from 0"]
    return Comparison(run, base, score, spent, refused, warnings)


def _refusal(run: Run, base: Run) -> str:
    """What makes scores incomparable."""
    if run.on != base.on:
        other = f"{run.on} and {base.on}"
        if str(run.on) == str(base.on):
            other = f"{run.on} of {run.on.shapes or run.on.files} and of {base.on.shapes or base.on.files}"
        return f"their scores are of different data: {other}"
    for key, what in (
        ("split", "splits"),
        ("candidates", "numbers of candidates"),
        ("questions", "numbers of questions"),
    ):
        mine, theirs = run.result.get(key), base.result.get(key)
        if None not in (mine, theirs) and mine != theirs:
            return f"their scores are of different {what}: {mine} and {theirs}"
    lacking = [one.name for one in (run, base) if not one.curve]
    return f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no curve" if lacking else ""


def _warnings(run: Run, base: Run) -> list[str]:
    """What else than the recipe differs, as far as it is known."""

    def of(one: Run) -> dict[str, str]:
        recipe, turns = one.recipe, one.ledger.turns if one.ledger else []
        data = recipe.get("data") or {}
        frames, top = recipe.get("eval_frames"), recipe.get("eval_top")
        return {
            "machine": one.machine,
            "choice of --fast": str(one.config.get("fast", "")),
            "way": "; then ".join(dict.fromkeys(turn.way for turn in turns)),
            "number of processes": ", ".join(map(str, dict.fromkeys(turn.processes for turn in turns))),
            "set of training data": str(data.get("manifest") or data.get("shapes") or ""),
            "start": str(one.config.get("init") or "its recipe's"),
            "evaluation": "" if top is None else f"{frames or 'as many'} frames, {top} candidates of the match head",
            "source of its hours": "its ledger" if one.ledger else "its log lines",
        }

    mine, theirs = of(run), of(base)
    return [
        f"another {what}: {run.name} has {mine[what]}, {base.name} has {theirs[what]}"
        for what in mine
        if mine[what] != theirs[what] and mine[what] and theirs[what]
    ]
