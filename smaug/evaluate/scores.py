"""The scores of a model, as a run's result.json holds them and as a person reads them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from smaug.data.clips import Clips
from smaug.device import Way
from smaug.evaluate.questions import Answers, answer_questions, priors
from smaug.evaluate.retrieval import Retrieval, retrieval
from smaug.model.model import Model
from smaug.objectives.answer import Answer
from smaug.recipe import Recipe


def evaluate(
    model: Model,
    recipe: Recipe,
    clips: Clips,
    tokenizer: Tokenizer,
    way: Way,
    *,
    frames: int | None = None,
    shuffle: bool = False,
) -> dict[str, Any]:
    """All scores of the recipe's task, and the main ones with each clip's frames in a random order.

    With `shuffle` they are in a random order for all scores.
    """
    frames = frames or recipe.eval_frames or recipe.model.video.frames
    if recipe.task != "retrieval":
        return evaluate_questions(model, recipe, clips, tokenizer, way, frames=frames, shuffle=shuffle)
    model.eval()

    def score(**how: bool) -> Retrieval:
        return retrieval(
            model, clips, tokenizer, frames=frames, max_bad=recipe.data.max_bad, top=recipe.eval_top, **how
        )

    with way.autocast():
        mixed = score(shuffle=True)
        plain = mixed if shuffle else score()
        result: dict[str, Any] = {**plain.scores}
        result |= {f"{key}_shuffled": mixed.scores[key] for key in ("t2v_r1", "v2t_r1")}
        if recipe.model.video.prune.blocks or recipe.model.selector.keep:
            result["t2v_r1_dense"] = score(sparse=False, shuffle=shuffle).scores["t2v_r1"]
    model.train()
    return {
        **result,
        "evaluated_on": clips.name + (", frames shuffled" if shuffle else ""),
        "frames": frames,
        "evaluation_skipped": [f"{s.name}: {s.reason}" for s in plain.skipped],
    }


def evaluate_questions(
    model: Model, recipe: Recipe, clips: Clips, tokenizer: Tokenizer, way: Way, *, frames: int, shuffle: bool
) -> dict[str, Any]:
    """acc, acc_{type}; the same of shuffled frames and of the text alone; the prior; the closed list's ceiling."""
    answers = next((o.answers for o in recipe.objectives.values() if isinstance(o, Answer)), ())
    model.eval()

    def score(**how: bool) -> Answers:
        return answer_questions(model, clips, tokenizer, answers, frames=frames, max_bad=recipe.data.max_bad, **how)

    with way.autocast():
        mixed, blind = score(shuffle=True), score(blind=True)
        plain = mixed if shuffle else score()
    model.train()
    result: dict[str, Any] = plain.scores()
    result |= {f"{key}_shuffled": value for key, value in mixed.scores().items() if key != "questions"}
    result |= {f"{key}_text_only": value for key, value in blind.scores().items() if key != "questions"}
    result |= {f"{key}_prior": value for key, value in priors(plain.samples).items()}
    if recipe.task == "qa":
        known = [any(answer in answers for answer in sample.answers) for sample in plain.samples]
        result["ceiling"] = sum(known) / len(known)
    return {
        **result,
        "task": recipe.task,
        "evaluated_on": clips.name + (", frames shuffled" if shuffle else ""),
        "frames": frames,
        "evaluation_skipped": [f"{s.name}: {s.reason}" for s in plain.skipped],
    }


def print_result(console: Console, result: dict[str, Any]) -> None:
    console.print(_questions_table(result) if "questions" in result else _retrieval_table(result))
    _print_cost(console, result)


def _questions_table(result: dict[str, Any]) -> Table:
    kind = "multiple choice" if result["task"] == "mc" else "open questions"
    count, frames = result["questions"], result["frames"]
    table = Table(title=f"{kind} on {result['evaluated_on']}, {count:.0f} questions, {frames} frames")
    for column in ("", "accuracy", "frames shuffled", "text alone", "prior"):
        table.add_column(column, justify="right")
    ends = ("_shuffled", "_text_only", "_prior")
    for key in [key for key in result if key.startswith("acc") and not key.endswith(ends)]:
        name = "all" if key == "acc" else key.removeprefix("acc_")
        table.add_row(name, *(f"{result[key + end]:.1%}" if key + end in result else "" for end in ("", *ends)))
    if "ceiling" in result:
        table.add_row("answers in the list", f"{result['ceiling']:.1%}", "", "", "")
    return table


def _retrieval_table(result: dict[str, Any]) -> Table:
    candidates = f"{result['candidates']:.0f} candidates"
    table = Table(title=f"retrieval on {result['evaluated_on']}, {candidates}, {result['frames']} frames")
    for column in ("", "R@1", "R@5", "R@10", "MedR"):
        table.add_column(column, justify="right")
    for name, key in (("text to video", "t2v"), ("video to text", "v2t")):
        recalls = [f"{result[f'{key}_r{k}']:.1%}" for k in (1, 5, 10)]
        table.add_row(name, *recalls, f"{result[f'{key}_medr']:g}")
    notes = {
        "t2v_r1_dual": "text to video, without the match head",
        "t2v_r1_dense": "text to video, nothing pruned or left out",
        "t2v_r1_shuffled": "text to video, frames shuffled",
        "t2v_r1_new_combinations": "text to video, new combinations",
    }
    for key, name in notes.items():
        if key in result:
            table.add_row(name, f"{result[key]:.1%}", "", "", "")
    return table


def _print_cost(console: Console, result: dict[str, Any]) -> None:
    if "device_seconds" in result:
        share = result["tokens_computed"] / max(1, result["tokens_dense"])
        waited = result["data_seconds"] / max(1e-9, result["device_seconds"] + result["data_seconds"])
        console.print(
            f"{result['device_seconds'] / 3600:.3f} device-hours ({result['wall_seconds'] / 60:.1f} minutes in all, "
            f"{waited:.1%} of the training waiting for data) on {result['machine']}",
            highlight=False,
        )
        if waited > 0.05:
            console.print("decoding is what it waits for: `python -m smaug.data check` says what would make it cheaper")
        console.print(
            f"{result['tokens_computed'] / 1e6:.1f} M tokens computed; a dense model would have computed "
            f"{result['tokens_dense'] / 1e6:.1f} M ({share:.0%})",
            highlight=False,
        )
