"""The page of a clip: one HTML file that asks nothing of a network, with the rows of the picture and more to try."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
from PIL import Image

from smaug.data.text import UNK
from smaug.visualise.attention import Attention
from smaug.visualise.look import Shown
from smaug.visualise.picture import said_of_moments, short


def page(shown: Shown, what: str, wanted: str, model: str) -> str:
    """HTML. `what` is the clip, `model` the run, for people. All words of a file or a person are escaped."""
    seen = shown.attention
    template = Template((files("smaug.visualise") / "page.html").read_text("utf-8"))
    return template.substitute(
        title=escape(what),
        heading=escape(what),
        model=escape(model),
        moments=len(shown.times),
        # Small frames are shown as the squares that their pixels are.
        rendering="pixelated" if shown.frames.shape[1] <= 128 else "auto",
        images="\n".join(_images(shown)),
        rows="\n".join(_rows(shown, wanted)),
        numbers="".join(f"<tr><th>{name}</th><td>{said}</td></tr>" for name, said in _numbers(shown, wanted)),
        shares="" if seen is None else _table(seen),
        absent=_absent(shown),
        seen="[]" if seen is None else json.dumps(_opacities(seen)),
    )


def _images(shown: Shown) -> list[str]:
    """Every frame once, as f<moment>-<frame>, and as rebuilt, r<moment>-<frame>; all rows refer to them."""
    _, rows, columns = shown.grid
    made = []
    for letter, frames in (("f", shown.frames), ("r", shown.rebuilt)):
        for number, frame in enumerate([] if frames is None else frames):
            moment, place = divmod(number, shown.times.shape[1])
            png = io.BytesIO()
            Image.fromarray(frame).save(png, "PNG", optimize=True)
            data = base64.b64encode(png.getvalue()).decode()
            made.append(
                f'<image id="{letter}{moment}-{place}" width="{columns}" height="{rows}" preserveAspectRatio="none" '
                f'href="data:image/png;base64,{data}"/>'
            )
    return made


def _rows(shown: Shown, wanted: str) -> list[str]:
    moments, tube = shown.times.shape
    everything = range(moments)
    plain = ["" for _ in everything]
    titles = [f"moment {m}: frame{'s' * (tube > 1)} {' '.join(map(str, t))}" for m, t in enumerate(shown.times)]
    about = "<small>As the model gets it.</small>"
    if tube > 1:
        about = (
            f"<small>A moment is {tube} frames, and a patch lasts through all of them.</small>"
            '<label class="slide" hidden>frame <b id="which">1</b> of each '
            f'<input id="frame" type="range" min="0" max="{tube - 1}" step="1" value="0"></label>'
        )
    rows = [_row("Clip", about, titles, [_use("f", m) for m in everything], shown)]
    if shown.visible is not None:
        cells = [_use("f", m) + _patches(~shown.visible[m], "gone") for m in everything]
        about = f"<p>{_of(shown.visible)} patches</p><small>The others are masked and never read.</small>"
        rows.append(_row("Visible in training", about, plain, cells, shown))
    if shown.rebuilt is not None:
        about = (
            f"<p>error {shown.error:.3f}</p><small>Masked patches as the decoder sees them, each with the "
            "mean and the spread of the true one; an error of 1 is its mean colour.</small>"
            '<label class="slide" hidden>original <input id="mix" type="range" min="0" max="1" step="0.01" value="1" '
            'aria-label="from the original to what is rebuilt"> rebuilt</label>'
        )
        cells = [_use("f", m) + _use("r", m, "rebuilt") for m in everything]
        rows.append(_row("Rebuilt", about, plain, cells, shown))
    for block, there in shown.kept.items():
        about = f"<p>{_of(there)} patches</p><small>Of the unmasked clip, as evaluation sees it.</small>"
        cells = [_use("f", m) + _patches(~there[m], "pruned") for m in everything]
        rows.append(_row(f"After pruning in block {block}", about, plain, cells, shown))
    if shown.selected is not None:
        about = f"<p>{_of(shown.selected)} moments</p><small>For “{escape(short(wanted, 120))}”.</small>"
        whole = np.ones(shown.grid[1:], dtype=bool)
        cells = [_use("f", m) + _patches(whole & ~shown.selected[m], "pruned") for m in everything]
        rows.append(_row("Moments selected", about, said_of_moments(shown), cells, shown))
    if shown.attention is not None:
        rows.append(_words(shown, shown.attention))
    return rows


def _row(name: str, about: str, captions: list[str], cells: list[str], shown: Shown, above: str = "") -> str:
    """A section with a cell for each moment; `about`, captions, cells, and what stands above the cells, are HTML."""
    _, rows, columns = shown.grid
    figures = [
        f"<figure>{f'<figcaption>{caption}</figcaption>' if caption else ''}"
        f'<svg viewBox="0 0 {columns} {rows}" role="img" aria-label="{name}, moment {m}">{cell}</svg></figure>'
        for m, (caption, cell) in enumerate(zip(captions, cells, strict=True))
    ]
    return (
        f"<section><div><h2>{name}</h2>{about}</div>"
        f'<div>{above}<div class="moments">{"".join(figures)}</div></div></section>'
    )


def _words(shown: Shown, seen: Attention) -> str:
    """The row of attention, with a button for each word."""
    cells = []
    opacities = iter(_opacities(seen)[0])
    for m, shares in enumerate(seen.patches[0]):
        rects = "".join(
            f'<rect x="{x}" y="{y}" width="1" height="1" fill-opacity="{next(opacities)}"/>'
            for y, x in np.argwhere(~np.isnan(shares))
        )
        cells.append(f'<g filter="url(#grey)">{_use("f", m)}</g><g class="seen">{rects}</g>')
        cells[-1] += _patches(np.isnan(shares), "hatched", 'fill="url(#hatch)" fill-opacity=".9"')
    buttons = []
    for number, word in enumerate(seen.words):
        tag = "em" if number < 2 else "span"
        buttons.append(
            f'<label data-said="{_said(seen, number)}" data-moments="{";".join(_of_moments(seen, number))}">'
            f'<input type="radio" name="word"{" checked" * (number == 0)}>'
            f"<{tag}>{escape(short(word, 40))}</{tag}></label>"
        )
    unknown = any(word.endswith(f" {UNK}") for word in seen.words)
    notes = f"<small>{UNK}: a word that the model's tokenizer does not know.</small>" * unknown
    notes += f"<small>The model does not take the text's last {seen.cut} words.</small>" * (seen.cut > 0)
    about = (
        f'<p id="said" aria-live="polite">{_said(seen, 0)}</p>'
        '<small><span class="scale"></span> from nothing to the strongest patch of that word. '
        f"{'Hatched: pruned or not fused, so no word can look there.' * bool(np.isnan(seen.patches).any())}</small>"
        f"<small>Fusion block {seen.block}{f' of 0 to {seen.blocks - 1}' if seen.blocks > 1 else ''}, "
        f"mean over {seen.heads} heads.</small>{notes}"
    )
    chooser = (
        '<fieldset class="words" hidden><legend>Point at a word or choose it, by arrow keys too</legend>'
        f"{''.join(buttons)}</fieldset>"
    )
    captions = [f'<span class="share">{said}</span>' for said in _of_moments(seen, 0)]
    return _row("Where the words look", about, captions, cells, shown, chooser)


def _said(seen: Attention, number: int) -> str:
    """What a word looks at, in a sentence of HTML."""
    word, patches = escape(short(seen.words[number], 40)), seen.patches[number]
    return (
        f"{word}: {np.nansum(patches):.1%} on patches, {seen.fused[number]:.1%} on fused tokens, "
        f"{seen.cls[number]:.1%} on the [CLS] of moments. Strongest patch {np.nanmax(patches):.1%}; "
        f"an even share would be {1 / seen.keys:.1%}."
    )


def _of_moments(seen: Attention, number: int) -> list[str]:
    """How much of a word's attention each moment's patches get."""
    return [
        "not fused" if np.isnan(shares).all() else f"{np.nansum(shares):.1%} on patches"
        for shares in seen.patches[number]
    ]


def _opacities(seen: Attention) -> list[list[float]]:
    """Of the light over each patch that is there, in the order of moments, rows and columns; for each word."""
    there = seen.patches[:, ~np.isnan(seen.patches[0])].astype(np.float64)
    return np.round(0.85 * there / np.maximum(there.max(1, keepdims=True), 1e-12), 3).tolist()


def _table(seen: Attention) -> str:
    """The shares of every word, for print and for those who do not see colours."""
    moments = range(seen.patches.shape[1])
    head = ["attention to", *(f"moment {m}" for m in moments), "fused tokens", "[CLS] of moments"]
    lines = []
    for number, word in enumerate(seen.words):
        shares = ["not fused" if np.isnan(some).all() else f"{np.nansum(some):.1%}" for some in seen.patches[number]]
        shares += [f"{seen.fused[number]:.1%}", f"{seen.cls[number]:.1%}"]
        lines.append(f"<tr><th>{escape(short(word, 40))}</th>{''.join(f'<td>{share}</td>' for share in shares)}</tr>")
    return (
        f'<table class="shares"><thead><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _numbers(shown: Shown, wanted: str) -> list[tuple[str, str]]:
    """Name and value, HTML, of what happened to the clip."""
    moments, rows, columns = shown.grid
    found = [
        ("text", escape(wanted)),
        ("frames", f"{len(shown.frames)}, in {moments} moment{'s' * (moments > 1)} of {rows} x {columns} patches"),
    ]
    if shown.visible is not None:
        found.append(("visible in training", f"{_of(shown.visible)} patches"))
    if shown.rebuilt is not None:
        found.append(("error of what is rebuilt", f"{shown.error:.3f}"))
    found += [(f"kept after block {block}", f"{_of(there)} patches") for block, there in shown.kept.items()]
    if shown.selected is not None:
        moments_said = "; ".join(f"moment {m} {said}" for m, said in enumerate(said_of_moments(shown)))
        found.append(("moments fused with the text", f"{_of(shown.selected)}: {moments_said}"))
    if shown.attention is not None:
        found.append(("tokens that words can look at", str(shown.attention.keys)))
    return found


def _absent(shown: Shown) -> str:
    if not shown.absent:
        return ""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in shown.absent)
    return f"<section><h2>Not to be seen here</h2><ul>{sentences}</ul></section>"


def _of(there: np.ndarray) -> str:
    return f"{there.sum()} of {there.size}"


def _use(letter: str, moment: int, kind: str = "frame") -> str:
    return f'<use class="{kind}" href="#{letter}{moment}-0" data-moment="{letter}{moment}"/>'


def _patches(there: np.ndarray, kind: str, more: str = "") -> str:
    """Squares over the patches where there (rows, columns) is True."""
    squares = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(there))
    return f'<path class="{kind}" {more} d="{squares}"/>' if squares else ""
