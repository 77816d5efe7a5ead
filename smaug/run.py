"""A run: what is made from a recipe, and the folder that remembers it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from smaug import checkpoint, recipe
from smaug.data.annotations import read_answers
from smaug.data.clips import CPU, Clips, open_manifest, open_shapes
from smaug.data.loader import Loader
from smaug.data.shapes import Report, naming
from smaug.device import Way, choose
from smaug.model.model import Model
from smaug.model.position import more_places, resample_time
from smaug.objectives.answer import Answer, Classifier, Speller
from smaug.objectives.mc import Mc
from smaug.objectives.mlm import Mlm
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A trained model, read back from its folder."""

    recipe: Recipe
    model: Model
    tokenizer: Tokenizer
    way: Way
    step: int
    batch: int  # pairs a step that it was trained with


def load_run(folder: Path, device: str = "auto", which: checkpoint.Which = "newest") -> Run:
    """The newest whole checkpoint of a run, the best one, or that of a step, in the precision of its training; with its
    averaged weights if it has them. Says on stderr which damaged ones it passed over."""
    config = read_config(folder)
    saved = recipe.from_json(config["recipe"])
    way = choose(config["fast"], device)
    tokenizer = read_tokenizer(folder)
    model = build(saved, tokenizer.get_vocab_size(), way.impl).to(way.device)
    checkpoints = folder / "checkpoints"
    state, damaged = checkpoint.load(checkpoints, model, ema=model.state_dict(), which=which)
    if state is None:
        lacks = f"{folder} has no checkpoint to evaluate; train it first"
        if which != "newest":
            asked = "with a score, which --eval-every gives" if which == "best" else f"of step {which} that is whole"
            there = ", ".join(map(str, checkpoint.steps(checkpoints))) or "none"
            lacks = f"{folder} has no checkpoint {asked}; its steps are: {there}"
        raise ValueError(" ".join([*damaged, lacks]))
    warn(damaged)
    clips = state.get("totals", {}).get("clips", 0)
    return Run(saved, model, tokenizer, way, state["step"], round(clips / max(1, state["step"])) or saved.data.batch)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    missing = [key for key in ("recipe", "fast", "size") if key not in config]
    if missing and "model_type" in config:
        raise ValueError(f"{folder} holds a model for Hugging Face, not a run; name the run that it was exported from")
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it was not written by this version of smaug, or is damaged"
        )
    return config


def read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no tokenizer: there is no {path}") from None
    except Exception as error:  # tokenizers has no type of its own for a file that is damaged
        raise ValueError(f"{path} is damaged: {error}") from None


def build(recipe: Recipe, vocabulary: int, impl: str) -> Model:
    pairs = any(isinstance(objective, Vtm | Mlm | Mc | Answer) for objective in recipe.objectives.values())
    if pairs != (recipe.model.fusion.depth > 0):
        raise ValueError(
            "vtm, mlm, mc and answer need --model.fusion.depth of at least 1, and a fusion encoder needs one of them"
        )
    heads = {name: objective.heads(recipe.model, vocabulary) for name, objective in recipe.objectives.items()}
    return Model(recipe.model, vocabulary, heads, impl)


def with_answers(recipe: Recipe, clips: Clips) -> Recipe:
    """The recipe with the list of answers that its questions are classes of, if it has any: that of --data.answers, or
    the most frequent ones of training; of equally frequent ones the first in the alphabet."""
    objectives = dict(recipe.objectives)
    for name, objective in objectives.items():
        if isinstance(objective, Answer) and not objective.answers:
            said = Counter(sample.answers[0] for sample in clips.samples)
            ranked = sorted(said, key=lambda answer: (-said[answer], answer))[: objective.top]
            answers = read_answers(recipe.data.answers) if recipe.data.answers else ranked
            if said.keys().isdisjoint(answers):
                raise ValueError(
                    f"{recipe.data.answers} has none of the answers of training, such as {ranked[0]!r}; "
                    "they are compared letter for letter"
                )
            objectives[name] = replace(objective, answers=tuple(answers))
    return replace(recipe, objectives=objectives)


def with_pools(recipe: Recipe, pairs: int, processes: int, begins: bool) -> Recipe:
    """The recipe with the pools of negatives of a run by several processes, of `pairs` each: those that it begins with.

    They stay as they are when the run goes on with fewer. With more it cannot, since nobody would have all of a pool.
    """
    objectives = dict(recipe.objectives)
    for name, objective in objectives.items():
        if isinstance(objective, Vtm) and processes > 1:
            among = objective.among or (pairs if begins else pairs * processes)
            if pairs % among:
                raise ValueError(
                    f"negatives are drawn among {among} pairs, and each of {processes} processes has {pairs}, which is "
                    f"no multiple. Use fewer processes, or begin a run with --objectives.{name}.among {pairs}"
                )
            objectives[name] = replace(objective, among=among)
    return replace(recipe, objectives=objectives)


