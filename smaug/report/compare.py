"""Runs against a baseline: what each spent to reach the same score, or in words why that cannot be said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from smaug.report.runs import Run

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


def reached(curve: Iterable[tuple[float, float | None]], target: float) -> float | None:
    """What a curve of (score, cost) had cost when it first met a score; None if it never does, or a cost is not known.

    The curve is straight between its points, and from nothing at a score of 0 to the first of them.
    """
    before = spent = 0.0
    for score, cost in curve:
        if cost is None:
            return None
        if score >= target:
            return spent + (target - before) / (score - before) * (cost - spent)
        before, spent = score, cost
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

    def of(one: Run, cost: str) -> float | None:
        return reached([(point.score, getattr(point, cost)) for point in one.curve], score)

    spent = {cost: (of(run, cost), of(base, cost)) for cost in COSTS}
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
    for key in ("split", "candidates", "questions"):
        mine, theirs = run.result.get(key), base.result.get(key)
        if None not in (mine, theirs) and mine != theirs:
            return f"their scores differ in {key}: {mine} and {theirs}"
    lacking = [one.name for one in (run, base) if not one.curve]
    return f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no curve" if lacking else ""


def _warnings(run: Run, base: Run) -> list[str]:
    """What else than the recipe differs, as far as it is known."""

    def of(one: Run) -> dict[str, str]:
        recipe, data = one.recipe, one.recipe.get("data") or {}
        frames = recipe.get("eval_frames") or recipe.get("model", {}).get("video", {}).get("frames")
        top = recipe.get("eval_top")
        return {
            "machine": one.machine,
            "choice of --fast": str(one.config.get("fast", "")),
            "way": one.of_turns("way"),
            "number of processes": one.of_turns("processes"),
            "set of training data": str(data.get("manifest") or data.get("shapes") or ""),
            "start": str(one.config.get("init") or "its recipe's"),
            "evaluation": "" if None in (frames, top) else f"{frames} frames, {top} candidates of the match head",
        }

    mine, theirs = of(run), of(base)
    return [
        f"another {what}: {run.name} has {mine[what]}, {base.name} has {theirs[what]}"
        for what in mine
        if mine[what] != theirs[what] and mine[what] and theirs[what]
    ]
