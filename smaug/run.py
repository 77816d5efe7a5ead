"""A run: what is made from a recipe, and the folder that remembers it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from smaug import checkpoint, recipe
from smaug.data.clips import CPU, Clips, open_manifest, open_shapes
from smaug.data.loader import Loader
from smaug.device import Way, choose
from smaug.model.model import Model
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


def load_run(folder: Path, device: str = "auto") -> Run:
    """The newest whole checkpoint of a run, in the precision of its training."""
    config = read_config(folder)
    saved = recipe.from_json(config["recipe"])
    way = choose(config["fast"], device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = build(saved, tokenizer.get_vocab_size(), way.impl).to(way.device)
    state, damaged = checkpoint.load_newest(folder / "checkpoints", model)
    if state is None:
        raise ValueError(" ".join([*damaged, f"{folder} has no checkpoint to evaluate; train it first"]))
    return Run(saved, model, tokenizer, way, state["step"])


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    config: dict[str, Any] = json.loads(path.read_text())
    missing = [key for key in ("recipe", "fast", "size") if key not in config]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it was not written by this version of smaug, or is damaged"
        )
    return config


def build(recipe: Recipe, vocabulary: int, impl: str) -> Model:
    pairs = any(isinstance(objective, Vtm | Mlm) for objective in recipe.objectives.values())
    if pairs != (recipe.model.fusion.depth > 0):
        raise ValueError("vtm and mlm need --model.fusion.depth of at least 1, and a fusion encoder needs one of them")
    heads = {name: objective.heads(recipe.model, vocabulary) for name, objective in recipe.objectives.items()}
    return Model(recipe.model, vocabulary, heads, impl)


def open_loader(recipe: Recipe, clips: Clips, tokenizer: Tokenizer) -> Loader:
    """Training batches with the words masked that the recipe's contrast and its mlm ask for."""
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
        seed=recipe.seed,
    )


def open_split(recipe: Recipe, split: str, console: Console, device: torch.device = CPU) -> Clips:
    """The clips to train on (`train`), or those to evaluate on. Says what they are, and builds `shapes` if needed."""
    size, data = recipe.model.video.image_size, recipe.data
    if data.manifest:
        own = split != "train" and data.eval_manifest
        clips = open_manifest(data.eval_manifest if own else data.manifest, data, size, device)
        videos = sum(s.kind == "video" for s in clips.samples)
        what = f"{clips.name}, {videos} videos and {len(clips) - videos} images; decoder {clips.decoder.name}"
        if clips.skipped:
            what += f"; {len(clips.skipped)} left out, such as {clips.skipped[0].name}: {clips.skipped[0].reason}"
        if split != "train" and not own:
            what += "; these are training pairs, since no --data.eval-manifest was given"
    else:
        with progress(console) as bars:
            tasks: dict[str, Any] = {}

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, note="")
                    if not console.is_terminal:
                        console.print(f"data       {what}: {total} clips", highlight=False)
                bars.update(tasks[what], completed=done)

            clips = open_shapes(split, data, size, report, device)
        what = f"{clips.name}, {len(clips)} clips"
    console.print(f"{'data' if split == 'train' else 'evaluated':<11}{what}", highlight=False, soft_wrap=True)
    return clips


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(text)
    os.replace(aside, path)


def refuse(error: Exception) -> int:
    """Tells a person in one line why a command ends, and gives its exit code."""
    Console(stderr=True).print(f"[red]smaug:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return 1
