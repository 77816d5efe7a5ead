"""What the terminal and the page say of runs, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from smaug.report.compare import COSTS, Comparison
from smaug.report.runs import Run


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """With a letter for thousands: 3.44 M."""
    for letter, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {letter}"
    return number(value)


def hours(value: float | None) -> str:
    return "" if value is None else number(value)


def spent(hours: float | None) -> str:
    """Device-hours; few of them in seconds as well."""
    if hours is None:
        return "an unknown number of device-hours"
    return f"{number(hours)} device-hours" + (f" ({number(3600 * hours)} s)" if hours < 0.1 else "")


def device(run: Run) -> str:
    """What the hours are hours of: without the versions."""
    return "; then ".join(dict.fromkeys(one.split(";")[0] for one in run.machine.split("; then ")))


def reached(run: Run) -> str:
    """A run's result as a sentence, for the reader who reads one."""
    point, where = run.end, run.result.get("split", "")
    if point is None and run.curve:
        point, where = max(run.curve, key=lambda one: one.score), "val, its best so far"
    name = str(run.recipe.get("name", "a run"))
    if point is None:
        return f"{name} has no score yet, after {spent(run.hours)} of {device(run)}"
    return (
        f"{name} reached {run.on.score} {point.score:.1%} on {run.on} {where} in {spent(point.hours)} of {device(run)}"
        + uncounted([run])
    )


def uncounted(runs: Sequence[Run]) -> str:
    """What costs leave out: what had trained the weights that fine-tuned runs began from."""
    began = [run.name for run in runs if run.config.get("init")]
    return f", not counting the run that {' and '.join(began)} began from" if began else ""


def headline(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """The result in words: against the baseline if there is one, else of the best on the first run's data."""
    told = [one for one in comparisons if not one.refused]
    if told:
        return sentence(told[0])
    ended = [run for run in runs if run.end and run.on == runs[0].on]
    best = max(ended, key=lambda run: run.end.score if run.end else 0.0, default=runs[0])
    return reached(best) + (f": the best of {len(ended)} runs" if len(ended) > 1 else "")


def sentence(one: Comparison) -> str:
    """reached R@1 = x in y device-hours against z: ratio."""
    pair = f"{one.run.name} and {one.base.name}"
    if one.score is None:
        return f"{pair} are not compared: {one.refused}"
    what = f"{one.run.on.score} = {one.score:.1%} on {one.run.on} val"
    if one.refused:
        return f"{pair} are not compared at {what}: {one.refused}"
    mine, theirs = one.spent["hours"]
    if mine is None or theirs is None:
        return f"{pair} both reached {what}, at a cost that is not known"
    return (
        f"{one.run.name} reached {what} in {spent(mine)} against {spent(theirs)} of {one.base.name}: {one.ratio():.2f}x"
        + uncounted([one.run, one.base])
    )


def other_costs(one: Comparison) -> str:
    """By clips and by FLOPs, on a line."""
    said = []
    for cost in ("clips", "flops"):
        mine, theirs = one.spent.get(cost, (None, None))
        if mine and theirs:
            said += [f"{COSTS[cost]}: {short(mine)} against {short(theirs)}, {theirs / mine:.2f}x"]
        elif not one.refused:
            said += [f"{COSTS[cost]}: not known"]
    return "; ".join(said)
