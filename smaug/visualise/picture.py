"""The picture of a clip: a row for each thing that happens to it, a column for each moment."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable

import numpy as np
from PIL import Image

from smaug.visualise.look import Shown

GAP, NAMES, LINE, DPI = 12, 330, 27, 160  # pixels: between cells, for the rows' names, of a line of text; a point is 72
LIGHT = np.array([255, 150, 20])  # of a patch that is looked at


def picture(shown: Shown, what: str, wanted: str) -> bytes:
    """PNG. A moment is shown by its first frame; where words look, once for their mean and in small for each."""
    from matplotlib.figure import Figure  # an optional extra

    moments, size = len(shown.times), shown.frames.shape[1]
    rows = rows_of(shown, wanted)
    # A cell is a whole multiple of the frame, so that all its pixels are squares of one size.
    cell = size * max(1, round(256 / size))
    width = NAMES + moments * (cell + GAP)
    heading = textwrap.wrap(what, width // 14)
    above = [GAP + LINE * titles[0].count("\n") + LINE * bool(titles[0]) for _, _, titles in rows]
    tiles = by_word(shown)
    across = 2 if moments == 1 else 3
    wide = (width - NAMES) // across - GAP
    high = wide * tiles[0][1].shape[0] // tiles[0][1].shape[1] if tiles else 0
    lines = -(-len(tiles) // across)
    height = GAP + LINE * len(heading) + sum(above) + len(rows) * cell + lines * (high + LINE + GAP) + 2 * GAP

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = Image.new("RGB", (width, height), "white")  # of all images: axes for each would take seconds

    def write(x: float, y: float, said: str, points: int, at: str, ha: str = "left") -> None:
        # parse_math: a caption may have dollar signs
        figure.text(x / width, 1 - y / height, said, va=at, ha=ha, fontsize=points, linespacing=1.4, parse_math=False)

    def show(image: np.ndarray, left: int, top: int, high: int, title: str, points: int) -> None:
        wide = round(high * image.shape[1] / image.shape[0])
        how = Image.Resampling.NEAREST if size <= high else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(image).resize((wide, high), how), (left, top))
        write(left + wide / 2, top - 9, title, points, "baseline", "center")

    write(GAP, GAP, "\n".join(heading), 10, "top")
    top = GAP + LINE * len(heading)
    for (name, images, titles), room in zip(rows, above, strict=True):
        top += room
        write(GAP, top + cell / 2, name, 9, "center")
        for moment, (image, title) in enumerate(zip(images, titles, strict=True)):
            show(image, NAMES + moment * (cell + GAP), top, cell, title, 8)
        top += cell
    if tiles:
        beside = ",\nmoments side by side" if moments > 1 else ""
        name = f"each word{beside};\nthe brightest is its own\nstrongest patch"
        write(GAP, top + GAP + lines * (high + LINE + GAP) / 2, name, 9, "center")
    for number, (word, image) in enumerate(tiles):
        down, place = divmod(number, across)
        left, title = NAMES + place * (wide + GAP), short(word, wide // 9)
        show(image, left, top + GAP + LINE + down * (high + LINE + GAP), high, title, 7)
    figure.figimage(np.asarray(canvas))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def rows_of(shown: Shown, wanted: str) -> list[tuple[str, Iterable[np.ndarray], list[str]]]:
    """Name, images (H, W, 3) uint8 of the moments and their titles, of every row."""
    moments = len(shown.times)
    frames, untitled = shown.frames[:: shown.times.shape[1]], [""] * moments
    titles = [f"moment {m}\nframe{'s' * (len(t) > 1)} {' '.join(map(str, t))}" for m, t in enumerate(shown.times)]
    rows: list[tuple[str, Iterable[np.ndarray], list[str]]] = [("clip\nfirst frame of\neach moment", frames, titles)]
    if shown.visible is not None:
        name = f"visible in training\n{shown.visible.sum()} of {shown.visible.size} patches"
        rows.append((name, greyed(frames, shown.visible, 1.0), untitled))
    if shown.rebuilt is not None:
        name = f"rebuilt from the visible,\nerror {shown.error:.2f}; mean and\nspread of the true patches"
        rows.append((name, shown.rebuilt[:: shown.times.shape[1]], untitled))
    for block, there in shown.kept.items():
        name = f"unmasked clip\nafter pruning in block {block}\n{there.sum()} of {there.size} patches"
        rows.append((name, greyed(frames, there, 0.75), untitled))
    if shown.selected is not None:
        name = f"selected for\n{textwrap.fill(short(wanted, 120), 24)}"
        name += f"\n{shown.selected.sum()} of {moments} moments"
        rows.append((name, greyed(frames, shown.selected[:, None, None], 0.75), said_of_moments(shown)))
    if shown.attention is not None:
        seen = shown.attention
        name = (
            f"where the words look,\nmean of {len(seen.words) - 2}, fusion block {seen.block}\n"
            f"{1 - seen.cls[0] - seen.fused[0]:.0%} on patches,\n{seen.fused[0]:.0%} on fused tokens,\n"
            f"{seen.cls[0]:.0%} on [CLS] of moments"
        )
        shares = np.nansum(seen.patches[0], axis=(1, 2))
        there = ~np.isnan(seen.patches[0]).all((1, 2))
        said = [
            f"{share:.0%} on its patches" if fused else "not fused" for share, fused in zip(shares, there, strict=True)
        ]
        rows.append((name, lit(frames, seen.patches[0]), said))
    return rows


def short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def said_of_moments(shown: Shown) -> list[str]:
    """Of each moment whether it was selected, and its score."""
    assert shown.selected is not None
    said = ["kept" if kept else "left out" for kept in shown.selected]
    if shown.scores is None:
        return said
    return [f"{word}, score {score:.3f}" for word, score in zip(said, shown.scores, strict=True)]


def by_word(shown: Shown) -> list[tuple[str, np.ndarray]]:
    """Each word and [CLS] with its moments side by side (H, M * W, 3) uint8."""
    if shown.attention is None:
        return []
    frames = shown.frames[:: shown.times.shape[1]]
    tiles = []
    for word, patches in zip(shown.attention.words[1:], shown.attention.patches[1:], strict=True):
        moments = np.pad(
            lit(frames, patches), [(0, 0), (0, 0), (0, frames.shape[1] // 16), (0, 0)], constant_values=255
        )
        tiles.append((word, np.concatenate([*moments], axis=1)))
    return tiles


def lit(images: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """images (M, H, W, 3) uint8 in dark grey, a patch the brighter the greater its share (M, rows, columns) of the
    greatest, and pale where that is nan."""
    light = np.nan_to_num(shares) / max(np.nanmax(shares), 1e-12)
    grey = images.mean(-1, keepdims=True).repeat(3, -1)
    opacity = 0.85 * pixels(light, images)
    shown = (1 - opacity) * 0.6 * grey + opacity * LIGHT
    return np.where(pixels(np.isnan(shares), images), 0.1 * grey + 205, shown).astype(np.uint8)


def greyed(images: np.ndarray, there: np.ndarray, share: float) -> np.ndarray:
    """images (M, H, W, 3) with `share` of grey over the patches where there (M, rows, columns) is False -> uint8."""
    return np.where(pixels(there, images), images, (1 - share) * images + share * 190).astype(np.uint8)


def pixels(patches: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(M, rows, columns) -> (M, H, W, 1), each patch's value at all its pixels."""
    _, height, width, _ = images.shape
    _, rows, columns = patches.shape
    return patches.repeat(height // rows, axis=1).repeat(width // columns, axis=2)[..., None]
