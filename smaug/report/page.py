"""The page of a report: one HTML file that asks nothing of a network. All words of a file are escaped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from smaug.ledger import REPLAYED
from smaug.report import charts
from smaug.report.compare import COSTS, Comparison
from smaug.report.published import PUBLISHED
from smaug.report.runs import Run
from smaug.report.words import device, headline, hours, number, sentence, short, uncounted

PHASES = (REPLAYED, "forward", "backward", "optimizer", "data", "checkpoint", "evaluation", "rest")
TITLES = {
    "lr": "learning rate", "grad_norm": "norm of the gradients", "clips_per_second": "clips a second",
    "val_t2v_r1": "val, text to video R@1", "val_v2t_r1": "val, video to text R@1", "val_acc": "val, accuracy",
}  # fmt: skip
SUMS = {"step", "clips", "tokens_computed", "tokens_dense", "device_seconds", "data_seconds", "nonfinite_steps"}
PROTOCOL = (
    "Published hours are of pre-training alone, on the authors' devices, without that of the weights it began from; "
    "scores are after fine-tuning, in % (retrieval: R@1, MSR-VTT among 1,000 candidates; questions: accuracy)."
)
ABSENT = "absent"
Figures = dict[str, Any]  # by the id of the element that they go into


def page(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """HTML of a whole report."""
    from plotly.offline import get_plotlyjs

    figures: Figures = {}
    said = headline(runs, comparisons)
    body = [
        *_against(comparisons),
        *_results(runs),
        *_scores(runs, comparisons, figures),
        *_published(runs, figures),
        *_time(runs, figures),
        *_tokens(runs, figures),
        *_curves(runs, figures),
        *_environment(runs),
        "<h2>Each run</h2>",
        *(_each(run, place, len(runs) <= 2) for place, run in enumerate(runs)),
    ]
    made = ",".join(f'"{id}":{figure.to_json()}' for id, figure in figures.items())
    return Template((files("smaug.report") / "page.html").read_text("utf-8")).substitute(
        title=escape(said),
        headline=escape(said),
        about=f"{len(runs)} run{'s' * (len(runs) > 1)}, read {time.strftime('%Y-%m-%d %H:%M %Z')}. A device-hour is an "
        "hour of one device in training, waiting for data and checkpoints included, evaluations left out.",
        body="\n".join(body),
        plotly=get_plotlyjs(),
        figures="{" + made.replace("<", "\\u003c") + "}",
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Cells are HTML. The first column names the row; `numbers` are columns of numbers."""
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        tags = ["th", *[tag] * (len(cells) - 1)]
        made = (
            f"<{t}{' class=n' * (i in right)}>{cell}</{t}>" for i, (t, cell) in enumerate(zip(tags, cells, strict=True))
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def _figure(id: str, title: str = "") -> str:
    return f'<figure>{f"<figcaption>{escape(title)}</figcaption>" * bool(title)}<div id="{id}"></div></figure>'


def _named(run: Run, place: int) -> str:
    """A run's name, with its line and marker as its curves have them."""
    colour, dash, marker = charts.look(place)
    return (
        f'<span class="run"><svg width="36" height="14" aria-hidden="true" stroke="{colour}" fill="{colour}">'
        f'<path d="M0 7h36" stroke-width="2" style="stroke-dasharray:{dash}"/><text x="18" y="11.5" stroke="none" '
        f'text-anchor="middle">{charts.MARKERS[marker]}</text></svg>{escape(run.name)}</span>'
    )


def _filled(fills: charts.Fills) -> str:
    """What the fills of bars stand for."""
    made = (
        f'<span><b aria-hidden="true" style="color:{colour}">■</b> {escape(name)}</span>'
        for name, colour in fills.items()
    )
    return f'<div class="key">{"".join(made)}</div>'


def _lacking(runs: Sequence[Run], why: str) -> Iterator[str]:
    if runs:
        yield f"<p><small>Not here, {why}: {escape(', '.join(run.name for run in runs))}.</small></p>"


def _against(comparisons: Sequence[Comparison]) -> Iterator[str]:
    if not comparisons:
        return
    base = comparisons[0].base.name
    yield f"<h2>Against {escape(base)}</h2>"
    yield from (f"<p>{escape(sentence(one))}.</p>" for one in comparisons if one.refused)
    rows = []
    for one in comparisons:
        if not one.refused:
            mine, theirs = one.spent["hours"]
            cells = [one.run.name, f"{one.run.on.score} {one.score:.1%}", hours(mine), hours(theirs)]
            ratios = [f"{ratio:.2f}x" if (ratio := one.ratio(cost)) else "not known" for cost in COSTS]
            rows.append([escape(cell) for cell in (*cells, *ratios)])
    if rows:
        head = ["run", "both reached on val", "device-hours", f"of {base}", "ratio", "ratio of clips", "ratio of FLOPs"]
        yield _table([escape(cell) for cell in head], rows, range(1, 7))
    warned = dict.fromkeys(warning for one in comparisons for warning in one.warnings)
    yield from (f'<p class="warning">{escape(warning)}</p>' for warning in warned)
    yield (
        "<p><small>The score is the highest that both reached, unless one was asked for. Curves are straight between "
        "their evaluations, and from 0 to the first one. A ratio above 1 is in favour of the run.</small></p>"
    )


def _results(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Results</h2>"
    reached, took = [], []
    for place, run in enumerate(runs):
        best = max((point.score for point in run.curve), default=None)
        cells = [
            f"{run.recipe.get('name', '?')} {run.config.get('size', '')}", f"{run.on.score}, {run.on}",
            f"{run.end.score:.1%}" if run.end else "", "" if best is None else f"{best:.1%}",
            hours(run.hours), run.state,
        ]  # fmt: skip
        reached.append([_named(run, place), *map(escape, cells)])
        cells = [""] * 7
        if total := run.total:
            kept, used, joules = run.tokens_kept(), total.utilisation, total.energy_joules
            cells = [
                short(total.clips), "" if kept is None else f"{kept:.0%}", short(total.flops) if total.flops else "",
                f"{total.flops / total.flops_dense:.0%}" if total.flops_dense else "",
                "" if used is None else f"{used:.1%}", f"{total.peak_bytes / 2**30:.2f} GiB",
                "" if joules is None else f"{number(joules / 3.6e6)} kWh",
            ]  # fmt: skip
        took.append([_named(run, place), *cells])
    head = ["run", "recipe", "score", f"on {_splits(runs)}", "best on val", "device-hours", "state"]
    yield _table(head, reached, (3, 4, 5))
    head = ["run", "clips", "encoder tokens, of dense", "FLOPs", "of dense", "utilisation", "peak memory", "energy"]
    yield _table(head, took, range(1, 8))
    yield (
        "<p><small>Dense: the same batches with nothing masked, pruned or left out. Utilisation: the model's FLOPs by "
        "what the devices could have computed in training. Energy includes evaluations. An empty cell is not "
        "known; each run says why.</small></p>"
    )


def _splits(runs: Sequence[Run]) -> str:
    return escape(" or ".join(sorted({str(run.result.get("split", "test")) for run in runs})))


def _scores(runs: Sequence[Run], comparisons: Sequence[Comparison], figures: Figures) -> Iterator[str]:
    """A chart for each data set, since scores on different ones do not belong on one axis."""
    yield "<h2>Score against device-hours</h2>"
    boxes = (
        f'<label><input type="checkbox" value="{place}" checked>{_named(run, place)}</label>'
        for place, run in enumerate(runs)
    )
    yield f'<div class="key">{"".join(boxes)}</div>'
    marked = next((one for one in comparisons if not one.refused), None)
    for number_, on in enumerate(dict.fromkeys(run.on for run in runs)):
        yield f"<h3>{escape(str(on))}</h3>"
        those = [(place, run) for place, run in enumerate(runs) if run.on == on]
        drawn = [run for _, run in those if any(point.hours for point in [*run.curve, *filter(None, [run.end])])]
        if drawn:
            known = [one for one in PUBLISHED if on.name in one.scores]
            own = marked if marked and marked.run.on == on else None
            figures[f"score{number_}"] = charts.scores(those, known, on.name, own)
            yield _figure(f"score{number_}")
            yield f"<p>Lines: {on.score} on val in training. Stars: on {_splits(drawn)} at the end. {_devices(drawn)}"
            yield f" {PROTOCOL}</p>" if known else "</p>"
        lacking = [run for _, run in those if run not in drawn]
        yield from _lacking([run for run in lacking if run.curve or run.end], "since what its scores cost is not known")
        yield from _lacking([run for run in lacking if not (run.curve or run.end)], "having no score yet")
        stars = [run for run in drawn if run.end and run.end.hours is None]
        yield from _lacking(stars, "as a star, since what its end has cost is not known")


def _devices(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(device(run) for run in runs)
    if len(names) == 1:
        return escape(f"All hours are of {next(iter(names))}{uncounted(runs)}.")
    whose = "; ".join(f"{name} ({', '.join(run.name for run in runs if device(run) == name)})" for name in names)
    return (
        f"Hours are each device's own, not converted, so they are not the same unit: {escape(whose + uncounted(runs))}."
    )


def _published(runs: Sequence[Run], figures: Figures) -> Iterator[str]:
    yield "<h3>Published</h3>"
    names = list(dict.fromkeys(name for one in PUBLISHED for name in one.scores))
    if names[0] not in {run.on.name for run in runs}:
        others = " and ".join(dict.fromkeys(escape(str(run.on)) for run in runs))
        known = [one for one in PUBLISHED if names[0] in one.scores]
        figures["score_published"] = charts.scores([], known, names[0], None)
        yield (
            f"<p>For orientation only: R@1 on {names[0]}, which is other data than {others}, in hours of other "
            f"devices. Neither axis can be read across to the runs' own. {PROTOCOL}</p>"
        )
        yield _figure("score_published")
    rows = [
        [f'{escape(one.system)}<small><a href="{escape(one.source)}">{escape(one.source.removeprefix("https://"))}</a>'
         "</small>", f"{number(one.hours)} {escape(one.device)}", escape(f"{one.cost}; {one.label}"),
         *(f"{100 * one.scores[name]:.1f}" if name in one.scores else "" for name in names)]
        for one in PUBLISHED
    ]  # fmt: skip
    yield _table(["system", "device-hours", "as published", *names], rows, (1, *range(3, 3 + len(names))))


def _time(runs: Sequence[Run], figures: Figures) -> Iterator[str]:
    yield "<h2>Time by phase</h2>"
    known = [run for run in runs if run.phases()]
    if known:
        there = dict.fromkeys(phase for run in known for phase in run.phases())
        order = sorted(there, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES))
        seconds = {p.replace("data", "waiting for data"): [run.phases().get(p, 0.0) for run in known] for p in order}
        whole = [max(1e-9, sum(run.phases().values())) for run in known]
        shares = {p: [100 * v / all_ for v, all_ in zip(own, whole, strict=True)] for p, own in seconds.items()}
        fills = charts.fills_of(seconds)
        in_hours = {p: [v / 3600 for v in own] for p, own in seconds.items()}
        figures |= {
            "hours": charts.bars(known, in_hours, fills, " h"),
            "shares": charts.bars(known, shares, fills, " %"),
        }
        both = _figure("hours", "Device-hours, evaluations included") + _figure("shares", "Shares")
        yield f'{_filled(fills)}<div class="charts">{both}</div>'
        yield "<p><small>The parts of forward, and seconds, are at each run below.</small></p>"
    yield from _lacking([run for run in runs if not run.phases()], "having no ledger")


def _tokens(runs: Sequence[Run], figures: Figures) -> Iterator[str]:
    yield "<h2>Tokens by stage</h2>"
    counts = [(run, run.total.tokens) for run in runs if run.total]
    whys = (why for _, stages in counts for stage in stages.values() for why, count in stage.items() if count)
    fills = charts.fills_of(dict.fromkeys(["computed", *whys]))
    made = []
    for place, stage in enumerate(dict.fromkeys(stage for _, stages in counts for stage in stages)):
        own = [(run, stages[stage]) for run, stages in counts if stage in stages]
        shares = {why: [100 * n.get(why, 0) / max(1, sum(n.values())) for _, n in own] for why in fills}
        parts = {why: values for why, values in shares.items() if any(values)}
        figures[f"tokens{place}"] = charts.bars([run for run, _ in own], parts, fills, " %")
        made.append(_figure(f"tokens{place}", stage.capitalize()))
    if made:
        yield "<p>What each stage computed, and what it was spared, by why. Counts are at each run below.</p>"
        yield f'{_filled(fills)}<div class="charts">{"".join(made)}</div>'
    yield from _lacking([run for run in runs if not run.ledger], "having no ledger")


def _curves(runs: Sequence[Run], figures: Figures) -> Iterator[str]:
    yield "<h2>Losses, scores and rates</h2>"
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in SUMS)
    last = ["lr", "grad_norm", "clips_per_second"]
    made = []
    for place, key in enumerate(sorted(keys, key=lambda key: (key in last, key.startswith("val_"), key != "loss"))):
        figures[f"curve{place}"] = charts.curves(list(enumerate(runs)), key)
        made.append(_figure(f"curve{place}", TITLES.get(key, key)))
    if made:
        yield f'<div class="charts">{"".join(made)}</div>'
        thinned = max(charts.stride(len(run.rows)) for run in runs) > 1
        every = f"Of long runs every n-th log line is drawn, {charts.POINTS} at most; metrics.jsonl has them all."
        yield f"<p><small>Lines as above, where a run can be taken out. {every * thinned}</small></p>"
    yield from _lacking([run for run in runs if not run.rows], "having no log lines")


def _environment(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Environment</h2>"
    facts: dict[str, list[Any]] = {"machine": [run.machine for run in runs]}
    for name in ("way", "dtype", "processes", "smaug"):
        facts[name] = [run.of_turns(name) or "not known" for run in runs]
    facts |= {f"--{name}": [run.config.get(name, "not known") for run in runs] for name in ("fast", "size")}
    yield _values(runs, facts)
    if len(runs) > 1:
        yield "<h3>What differs between their recipes</h3>"
        found = dict(differing([run.recipe for run in runs]))
        yield _values(runs, found) if found else "<p>Nothing, not even the seed.</p>"


def _values(runs: Sequence[Run], facts: dict[str, list[Any]]) -> str:
    """A row for each fact: every value, with the runs that have it where there are several."""
    rows = []
    for fact, values in facts.items():
        whose: dict[str, list[str]] = {}
        for run, value in zip(runs, values, strict=True):
            whose.setdefault(_shown(value), []).append(escape(run.name))
        names = [f" <small>in {', '.join(own)}</small>" * (len(whose) > 1) for own in whose.values()]
        cells = (f"<div>{escape(value)}{name}</div>" for value, name in zip(whose, names, strict=True))
        rows.append([escape(fact), "".join(cells)])
    return _table(["", "value"], rows)


def differing(values: Sequence[Any], at: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Where nested dicts differ: a path with a dot a level, and the value of each."""
    if all(isinstance(value, dict) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            yield from differing([value.get(key, ABSENT) for value in values], f"{at}.{key}" if at else key)
    elif any(value != values[0] for value in values):
        yield at, list(values)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_shown(one)}" for key, one in value.items() if key != "type") or "as it is"
    said = str(value)
    return said if len(said) <= 160 else f"{said[:150]} ... ({len(said)} characters)"


def _each(run: Run, place: int, opened: bool) -> str:
    """All that is known of one run."""
    used, rate = run.utilisation()
    facts = [
        *run.notes,
        f"{run.skipped} file{'s' * (run.skipped != 1)} skipped",
        f"utilisation {used:.1%} of {rate}" if used is not None else f"utilisation not known: {rate}",
        *([f"evaluation: {run.result['protocol']}"] if "protocol" in run.result else []),
    ]
    commands = dict.fromkeys(str(c) for c in (run.config.get("command"), *(turn.command for turn in run.turns)) if c)
    parts = [f"<pre>{escape(one)}</pre><button class=copy type=button>Copy</button>" for one in commands]
    if total := run.total:
        facts.append(f"energy {'not known' if total.energy_joules is None else 'by'}: {run.of_turns('energy_is')}")
        rows = [
            [f"{number_}", escape(turn.began), f"{turn.from_step:,} to {turn.to_step:,}",
             hours(turn.training_seconds / 3600), number(turn.wall_seconds / 60),
             escape(f"{turn.processes} x {turn.device_name}")]
            for number_, turn in enumerate(run.turns, 1)
        ]  # fmt: skip
        head = ["turn", "began", "steps", "device-hours", "minutes in all", "devices"]
        whole = max(1e-9, sum(total.seconds.values()))
        phases = [[escape(p), number(seconds), f"{seconds / whole:.1%}"] for p, seconds in total.seconds.items()]
        tokens = [
            [escape(stage), escape(why), f"{count:,.0f}", f"{count / max(1, sum(counts.values())):.1%}"]
            for stage, counts in total.tokens.items()
            for why, count in counts.items()
        ]
        parts += [
            _table(head, rows, (2, 3, 4)),
            _table(["phase", "device-seconds", "share"], phases, (1, 2)),
            _table(["stage", "", "tokens", "share of the stage"], tokens, (2, 3)),
        ]
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<details{' open' * opened}><summary>{_named(run, place)}</summary><p>{escape(str(run.folder))}: "
        f"{escape(run.state)}.</p><ul>{listed}</ul>{''.join(parts)}</details>"
    )
