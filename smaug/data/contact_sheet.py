"""Clips of a source with their captions, on one picture: whether text and video belong together is seen at a glance."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from smaug.data.decode import Want
from smaug.data.decode.pyav import PyavDecoder
from smaug.data.frames import FrameSampler, middle_segments
from smaug.data.journal import one_line
from smaug.data.manifest import Sample, Skip

CLIPS, FRAMES, COLUMNS = 24, 4, 3
SIDE = 128  # pixels of a frame
GAP, MARGIN = 2, 24  # between frames; around a clip
TEXT = 15  # pixels of a letter
LINES = 2  # of a caption
NAMED = 6  # bad files
PAPER, INK, GRAY, RED = "white", "#202020", "#808080", "#b00020"
# Pillow looks for them where the system keeps fonts. Its own font, the last resort, knows Latin letters only.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "Arial.ttf", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf",
)  # fmt: skip
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    path: Path, title: str, samples: Sequence[Sample], bad: Sequence[Skip], workers: int, seconds: float
) -> None:
    """Writes a PNG of up to 24 of `samples`, at least one, evenly chosen: four frames in the order of time, the square
    that a model sees, with the first caption, or the name where there is none. `bad` is listed below in red."""
    shown = [samples[i] for i in middle_segments(len(samples), min(CLIPS, len(samples)))]
    decoder = PyavDecoder(workers, seconds)
    got = decoder.decode([Want(s.path, s.kind, FrameSampler().pick(FRAMES)) for s in shown], SIDE)
    decoder.close()

    columns = min(COLUMNS, len(shown))
    strip, line = FRAMES * SIDE + (FRAMES - 1) * GAP, TEXT + 5
    cell = SIDE + 6 + LINES * line + MARGIN
    head = MARGIN + line + MARGIN // 2
    rows = -(-len(shown) // columns)
    below = [f"{skip.name}: {skip.reason}" for skip in bad[:NAMED]]
    below += [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    width = columns * (strip + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, head + rows * cell + len(below) * line + (MARGIN if below else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(at: tuple[int, int], text: str, room: int, lines: int, ink: str) -> None:
        text = one_line(" ".join(text.split()))
        font = font_for(text)
        for number, part in enumerate(wrap(text, room, lines, font.getlength)):
            draw.text((at[0], at[1] + number * line), part, ink, font)

    write((MARGIN, MARGIN), title, width - 2 * MARGIN, 1, INK)
    for number, (sample, one) in enumerate(zip(shown, got, strict=True)):
        left = MARGIN + number % columns * (strip + MARGIN)
        top = head + number // columns * cell
        for place, frame in enumerate([] if one.frames is None else one.frames.numpy()):
            sheet.paste(Image.fromarray(frame), (left + place * (SIDE + GAP), top))
        caption = sample.captions[0] if sample.captions else sample.name
        if one.frames is None:  # it was good a moment ago
            caption, ink = f"{sample.name}: {one.reason}", RED
        else:
            ink = INK if sample.captions else GRAY
        write((left, top + SIDE + 6), caption, strip, LINES, ink)
    for number, text in enumerate(below):
        write((MARGIN, head + rows * cell + number * line), text, width - 2 * MARGIN, 1, RED)
    # A name of its own until it is whole: an earlier sheet stays if the disk is full.
    aside = path.with_name(f".{path.name}.aside")
    sheet.save(aside, "PNG")
    os.replace(aside, path)


def wrap(text: str, room: float, lines: int, length: Callable[[str], float]) -> list[str]:
    """At most `lines` lines that are no longer than `room`, broken at spaces where there are some; "…" for the rest."""
    wrapped: list[str] = []
    while text and len(wrapped) < lines:
        last = len(wrapped) == lines - 1
        end = "…" if last and length(text) > room else ""
        fits = len(text)
        if length(text) > room:
            fits = next((n for n in range(min(len(text), 400), 0, -1) if length(text[:n] + end) <= room), 1)
            space = text.rfind(" ", 0, fits + 1)
            fits = space if space > fits // 2 else fits
        wrapped.append(text[:fits].rstrip() + end)
        text = text[fits:].lstrip()
    return wrapped


@cache
def _fonts() -> list[Font]:
    found: list[Font] = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, TEXT))
        except OSError:
            continue
    return [*found, ImageFont.load_default(TEXT)]


def font_for(text: str) -> Font:
    """The font that has the most of the letters; the first of several."""

    def missing(font: Font) -> int:
        none = bytes(font.getmask("\U0010fffe"))  # what it draws for a letter it lacks
        return sum(bytes(font.getmask(letter)) == none for letter in set(text) - {" "})

    return min(_fonts(), key=missing)
