"""The scores of a model, as a run's result.json holds them and as a person reads them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from smaug.data.annotations import CAPTIONS
from smaug.data.clips import Clips, DataConfig
from smaug.data.shapes import Report
from smaug.data.source import source_name
from smaug.device import Way
from smaug.evaluate.encode import BATCH, look, texts_cut
from smaug.evaluate.ensemble import Ensemble
from smaug.evaluate.match import has_match_head
from smaug.evaluate.questions import Answers, answer_questions, priors
from smaug.evaluate.retrieval import Retrieval, retrieval
from smaug.ledger import Turn
from smaug.model.model import Model
from smaug.objectives.answer import Answer
from smaug.recipe import Recipe


@dataclass(frozen=True)
class How:
    """What may be chosen of an evaluation; None: as the recipe has it."""

    frames: int | None = None  # of each clip
    top: int | None = None  # candidates that the match head ranks again
    ensemble: Ensemble = "concat"
    shuffle: bool = False  # each clip's frames in a random order, for all scores
    controls: bool = True  # also with the frames shuffled, and with nothing pruned or left out
    dual_softmax: bool = False
    batch: int = BATCH  # clips encoded at once
    answers: tuple[str, ...] = ()  # the closed list of open questions, for a model that was not trained on one


def evaluate(
    model: Model,
    recipe: Recipe,
    clips: Clips,
    tokenizer: Tokenizer,
    way: Way,
    *,
    how: How | None = None,
    split: str = "test",
    report: Report | None = None,
) -> dict[str, Any]:
    """The scores of the recipe's task on clips, and what they are scores of."""
    model.eval()
    how = how or How()
    with way.autocast():
        score = score_retrieval if recipe.task == "retrieval" else score_questions
        scores = score(model, recipe, clips, tokenizer, how, report)
    model.train()
    return {
        **scores,
        "evaluated_on": clips.name + (", frames shuffled" if how.shuffle else ""),
        "split": split_of(recipe.data, split),
        "frames": frames_of(recipe, how),
        "batch": recipe.data.batch,
    }


def score_retrieval(
    model: Model, recipe: Recipe, clips: Clips, tokenizer: Tokenizer, how: How, report: Report | None
) -> dict[str, Any]:
    """All retrieval scores and their protocol; with `how.controls` t2v_r1 and v2t_r1 with the frames in a random order,
    and t2v_r1 with nothing pruned or left out."""
    top = how.top or recipe.eval_top

    def score(shuffle: bool, sparse: bool = True) -> Retrieval:
        return retrieval(
            *(model, clips, tokenizer),
            frames=frames_of(recipe, how),
            max_bad=recipe.data.max_bad,
            top=top,
            ensemble=how.ensemble,
            shuffle=shuffle,
            sparse=sparse,
            dual_softmax=how.dual_softmax,
            batch=how.batch,
            report=report,
        )

    plain = score(how.shuffle)
    result: dict[str, Any] = {**plain.scores}
    if how.controls:
        mixed = plain if how.shuffle else score(True)
        result |= {f"{key}_shuffled": mixed.scores[key] for key in ("t2v_r1", "v2t_r1")}
        if recipe.model.video.prune.blocks or recipe.model.selector.keep:
            result["t2v_r1_dense"] = score(how.shuffle, sparse=False).scores["t2v_r1"]
    left_out = [*clips.skipped, *plain.skipped]
    return {
        **result,
        "captions": plain.captions,
        "captions_cut": plain.cut,
        "protocol": protocol(model, recipe, how, plain, top, len(left_out)),
        "evaluation_skipped": [f"{s.name}: {s.reason}" for s in left_out],
    }


