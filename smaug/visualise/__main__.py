"""One clip as a trained model treats it: `python -m smaug.visualise RUN CLIP [--text "..."]`.

Writes a picture (PNG) and a page for a browser (HTML, one file): the clip, what is masked, rebuilt, pruned and selected
of it, and where each word of the text looks.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from smaug.data.clips import Clips
from smaug.data.decode import open_decoder
from smaug.data.journal import one_line
from smaug.data.loader import middle_frames
from smaug.data.manifest import Sample, clean, near_file
from smaug.data.media import IMAGES, VIDEOS, file_reason, kind_of
from smaug.data.shapes import DamagedError
from smaug.run import Run, load_run, open_split, refuse
from smaug.visualise.look import look
from smaug.visualise.page import page
from smaug.visualise.picture import picture, short


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # folder of a run
    # a video or an image; or a clip's number in the evaluation data, from 0
    clip: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLIP")]
    text: str | None = None  # to select moments for, and to look at the patches; default: the clip's first caption
    out: Path | None = None  # both files' name, without .png and .html, or folder; default: the clip's name and -look
    block: int = -1  # of the fusion encoder, where the words look; from 0, or negative from the end
    split: Literal["val", "test"] = "test"  # of the embedded data set, where CLIP is a number
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.visualise", description=__doc__)
    console = Console(markup=False)  # a file may be called clip[1].mp4
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("drawing needs matplotlib: pip install -c constraints.txt -e '.[plots]'")
        if options.out is not None and not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        run = load_run(options.run, options.device)
        clips, number, what = open_clip(options, run, console)
        sample = clips.samples[number]
        out = name_files(options.out, sample)
        frames = run.recipe.test_frames
        run.model.video.config.times(frames)  # raises for a number that does not fill the tubes
        groups, bad = middle_frames(clips, [number], frames, view=run.model.video.config.view)
        if bad:
            raise ValueError(f"{bad[0].name}: {bad[0].reason}")

        [wanted] = clean([sample.captions[0] if options.text is None else options.text]) or [""]
        if not wanted:
            raise ValueError("--text is empty: write what the clip is asked for, such as --text 'a dog runs'")
        shown = look(run, groups[0], wanted, options.block)
        what = one_line(f'{what}, "{short(wanted, 160)}"')
        with warnings.catch_warnings(record=True) as warned:
            drawn = picture(shown, what, wanted)
        model = f"recipe {run.recipe.name}, step {run.step}; {one_line(str(options.run))}"
        whole = page(shown, what, wanted, model)
        for path, data in zip(out, (drawn, whole.encode()), strict=True):
            write(path, data)
        console.print(f"{'clip':<11}{what}", highlight=False, soft_wrap=True)
        console.print(f"{'wrote':<11}{out[0]} and {out[1]}", highlight=False, soft_wrap=True)
        if any("missing from font" in str(one.message) for one in warned):
            console.print(f"{'note':<11}the picture's font lacks letters of this text; the page has them all")
        return 0
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


def open_clip(options: Options, run: Run, console: Console) -> tuple[Clips, int, str]:
    """Clips, the number of the one that is asked for, of the evaluation data or of a file alone, and what it is."""
    if options.clip.isdecimal():
        clips, number = open_split(run.recipe, options.split, console, run.way.device), int(options.clip)
        if number >= len(clips):
            raise ValueError(f"clip {number}: {clips.name} has the clips 0 to {len(clips) - 1}")
        return clips, number, f"clip {number} of {clips.name}"
    path, data = Path(options.clip), run.recipe.data
    reason, kind = file_reason(path), kind_of(path.suffix[1:])
    if reason:
        near = near_file(path) if reason == "file not found" else ""
        raise ValueError(f"{one_line(options.clip)}: {reason}{near}; a clip is a file, or a number of the data")
    if kind is None:
        known = ", ".join(sorted(VIDEOS | IMAGES))
        raise ValueError(f"{one_line(options.clip)}: neither video nor image by its ending; known are {known}")
    if options.text is None:
        raise ValueError(f"{one_line(options.clip)} has no caption: say with --text what it is asked for")
    sample = Sample(path, kind, (options.text,), path.name)
    decoder = open_decoder(data.decoder, run.way.device, 1, data.clip_seconds)
    size = run.recipe.model.video.image_size
    return Clips(path.name, [sample], size, decoder, sampler=data.sampler), 0, path.name


def name_files(asked: Path | None, sample: Sample) -> tuple[Path, Path]:
    """The picture and the page. Raises ValueError where one of them would take the clip's place."""
    own = f"{Path(sample.name).stem}-look"
    out = Path(own) if asked is None else asked / own if asked.is_dir() else asked
    name = out.stem if out.suffix in (".png", ".html") else out.name
    files = out.with_name(f"{name}.png"), out.with_name(f"{name}.html")
    for file in files:
        if isinstance(sample.path, Path) and file.exists() and file.samefile(sample.path):
            raise ValueError(f"--out {asked}: {file} is the clip itself; choose another name")
    return files


def write(path: Path, data: bytes) -> None:
    """Whole or not at all: what was there stays when the disk is full."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
