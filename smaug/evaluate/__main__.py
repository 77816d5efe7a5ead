"""Evaluate a run again: `python -m smaug.evaluate RUN [--frames N] [--shuffle-frames] [--split val]`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from smaug.data.shapes import DamagedError
from smaug.device import describe
from smaug.evaluate.scores import evaluate, print_result
from smaug.run import load_run, open_split, refuse


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run
    frames: int | None = None  # of each clip; default: as many as in training
    shuffle_frames: bool = False  # give each clip's frames in a random order
    split: Literal["val", "test"] = "test"  # of the embedded data set
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Path | None = None  # also write the scores to this file


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.evaluate", description=__doc__)
    console = Console(markup=False)  # a file may be called clip[1].mp4
    try:
        if options.frames is not None and options.frames < 1:
            raise ValueError("--frames must be at least 1")
        run = load_run(options.run, options.device)
        clips = open_split(run.recipe, options.split, console, run.way.device)
        result = evaluate(
            run.model, run.recipe, clips, run.tokenizer, run.way, frames=options.frames, shuffle=options.shuffle_frames
        )
        result |= {"step": run.step, "machine": describe(run.way.device)}
        print_result(console, result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2))
        return 0
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