def score_questions(
    model: Model, recipe: Recipe, clips: Clips, tokenizer: Tokenizer, how: How, report: Report | None
) -> dict[str, Any]:
    """acc and acc_{type}, the closed list's ceiling, and the prior; with `how.controls` the same with the frames in a
    random order and of the text alone."""
    trained = next((o for o in recipe.objectives.values() if isinstance(o, Answer)), None)
    if how.answers and trained and trained.by == "classifier":
        raise ValueError("--answers cannot replace the list that this model has classes for; leave it out")
    answers = how.answers or (trained.answers if trained else ())
    frames = frames_of(recipe, how)

    def score(shuffle: bool, blind: bool = False) -> Answers:
        seen = look(model.video.config, frames, how.ensemble, shuffle=shuffle, sparse=True)
        return answer_questions(
            *(model, clips, tokenizer, answers, seen),
            ensemble=how.ensemble,
            max_bad=recipe.data.max_bad,
            blind=blind,
            batch=how.batch,
            report=report,
        )

    plain = score(how.shuffle)
    result: dict[str, Any] = plain.scores(clips.subsets)
    controls = {"prior": priors(plain.samples)}
    if how.controls:
        controls["shuffled"] = (plain if how.shuffle else score(True)).scores()
        controls["text_only"] = score(how.shuffle, blind=True).scores()
    for name, scores in controls.items():
        result |= {f"{key}_{name}": value for key, value in scores.items() if key != "questions"}
    what = "the match logit" + " and the dual logit of each option" * ("vtc" in model.heads)
    if recipe.task == "qa":
        known = set(answers)
        result["ceiling"] = sum(not known.isdisjoint(s.answers) for s in plain.samples) / len(plain.samples)
        by = f"a {trained.by}" if trained else "masked words, without training on questions"
        what = f"the best of {len(answers)} answers by {by}, exact match; one that is not among them is an error"
    texts = [text for s in plain.samples for text in (s.options or s.captions)]
    cut = texts_cut(tokenizer, texts, model.text.config)
    lost = len(clips.skipped) + len(clips) - len(plain.samples)
    words = [
        f"{len(plain.samples)} questions{f' ({lost} of the set are missing)' if lost else ''}, {frames} frames",
        f"{fused_how(recipe, how, 'scores')}; {what}",
    ]
    if cut:
        words += [f"{cut} texts cut to {recipe.model.text.max_words} word pieces"]
    return {
        **result,
        "task": recipe.task,
        "captions": len(texts),
        "captions_cut": cut,
        "protocol": "; ".join([*words, "ties and NaN count against the model"]),
        "evaluation_skipped": [f"{s.name}: {s.reason}" for s in [*clips.skipped, *plain.skipped]],
    }


def frames_of(recipe: Recipe, how: How) -> int:
    return how.frames or recipe.test_frames


def fused_how(recipe: Recipe, how: How, scores: str) -> str:
    keep = recipe.model.selector.keep
    which = f"the {keep} frames that the text selects" if keep else "all frames"
    return f"{which}, {'fused together' if how.ensemble == 'concat' else f'{how.ensemble} of their {scores}'}"


def protocol(model: Model, recipe: Recipe, how: How, found: Retrieval, top: int, left_out: int) -> str:
    """What was asked and how it was ranked, in words: a number without this cannot be compared with another."""
    layout = CAPTIONS.get(recipe.data.format or "")
    said = "paragraph (all sentences of a clip)" if layout is not None and layout.paragraph else "caption"
    candidates = int(found.scores["candidates"])
    missing = f" ({left_out} of the set are missing)" if left_out else ""
    several = ", of which the best counts" if found.captions > candidates else ""
    frames = frames_of(recipe, how)
    words = [
        f"{found.captions} texts, each a {said}, rank {candidates} clips{missing}; a clip ranks the texts{several}",
        f"{frames} frame{'s' * (frames > 1)} of a clip, their mean for the dual encoder",
    ]
    if has_match_head(model):
        fused = fused_how(recipe, how, "match logits")
        words += [f"the dual encoder's best {top} ranked again by dual + match logit, others behind; {fused}"]
    else:
        words += ["ranked by the dual encoder"]
    if found.cut:
        words += [f"{found.cut} texts cut to {recipe.model.text.max_words} word pieces"]
    words += ["ties and NaN count against the model"]
    if how.dual_softmax:
        words += ["only *_dsl: dual encoder with dual softmax, which uses all test queries at once"]
    return "; ".join(words)


def split_of(data: DataConfig, split: str) -> str:
    """The split's name; of one's own data, what the names of its files say."""
    if not data.manifest:
        return split
    if not data.eval_manifest:
        return "train"
    names = [re.search(r"train|test|val", path.name.lower()) for path in data.eval_manifest]
    return " + ".join(sorted({name.group() if name else "unnamed" for name in names}))


def provenance(trained: DataConfig, evaluated: DataConfig) -> dict[str, Any]:
    """`trained_on`, and `zero_shot`: whether the model has seen nothing of the data set it is evaluated on.

    Two data sets are one if their formats are, as msrvtt and msrvtt_mc are, whose videos are the same; or, where one of
    them has no format, if a folder of their files is.
    """

    def folders(data: DataConfig, paths: Sequence[Path]) -> set[Path | str]:
        return {(data.root or path.parent).resolve() for path in paths} or {"shapes"}

    if trained.format and evaluated.format:
        same = trained.format.partition("_")[0] == evaluated.format.partition("_")[0]
    else:
        seen = folders(trained, trained.manifest)
        same = not seen.isdisjoint(folders(evaluated, evaluated.eval_manifest or evaluated.manifest))
    return {"trained_on": source_name(trained.manifest) if trained.manifest else "shapes train", "zero_shot": not same}


