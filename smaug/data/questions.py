"""Questions as samples: those of the annotation files, and those about the embedded data set's scenes.

A sample of an open-ended question has its words as caption. One of a multiple choice has `options`, whole texts of
which one tells of the clip, and that one as caption too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from smaug.data.annotations import QUESTIONS, Format, Question, read_questions
from smaug.data.manifest import ManifestError, Sample, Skip
from smaug.data.shapes import COLOURS, NEW_COMBINATIONS, SHAPES, VERSION, Scene

Task = Literal["retrieval", "qa", "mc"]
Asked = tuple[str, str, str]  # type, question, answer
OPTIONS = 5  # of a multiple choice about shapes
ROUNDS = 3  # each clip of the training set is asked about, each time beside other options
OPPOSITES = {
    "grow or shrink": ("grows", "shrinks"),
    "move left or right": ("moves left", "moves right"),
    "move up or down": ("moves up", "moves down"),
}


def question_samples(
    format: str | None, files: Sequence[Path], root: Path | None, task: Task, *, skipped: list[Skip] | None = None
) -> list[Sample]:
    """Samples of annotation files, for the recipe's task: open-ended (`qa`) or multiple choice (`mc`)."""
    if format not in QUESTIONS:
        raise ManifestError(
            f"questions come in the formats {', '.join(QUESTIONS)}: name one by --data.format (evaluate: --format)"
        )
    asked = read_questions(cast(Format, format), files, root, skipped=skipped)
    fit = [q for q in asked if bool(q.options) == (task == "mc")]
    if not fit:
        kind, other = ("multiple choice", "qa") if task == "mc" else ("open-ended", "mc")
        raise ManifestError(f"{', '.join(map(str, files))}: no question is {kind}; recipe {other} takes the others.")
    counts = {len(q.options) for q in fit}
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        raise ManifestError(f"all questions must have as many options; here some have {few}, some {many}")
    return [_sample(question) for question in fit]


def _sample(asked: Question) -> Sample:
    if not asked.options:
        return Sample(asked.path, "video", (asked.question,), asked.name, asked.answers, (), asked.type)
    options = tuple(f"{asked.question} {option}".strip() for option in asked.options)
    right = options[asked.options.index(asked.answers[0])]
    return Sample(asked.path, "video", (right,), asked.name, (right,), options, asked.type)


def ask_about_shapes(scenes: Sequence[Scene], samples: Sequence[Sample], split: str, task: Task) -> list[Sample]:
    """Questions about the clips of a split; `samples` are the clips themselves, in the order of the scenes.

    Open-ended: the answers of a type are equally frequent, and each question about the order of time is asked of both
    twins, whose answers differ: there nobody does better than chance from the words alone. Multiple choice: the caption
    of the clip, that of its twin, and three that differ from one of the two in a single colour or shape. Twins have the
    same options.
    """
    rng = np.random.default_rng([VERSION, 11, len(split)])
    if task == "mc":
        drawn = [options for _ in range(ROUNDS if split == "train" else 1) for options in _options(scenes, split, rng)]
        shown = itertools.cycle(samples)
        return [replace(s, options=o, answers=s.captions) for s, o in zip(shown, drawn, strict=False)]
    by_type: dict[str, list[tuple[int, Asked]]] = {}
    for number, scene in enumerate(scenes):
        for asked in questions_about(scene):
            by_type.setdefault(asked[0], []).append((number, asked))
    chosen: list[tuple[int, Asked]] = []
    for type, several in by_type.items():
        twins = type.startswith("order") and split != "train"  # those balance each other
        chosen += several if twins else _balanced(several, rng)
    return [
        replace(samples[n], captions=(question,), answers=(answer,), type=type)
        for n, (type, question, answer) in sorted(chosen)
    ]


def questions_about(scene: Scene) -> list[Asked]:
    """All that can be asked of a scene, each with its one answer."""
    objects = [(scene.colour, scene.shape), (scene.still_colour, scene.still_shape)]
    asked: list[Asked] = []
    for (colour, shape), (other_colour, other_shape) in (objects, objects[::-1]):
        if shape != other_shape:
            asked.append(("colour", f"what colour is the {shape}", colour))
        asked.append(("shape", f"what shape is the {colour} one", shape))
        asked.append(("beside", f"what is beside the {colour} {shape}", f"{other_colour} {other_shape}"))
    asked.append(("changes", "what colour is the one that changes", scene.colour))
    what = next(what for what, pair in OPPOSITES.items() if scene.change in pair)
    return [*asked, (f"order/{what}", f"does the {scene.colour} {scene.shape} {what}", scene.change)]


def _balanced(asked: Iterable[tuple[int, Asked]], rng: np.random.Generator) -> list[tuple[int, Asked]]:
    """A random part of them in which all answers are equally frequent."""
    by_answer: dict[str, list[tuple[int, Asked]]] = {}
    for one in asked:
        by_answer.setdefault(one[1][2], []).append(one)
    least = min((len(several) for several in by_answer.values()), default=0)
    return [several[i] for several in by_answer.values() for i in rng.permutation(len(several))[:least]]


def _options(scenes: Sequence[Scene], split: str, rng: np.random.Generator) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for number, scene in enumerate(scenes):
        if split != "train" and number % 2:  # the twin of the one before
            options = found[-1]
        else:
            texts = [scene.caption, scene.reversed().caption]
            while len(texts) < OPTIONS:
                base = scene if rng.integers(2) else scene.reversed()
                other = _one_apart(base, rng)
                if other is not None and other.caption not in texts:
                    texts.append(other.caption)
            options = tuple(texts)
        found.append(tuple(options[i] for i in rng.permutation(OPTIONS)))
    return found


def _one_apart(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with another colour or shape of one of its objects; None for one that training could not have."""
    which = ("colour", "shape", "still_colour", "still_shape")[rng.integers(4)]
    values = list(COLOURS) if which.endswith("colour") else list(SHAPES)
    other = replace(scene, **{which: values[rng.integers(len(values))]})  # type: ignore[arg-type]  # all four are texts
    if other == scene or other.colour == other.still_colour:
        return None
    object = (other.still_colour, other.still_shape) if which.startswith("still") else (other.colour, other.shape)
    return None if object in NEW_COMBINATIONS else other
