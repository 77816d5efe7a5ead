"""The figures of the page: score against cost, bars of what was spent, curves of the log lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from smaug.report.compare import Comparison
from smaug.report.published import PUBLISHED, Published
from smaug.report.runs import Run
from smaug.report.words import number

INK, SOFT, GRID = "#1d2329", "#5b6670", "#e3e7eb"
# Okabe and Ito's colours, dark enough on white; with dashes and markers of other periods no two of 42 runs look alike.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a2488a", "#3a9bd1", "#a87400", INK)
DASHES = ("solid", "8px,4px", "2px,3px", "8px,3px,2px,3px", "13px,4px", "13px,3px,2px,3px")
MARKERS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "triangle-down": "▼"}  # in a text
FILLS = ("#0072b2", "#e69f00", "#009e73", "#a2488a", "#56b4e9", "#d55e00", "#b8bfc6", "#f0e442")  # of bars
QUARTERS = [0, 25, 50, 75, 100]  # percent
POINTS = 400  # of a curve that are drawn
Placed = Sequence[tuple[int, Run]]  # runs with their places in the report, which decide how they look
Fills = dict[str, str]  # colours by name


def look(place: int) -> tuple[str, str, str]:
    """Colour, dash and marker of a run."""
    return COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)], list(MARKERS)[place % len(MARKERS)]


def fills_of(names: Iterable[str]) -> Fills:
    return {name: FILLS[place % len(FILLS)] for place, name in enumerate(names)}


def scores(runs: Placed, known: Sequence[Published], data: str, marked: Comparison | None) -> Any:
    """Score against device-hours: a curve and a star a run, published points on the same data, a ratio marked."""
    figure, spent, top = _figure(380), list[float](), 0.01
    for place, run in runs:
        (colour, dash, marker), name = look(place), _text(run.name)
        star = {"mode": "markers", "marker": {"color": colour, "symbol": "star", "size": 14}}
        curve = {
            "mode": "lines+markers", "line": {"color": colour, "dash": dash, "width": 2},
            "marker": {"color": colour, "symbol": marker, "size": 7},
        }  # fmt: skip
        ends = [run.end] if run.end else []
        for points, how, split in ((run.curve, curve, "val"), (ends, star, str(run.result.get("split", "test")))):
            there = [(point, point.hours) for point in points if point.hours]
            spent += [hours for _, hours in there]
            top = max([top, *(point.score for point, _ in there)])
            figure.add_scatter(
                x=[hours for _, hours in there], y=[100 * point.score for point, _ in there], name=name, meta=place,
                customdata=[point.step for point, _ in there], **how,
                hovertemplate=f"<b>{name}</b><br>%{{y:.1f}} % on {_text(split)}<br>%{{x:.3g}} device-hours, step "
                "%{customdata}<extra></extra>",
            )  # fmt: skip
    if known:
        spent += [one.hours for one in PUBLISHED]
        top = 1.1 * max([top, *(one.scores[data] for one in known)])
        figure.add_scatter(
            x=[one.hours for one in known], y=[100 * one.scores[data] for one in known], mode="markers+text",
            text=[one.system for one in known], textposition="top center", textfont={"size": 12},
            marker={"symbol": "diamond-open", "size": 10, "color": INK, "line": {"width": 2}},
            customdata=[
                f"{number(one.hours)} {one.device}-hours<br>{one.cost}; {one.label}<br>{one.source}" for one in known
            ],
            hovertemplate="<b>%{text}</b><br>%{y:.1f} %<br>%{customdata}<extra></extra>",
        )  # fmt: skip
        for cost in (one for one in PUBLISHED if not one.scores):
            figure.add_scatter(
                x=[cost.hours] * 2, y=[0, 108 * top], mode="lines+text", line={"color": SOFT, "dash": "dot"},
                text=["", f" {cost.system}: {cost.cost},<br> its score is not at hand"], textposition="bottom right",
                textfont={"size": 12, "color": SOFT}, hoverinfo="skip",
            )  # fmt: skip
    if marked and marked.score and (ratio := marked.ratio()):
        ends_at, y = [hours or 0.0 for hours in marked.spent["hours"]], 100 * marked.score
        figure.add_scatter(
            x=ends_at, y=[y, y], mode="lines+markers", hoverinfo="skip", line={"color": SOFT, "width": 1},
            marker={"symbol": "line-ns-open", "size": 10, "color": SOFT},
        )  # fmt: skip
        spent += ends_at
        middle = math.log10(math.prod(ends_at)) / 2
        figure.add_annotation(x=middle, y=y, text=f"{ratio:.2f}x", showarrow=False, yshift=10)
    figure.update_xaxes(title_text="device-hours", **_log(spent, *((0.35, 0.3) if known else (0.12, 0.12))))
    figure.update_yaxes(range=[0, 108 * top], ticksuffix=" %")
    return figure


def bars(runs: Sequence[Run], parts: dict[str, list[float]], fills: Fills, unit: str) -> Any:
    """Lying bars, one a run, of `parts` by their names: a value for each run."""
    figure = _figure(52 + 24 * len(runs), barmode="stack", bargap=0.35)
    places = list(range(len(runs)))  # names need not differ once they are short
    for part, values in parts.items():
        figure.add_bar(
            x=values, y=places, orientation="h", name=_text(part), customdata=[_text(run.name) for run in runs],
            marker={"color": fills[part], "line": {"color": "#fff", "width": 1}},
            hovertemplate=f"%{{customdata}}<br>{_text(part)}: %{{x:.3~g}}{unit}<extra></extra>",
        )  # fmt: skip
    names = [run.name if len(run.name) <= 16 else f"{run.name[:7]}…{run.name[-8:]}" for run in runs]
    figure.update_yaxes(tickvals=places, ticktext=[*map(_text, names)], autorange="reversed", showgrid=False)
    figure.update_xaxes(nticks=5)
    if unit == " %":
        figure.update_xaxes(range=[0, 100], tickvals=QUARTERS, ticktext=[f"{part} %" for part in QUARTERS])
    return figure


def curves(runs: Placed, key: str) -> Any:
    """A number of the log lines, by step; of long runs every n-th."""
    figure, percent = _figure(210), key.startswith("val_")
    for place, run in runs:
        rows = [row for row in run.rows if isinstance(row.get(key, ""), int | float | None)]
        colour, dash, marker = look(place)
        drawn = rows[:: stride(len(rows))]
        figure.add_scatter(
            x=[row["step"] for row in drawn], name=_text(run.name), meta=place,
            y=[None if row[key] is None else (100 if percent else 1) * row[key] for row in drawn],
            mode="lines+markers" if len(rows) < 12 else "lines", line={"color": colour, "dash": dash, "width": 1.6},
            marker={"color": colour, "symbol": marker, "size": 6},
            hovertemplate=f"<b>{_text(run.name)}</b><br>step %{{x}}: %{{y:.4~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="step", rangemode="tozero", nticks=6)
    figure.update_yaxes(nticks=5, ticksuffix=" %" if percent else "")
    norms = [row[key] for _, run in runs for row in run.rows if key == "grad_norm" and row.get(key)]
    if norms:
        figure.update_yaxes(**_log(norms))
    return figure


def stride(rows: int) -> int:
    return max(1, math.ceil(rows / POINTS))


def _text(words: str) -> str:
    """Plotly takes some tags in words for what they are in HTML."""
    return escape(words, quote=False)


def _figure(height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go

    base = {
        "template": "none", "height": height, "margin": {"l": 52, "r": 24, "t": 8, "b": 44}, "dragmode": False,
        "font": {"family": 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif', "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": SOFT, "align": "left", "font": {"color": INK}},
        "showlegend": False,
    }  # fmt: skip
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "title_font_size": 13, "title_standoff": 6}
    return go.Figure(layout=base | layout).update_xaxes(**axis).update_yaxes(**axis)


def _log(values: Sequence[float], before: float = 0.05, after: float = 0.05) -> dict[str, Any]:
    """A logarithmic axis with numbers that a person reads; room at its ends in powers of ten."""
    low, high = math.log10(min(values)) - before, math.log10(max(values)) + after
    for steps in ((1,), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        every = [step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in steps]
        ticks = [tick for tick in every if low <= math.log10(tick) <= high]
        if len(ticks) > 2:
            break
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": [number(tick) for tick in ticks]}