def print_result(console: Console, result: dict[str, Any], spent: Turn | None = None) -> None:
    """spent: for all of it, by the run's ledger."""
    console.print(_questions_table(result) if "questions" in result else _retrieval_table(result))
    if spent is not None:
        _print_cost(console, spent)


def _questions_table(result: dict[str, Any]) -> Table:
    kind = "multiple choice" if result["task"] == "mc" else "open questions"
    count, frames = result["questions"], result["frames"]
    zero_shot = ", zero-shot" if result.get("zero_shot") else ""
    table = Table(title=f"{kind} on {result['evaluated_on']}, {count:.0f} questions, {frames} frames{zero_shot}")
    for column in ("", "accuracy", "frames shuffled", "text alone", "prior"):
        table.add_column(column, justify="right")
    ends = ("_shuffled", "_text_only", "_prior")
    for key in [key for key in result if key.startswith("acc") and not key.endswith(ends)]:
        name = "all" if key == "acc" else key.removeprefix("acc_")
        table.add_row(name, *(f"{result[key + end]:.1%}" if key + end in result else "" for end in ("", *ends)))
    if "ceiling" in result:
        table.add_row("answers in the list", f"{result['ceiling']:.1%}", "", "", "")
    table.caption = _cut(result)
    return table


def _retrieval_table(result: dict[str, Any]) -> Table:
    candidates = f"{result['candidates']:.0f} candidates"
    zero_shot = ", zero-shot" if result.get("zero_shot") else ""
    table = Table(title=f"retrieval on {result['evaluated_on']}, {candidates}, {result['frames']} frames{zero_shot}")
    for column in ("", "R@1", "R@5", "R@10", "MedR", "MeanR"):
        table.add_column(column, justify="right")
    for suffix, what in (("", ""), ("_dsl", ", dual softmax")):
        for name, key in (("text to video", "t2v"), ("video to text", "v2t")):
            if f"{key}_r1{suffix}" in result:
                recalls = [f"{result[f'{key}_r{k}{suffix}']:.1%}" for k in (1, 5, 10)]
                ranks = [f"{result[f'{key}_{rank}{suffix}']:.4g}" for rank in ("medr", "meanr")]
                table.add_row(name + what, *recalls, *ranks)
    notes = {
        "t2v_r1_dual": "t2v, without the match head",
        "t2v_r1_dense": "t2v, nothing pruned or left out",
        "t2v_r1_shuffled": "t2v, frames shuffled",
        "t2v_r1_new_combinations": "t2v, new combinations",
    }
    for key, name in notes.items():
        if key in result:
            table.add_row(name, f"{result[key]:.1%}", "", "", "", "")
    table.caption = _cut(result)
    return table


def _cut(result: dict[str, Any]) -> str | None:
    if not result["captions_cut"]:
        return None
    return (
        f"{result['captions_cut']} of {result['captions']} texts are longer than the model reads and were cut; "
        "it can be fine-tuned on longer ones (--model.text.max-words)"
    )


def _print_cost(console: Console, spent: Turn) -> None:
    """Four lines: device-hours, where they went, the tokens that were not computed, and FLOPs."""
    phases: defaultdict[str, float] = defaultdict(float)
    for name, seconds in spent.seconds.items():
        phases[name.split(":")[0]] += seconds
    training = spent.training_seconds
    console.print(
        f"{training / 3600:.3f} device-hours of training and {phases['evaluation'] / 3600:.3f} of evaluation "
        f"({spent.wall_seconds / 60:.1f} minutes in all) on {spent.machine}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not (spent.steps and spent.flops):  # shares of nothing, or not known, see `ledger.behind`
        return
    lines = ["  " + ", ".join(f"{name} {s / training:.0%}" for name, s in phases.items() if name != "evaluation")]
    stages = []
    for name, stage in spent.tokens.items():
        every = max(1, sum(stage.values()))
        avoided = [f"{n / every:.0%} {why}" for why, n in stage.items() if why != "computed" and n]
        stages.append(f"{name} {stage['computed'] / 1e6:.3g} M" + f" ({', '.join(avoided)})" * bool(avoided))
    lines += ["  tokens computed, and not: " + ", ".join(stages)]
    flops = f"{spent.flops:.2g} FLOPs, {spent.flops / max(1, spent.flops_dense):.0%} of a dense model's"
    if spent.utilisation is not None:
        flops += f"; {spent.utilisation:.0%} of the device's rate ({spent.rate_is})"
    if spent.energy_joules is not None:
        flops += f"; {spent.energy_joules / 3.6e6:.3f} kWh with evaluation"
    lines += [f"  {flops}; {spent.peak_bytes / 2**30:.1f} GiB at most"]
    if phases["data"] > 0.05 * training:
        lines += ["decoding is what it waits for: `python -m smaug.data check` says what would make it cheaper"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