def start_from(model: Model, made: Recipe, folder: Path) -> str:
    """Loads what fits of another run's newest checkpoint -> a sentence that names what did not, and what stays new.

    The table of times is stretched to the model's moments, those of words' places go on as `more_places` says. Classes
    of answers keep the weights of the same answers. A decoder of answers starts from the fusion encoder, as
    Singularity's does (Lei et al. 2023, appendix). `made` is the recipe that the model was built from.
    """
    saved, step, damaged = checkpoint.load_weights(folder / "checkpoints")
    warn(damaged)
    own = model.state_dict()
    before, kept_answers = recipe.from_json(read_config(folder)["recipe"]).objectives, ""
    for name, head in model.heads.items():
        at, was, now = f"heads.{name}.", before.get(name), made.objectives[name]
        if isinstance(head, Speller) and f"{at}word.weight" not in saved:
            layers = {k: v for k, v in saved.items() if k.startswith("fusion.")}
            saved |= {f"{at}layers.{k.removeprefix('fusion.')}": v for k, v in layers.items()}
            saved |= {at + k: saved[f"text.{k}"] for k in ("word.weight", "position")}
        if isinstance(head, Classifier) and isinstance(now, Answer) and isinstance(was, Answer):
            kept = {answer: place for place, answer in enumerate(was.answers)}
            pairs = [(kept[answer], place) for place, answer in enumerate(now.answers) if answer in kept]
            theirs, ours = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
            for key in (f"{at}scores.weight", f"{at}scores.bias"):
                if key in saved and saved[key].shape[1:] == own[key].shape[1:]:
                    saved[key] = own[key].cpu().index_copy(0, ours, saved[key][theirs])
                    kept_answers = f"; {len(pairs)} of {len(now.answers)} answers are its own"
    if len(saved["video.time"]) != len(own["video.time"]):
        saved["video.time"] = resample_time(saved["video.time"], len(own["video.time"]))
    for key in ("text.position", *(f"heads.{n}.position" for n, h in model.heads.items() if isinstance(h, Speller))):
        if len(saved[key]) != len(own[key]):
            saved[key] = more_places(saved[key], len(own[key]))
    fit = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fit, strict=False)

    def rooms(keys: Iterable[str]) -> str:
        return ", ".join(sorted({".".join(key.split(".")[: 2 if key.startswith("heads.") else 1]) for key in keys}))

    said = f"{folder}, step {step}: {len(fit)} of {len(own)} tensors{kept_answers}"
    if new := rooms(own.keys() - fit.keys()):
        said += f"; new in {new}"
    if unused := rooms(saved.keys() - fit.keys()):
        said += f"; left out of {unused}"
    return said


def open_loader(recipe: Recipe, clips: Clips, tokenizer: Tokenizer, rank: int = 0, ranks: int = 1) -> Loader:
    """Training batches, or a process' share of them, with the words masked that the contrast and mlm ask for."""
    return Loader(
        clips,
        tokenizer,
        recipe.data,
        frames=recipe.model.video.frames,
        view=recipe.model.video.view,
        max_words=recipe.model.text.max_words,
        sep=recipe.model.text.sep,
        text_mask=recipe.text_mask,
        mlm_ratio=next((o.ratio for o in recipe.objectives.values() if isinstance(o, Mlm)), 0.0),
        answers=next((o.answers for o in recipe.objectives.values() if isinstance(o, Answer)), ()),
        spell=any(isinstance(o, Answer) and o.by == "decoder" for o in recipe.objectives.values()),
        seed=recipe.seed,
        rank=rank,
        ranks=ranks,
    )


def open_split(recipe: Recipe, split: str, console: Console, device: torch.device = CPU) -> Clips:
    """The clips to train on (`train`), or those to evaluate on. Says what they are, and builds `shapes` if needed."""
    size, data = recipe.model.video.image_size, recipe.data
    if data.manifest:
        own = split != "train" and data.eval_manifest
        clips = open_manifest(data.eval_manifest if own else data.manifest, data, size, device, recipe.task)
        videos = sum(s.kind == "video" for s in clips.samples)
        what = f"{clips.name}, {videos} videos and {len(clips) - videos} images; decoder {clips.decoder.name}"
        if recipe.task != "retrieval":
            asked = len({sample.path for sample in clips.samples})
            what = f"{clips.name}, {len(clips)} questions about {asked} videos; decoder {clips.decoder.name}"
        if clips.skipped:
            what += f"; {len(clips.skipped)} left out, such as {clips.skipped[0].name}: {clips.skipped[0].reason}"
        if split != "train" and not own:
            what += "; these are training pairs, since no --data.eval-manifest was given"
    else:
        with reporting(console, "data       ") as report:
            clips = open_shapes(split, data, size, report, device, recipe.task)
        what = f"{clips.name}, {len(clips)} {'clips' if recipe.task == 'retrieval' else 'questions'}"
    console.print(f"{'data' if split == 'train' else 'evaluated':<11}{what}", highlight=False, soft_wrap=True)
    return clips


@contextmanager
def reporting(console: Console, log: str = "") -> Iterator[Report]:
    """A function of (what, how many are done, of how many) that draws a bar for each `what` on a terminal. Elsewhere it
    says once how many there will be, if `log` is what such a line begins with."""
    with progress(console) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks or done < bars.tasks[tasks[what]].completed:  # the same again is a bar of its own
                tasks[what] = bars.add_task(what, total=total, note="")
                if log and not console.is_terminal:
                    console.print(f"{log}{what}: {total} clips", highlight=False)
            bars.update(tasks[what], completed=done)

        yield report


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        with naming(path):
            aside.write_text(text)
            os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def warn(sentences: Iterable[str]) -> None:
    """Tells a person what a command goes on without."""
    for sentence in sentences:
        Console(stderr=True).print(f"[yellow]smaug:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def refuse(error: Exception) -> int:
    """Tells a person in one line why a command ends, and gives its exit code."""
    Console(stderr=True).print(f"[red]smaug:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return 1
