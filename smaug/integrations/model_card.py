"""The model card of a run: trained on what, at what cost, with what scores. What is not known is not said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from smaug.objectives.mlm import Mlm
from smaug.objectives.vtc import Vtc
from smaug.recipe import Recipe

DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
METRICS = {  # keys of a run's result.json -> the Hub's name of the metric, and a person's
    "r1": ("recall_at_1", "R@1"),
    "r5": ("recall_at_5", "R@5"),
    "r10": ("recall_at_10", "R@10"),
    "medr": ("median_rank", "median rank"),
}
COMPARED = {  # R@1 in the same file
    "t2v_r1_dual": "text to video, by the vectors alone",
    "v2t_r1_dual": "video to text, by the vectors alone",
    "t2v_r1_dense": "text to video, nothing pruned or left out",
    "t2v_r1_shuffled": "text to video, each clip's frames in a random order",
    "t2v_r1_new_combinations": "text to video, combinations that training never showed",
}

LOAD = """\
from smaug.integrations.hub import SmaugModel, SmaugProcessor
model, processor = SmaugModel.from_pretrained({name!r}), SmaugProcessor.from_pretrained({name!r})
"""
VECTORS = 'vectors = model.embed_videos(**processor(videos=["clip.mp4"]))'
MATCH = 'no, yes = model(**processor(text="a text", videos="clip.mp4"), pairs=[[0, 0]]).match_logits[0]'


def load_lines(recipe: Recipe, name: str) -> str:
    """Three lines of Python that load a model by name and use it."""
    contrast = any(isinstance(objective, Vtc) for objective in recipe.objectives.values())
    return LOAD.format(name=name) + (VECTORS if contrast else MATCH)


def model_card(
    recipe: Recipe, run: dict[str, Any], name: str, *, parameters: int, changed: bool, starts: Sequence[str] = ()
) -> ModelCard:
    """The card, with its metadata. Scores that are not of these weights on held-out pairs stay out of the metadata.

    run         what `SmaugConfig.run` holds; ValueError for a result.json of another version of smaug
    name        by which the model is loaded: a folder, or a name on the Hub
    changed     the weights are no longer those that were evaluated
    starts      checkpoints of others that the training began from
    """
    try:
        return _card(recipe, run, name, parameters, changed, starts)
    except KeyError as error:
        raise ValueError(
            f"the run's result.json lacks {error}; write it again: python -m smaug.train --resume"
        ) from None


def _card(
    recipe: Recipe, run: dict[str, Any], name: str, parameters: int, changed: bool, starts: Sequence[str]
) -> ModelCard:
    result = run.get("result")
    own_data = bool(recipe.data.manifest)
    held_out = not own_data or bool(recipe.data.eval_manifest)
    index = list(_index(result)) if result and "t2v_r1" in result and held_out and not changed else None
    title = f"smaug: recipe {recipe.name}, size {run['size']}"
    data = ModelCardData(
        library_name="smaug",
        license="other" if own_data or starts else "apache-2.0",
        pipeline_tag="feature-extraction",
        tags=["video-text-retrieval", "transformers"],
        model_name=title if index else None,
        eval_results=index,
    )
    parts = [
        f"# {title}\n\n{_gives(recipe)} {parameters / 1e6:.2f} M parameters, trained with smaug {run['smaug']}.",
        f"## Use\n\nWith smaug and its extra `hub` installed (`pip install -e '.[hub]'` in its checkout):\n\n"
        f"```python\n{load_lines(recipe, name)}\n```\n\n{_input(recipe)}",
        "## Scores\n\n" + _scores(result, held_out, changed),
        "## Cost\n\n" + _cost(run, result),
        "## Training\n\n" + "\n".join(f"- {line}" for line in _training(recipe, run, result, starts)),
        f"The command:\n\n```\n{run['command']}\n```",
        "## Licence\n\n" + _licence(own_data, starts),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _index(result: dict[str, Any]) -> Iterator[EvalResult]:
    """Of the model as it is, not of the comparisons with it."""
    for direction, what in DIRECTIONS.items():
        for key, (kind, name) in METRICS.items():
            yield EvalResult(
                task_type="feature-extraction",
                task_name="text-video retrieval",
                dataset_type=result["evaluated_on"].split()[0],
                dataset_name=f"{result['evaluated_on']}, {result['candidates']:.0f} candidates",
                metric_type=kind,
                metric_name=f"{what}, {name}",
                metric_value=round(result[f"{direction}_{key}"], 4),
            )


def _gives(recipe: Recipe) -> str:
    gives = []
    if any(isinstance(objective, Vtc) for objective in recipe.objectives.values()):
        gives.append("Vectors of videos and of texts whose product is their similarity.")
    if "vtm" in recipe.objectives:
        gives.append("Logits of whether a text tells of a video.")
    return " ".join(gives)


def _input(recipe: Recipe) -> str:
    video = recipe.model.video
    return (
        f"It sees {recipe.test_frames} frames of a video, the middle square of each at "
        f"{video.image_size} x {video.image_size} pixels, and at most {recipe.model.text.max_words} word pieces of a "
        "text, [CLS] among them."
    )


def _scores(result: dict[str, Any] | None, held_out: bool, changed: bool) -> str:
    if result is None:
        return "These weights were not evaluated."
    retrieval = "t2v_r1" in result
    what = f"Retrieval, {result['candidates']:.0f} candidates" if retrieval else "Answers to questions"
    lines = [f"{what}, on {result['evaluated_on']}, {result['frames']} frames."]
    if not held_out:
        lines.append("**No pairs were held out: these scores are of pairs that the model was trained on.**")
    if changed:
        lines.append("**The weights were changed or rounded since: these scores are of the run that they come from.**")
    if result["evaluation_skipped"]:
        lines.append(f"{result['evaluation_skipped']} clips could not be decoded and are left out.")
    if not retrieval:  # acc, its parts by type of question, and what it is to be compared with
        found = [(key, value) for key, value in result.items() if key.partition("_")[0] == "acc"]
        return " ".join(lines) + "\n\n| | accuracy |\n|---|---|\n" + "\n".join(f"| {k} | {v:.1%} |" for k, v in found)
    table = ["| | " + " | ".join(name for _, name in METRICS.values()) + " |", "|---|---|---|---|---|"]
    for direction, what in DIRECTIONS.items():
        recalls = " | ".join(f"{result[f'{direction}_{key}']:.1%}" for key in ("r1", "r5", "r10"))
        table.append(f"| {what} | {recalls} | {result[f'{direction}_medr']:g} |")
    table += [f"| {what} | {result[key]:.1%} | | | |" for key, what in COMPARED.items() if key in result]
    return " ".join(lines) + "\n\n" + "\n".join(table)


def _cost(run: dict[str, Any], result: dict[str, Any] | None) -> str:
    """The device as the run has it. A run that was resumed elsewhere says both."""
    if result is None:
        return f"Begun on {run['machine']}."
    where = result["machine"]
    if run["machine"] != where:
        where += f" (begun on {run['machine']})"
    share = result["tokens_computed"] / max(1, result["tokens_dense"])
    return (
        f"{result['device_seconds'] / 3600:.3g} device-hours ({result['wall_seconds'] / 60:.1f} minutes in all, with "
        f"data and evaluation) on {where}. {result['tokens_computed'] / 1e6:.3g} M tokens computed; a dense model "
        f"would have computed {result['tokens_dense'] / 1e6:.3g} M ({share:.0%})."
    )


def _training(
    recipe: Recipe, run: dict[str, Any], result: dict[str, Any] | None, starts: Sequence[str]
) -> Iterator[str]:
    data, video = recipe.data, recipe.model.video
    yield "data: " + (
        f"the user's own, from {' '.join(path.name for path in data.manifest)}"
        if data.manifest
        else f"`shapes`, {data.shapes[0]} short rendered clips with captions, which smaug makes itself"
    )
    if result is not None:
        yield f"{run['step']} of the recipe's {recipe.optim.steps} steps of {result['batch']} pairs, seed {recipe.seed}"
    else:
        yield f"{run['step']} of the recipe's {recipe.optim.steps} steps, seed {recipe.seed}"
    if starts:
        yield f"began from {' and '.join(starts)}"
    yield f"objectives: {', '.join(recipe.objectives)}"
    yield (
        f"frames: {video.frames} of a clip in training, a token is {video.tubelet} frames of "
        f"{video.patch} x {video.patch} pixels"
    )
    if recipe.video_mask.ratio:
        last = f", none in the last {recipe.unmask_last:.0%} of the steps" if recipe.unmask_last else ""
        yield f"masked in training: {recipe.video_mask.ratio:.0%} of the patches ({recipe.video_mask.kind}){last}"
    if recipe.text_mask.ratio:
        yield f"masked in training: {recipe.text_mask.ratio:.0%} of the words that the contrast sees"
    for name, objective in recipe.objectives.items():
        if isinstance(objective, Mlm):
            yield f"masked in training: {objective.ratio:.0%} of the words that {name} asks for"
    if video.prune.blocks:
        blocks = ", ".join(str(block) for block in video.prune.blocks)
        yield f"pruned, in use too: {1 - video.prune.keep:.0%} of a frame's patches at each of blocks {blocks} (from 0)"
    if recipe.model.selector.keep:
        moments = f"{recipe.model.selector.keep} of {video.times(video.frames)} moments of a clip"
        yield f"selected, in use too: {moments}, by the text that the match head compares with it"
    yield "computed in " + ("the fastest way of the machine (`--fast`)" if run["fast"] else "fp32")


def _licence(own_data: bool, starts: Sequence[str]) -> str:
    if not own_data and not starts:
        return "Apache-2.0, code and weights: the data set `shapes` is rendered by smaug itself."
    said = "The code that made these weights is Apache-2.0."
    if own_data:
        said += " They were trained on data of the user's own, whose licence smaug does not know."
    if starts:
        said += f" They began from {' and '.join(starts)}, whose licence applies to them too."
    return said + " Whoever publishes them has to say what it allows."
