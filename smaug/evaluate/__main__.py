"""Evaluate a run again, on its own test set or on another data set.

python -m smaug.evaluate RUN [--step best] [--frames 12] [--ensemble mean] [--top 128] [--shuffle-frames] [--split val]
python -m smaug.evaluate RUN --format msrvtt --manifest MSRVTT_JSFUSION_test.csv --root videos
python -m smaug.evaluate RUN --task mc --format msrvtt_mc --manifest MSRVTT_mc_test.json --root videos
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from smaug import checkpoint
from smaug.data.annotations import Format, read_answers
from smaug.data.questions import Task
from smaug.data.shapes import DamagedError
from smaug.device import describe
from smaug.evaluate.encode import BATCH
from smaug.evaluate.ensemble import Ensemble
from smaug.evaluate.scores import How, evaluate, print_result, provenance
from smaug.objectives.answer import Answer
from smaug.recipe import Recipe
from smaug.run import load_run, open_split, refuse, reporting, write


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run
    step: int | Literal["newest", "best"] = "newest"  # the checkpoint; best: by the score of --eval-every
    task: Task | None = None  # default: the recipe's; for another one the model was not trained
    frames: int | None = None  # of each clip; default: the recipe's, else as many as in training
    ensemble: Ensemble = "concat"  # of a clip's frames: fused together, or each scored by itself and then aggregated
    top: int | None = None  # candidates of the dual encoder that the match head ranks again; default: the recipe's
    dual_softmax: bool = False  # also t2v_r1_dsl ..., which use all test queries at once
    shuffle_frames: bool = False  # give each clip's frames in a random order
    controls: bool = True  # also score with the frames shuffled, and with nothing pruned or left out
    batch: int = BATCH  # clips encoded at once
    manifest: tuple[Path, ...] = ()  # evaluate on these pairs, what --data.manifest takes; default: the run's own
    format: Format | None = None  # they are annotation files of this data set
    root: Path | None = None  # folder that their paths start from; default: the manifest's own
    answers: Path | None = None  # the closed list of open questions; a classifier has its own
    max_bad: float | None = None  # share of unusable files above which it stops; default: the run's
    split: Literal["val", "test"] = "test"  # of the embedded data set
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Path | None = None  # also write the scores to this file


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.evaluate", description=__doc__)
    console = Console(markup=False)  # a file may be called clip[1].mp4
    try:
        for name in ("frames", "top", "batch"):
            number = getattr(options, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name} must be at least 1")
        run = load_run(options.run, options.device, options.step)
        recipe = on_other_data(run.recipe, options)
        others: dict[str, object] = {"--answers": options.answers} if recipe.task != "qa" else {}
        if recipe.task != "retrieval":
            others |= {"--top": options.top, "--dual-softmax": options.dual_softmax}
        if named := [flag for flag, value in others.items() if value]:
            raise ValueError(f"{' and '.join(named)} would change nothing: this evaluates the task {recipe.task}")
        clips = open_split(recipe, options.split, console, run.way.device)
        how = How(
            options.frames,
            options.top,
            options.ensemble,
            options.shuffle_frames,
            options.controls,
            options.dual_softmax,
            options.batch,
            closed_list(recipe, options, console),
        )
        with reporting(console) as report:
            result = evaluate(
                run.model, recipe, clips, run.tokenizer, run.way, how=how, split=options.split, report=report
            )
        result |= provenance(run.recipe.data, recipe.data) | {
            "step": run.step,
            "batch": run.batch,
            "checkpoint": checkpoint.fingerprint(options.run / "checkpoints", run.step),
            "machine": describe(run.way.device),
        }
        print_result(console, result)
        if options.json:
            write(options.json, json.dumps(result, indent=2))
        return 0
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


def closed_list(recipe: Recipe, options: Options, console: Console) -> tuple[str, ...]:
    """The answers of --answers; of the embedded data set those of its training questions."""
    if options.answers is not None:
        return tuple(read_answers(options.answers))
    trained = any(isinstance(objective, Answer) for objective in recipe.objectives.values())
    if recipe.task != "qa" or trained or recipe.data.manifest:
        return ()
    return tuple(sorted({sample.answers[0] for sample in open_split(recipe, "train", console).samples}))


def on_other_data(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with the data that the command line names, if it names any, to evaluate on."""
    data = recipe.data
    if options.manifest:
        data = replace(
            data,
            manifest=options.manifest,
            eval_manifest=options.manifest,
            format=options.format,
            root=options.root,
            video_column="video",
            image_column="image",
            caption_column="caption",
        )
    elif options.format or options.root:
        raise ValueError("--format and --root say how to read a --manifest; name the file or files to evaluate on")
    if options.max_bad is not None:
        data = replace(data, max_bad=options.max_bad)
    return replace(recipe, data=data, task=options.task or recipe.task)


if __name__ == "__main__":
    sys.exit(main())
