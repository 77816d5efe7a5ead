"""The model card of a run: trained on what, at what cost, with what scores. What is not known is not said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from smaug.recipe import Recipe

SCORES = {  # keys of a run's result.json, as a person reads them
    "t2v_r1": "text to video, R@1",
    "t2v_r5": "text to video, R@5",
    "t2v_r10": "text to video, R@10",
    "v2t_r1": "video to text, R@1",
    "v2t_r5": "video to text, R@5",
    "v2t_r10": "video to text, R@10",
    "t2v_r1_dual": "text to video, R@1 by the vectors alone",
    "v2t_r1_dual": "video to text, R@1 by the vectors alone",
    "t2v_r1_dense": "text to video, R@1, nothing pruned or left out",
    "t2v_r1_shuffled": "text to video, R@1, each clip's frames in a random order",
    "t2v_r1_new_combinations": "text to video, R@1, new combinations",
}
MEDIANS = {"t2v_medr": "text to video, median rank", "v2t_medr": "video to text, median rank"}

LOAD = """\
from smaug.integrations.hub import SmaugModel, SmaugProcessor
model, processor = SmaugModel.from_pretrained({name!r}), SmaugProcessor.from_pretrained({name!r})
vectors = model.embed_videos(**processor(videos=["clip.mp4"]))"""


def model_card(recipe: Recipe, run: dict[str, Any], name: str, *, parameters: int, changed: bool) -> ModelCard:
    """`run`: what `SmaugConfig.run` holds. name: a folder, or a name on the Hub. changed: the weights are no longer
    those that were evaluated, so the scores are told in words, and not in the metadata that the Hub compares by."""
    result = run.get("result")
    own_data = bool(recipe.data.manifest)
    held_out = not own_data or bool(recipe.data.eval_manifest)
    title = f"smaug: recipe {recipe.name}, size {run['size']}"
    data = ModelCardData(
        library_name="smaug",
        license="other" if own_data else "apache-2.0",
        pipeline_tag="feature-extraction",
        tags=["video-text-retrieval", "transformers"],
        model_name=title,
        eval_results=list(_index(result)) if result and held_out and not changed else None,
    )
    parts = [
        f"# {title}\n\nVectors of videos and of texts whose product is their similarity"
        + (", and a head that says whether a text tells of a video" if "vtm" in recipe.objectives else "")
        + f". {parameters / 1e6:.2f} M parameters, trained with smaug {run['smaug']}.",
        f"## Use\n\nWith smaug and its extra `hub` installed (`pip install -e '.[hub]'` in its checkout):\n\n"
        f"```python\n{LOAD.format(name=name)}\n```\n\n{_input(recipe)}",
        "## Scores\n\n" + _scores(result, held_out, changed),
        "## Cost\n\n" + _cost(run, result),
        "## Training\n\n" + "\n".join(f"- {line}" for line in _training(recipe, run, result)),
        f"The command:\n\n```\n{run['command']}\n```",
        "## Licence\n\n" + _licence(own_data),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _index(result: dict[str, Any]) -> Iterator[EvalResult]:
    """Of the model as it is, not of the comparisons with it."""
    for key, what in (SCORES | MEDIANS).items():
        if key.count("_") == 1:
            kind = "median_rank" if key in MEDIANS else f"recall_at_{key.split('_')[1].removeprefix('r')}"
            yield EvalResult(
                task_type="feature-extraction",
                task_name="text-video retrieval",
                dataset_type=result["evaluated_on"].split()[0],
                dataset_name=f"{result['evaluated_on']}, {result['candidates']:.0f} candidates",
                metric_type=kind,
                metric_name=what,
                metric_value=round(result[key], 4),
            )


def _input(recipe: Recipe) -> str:
    video = recipe.model.video
    frames = recipe.eval_frames or video.frames
    return (
        f"It sees {frames} frames of a video, the middle square of each at {video.image_size} x {video.image_size} "
        f"pixels, and at most {recipe.model.text.max_words - 1} word pieces of a text."
    )


def _scores(result: dict[str, Any] | None, held_out: bool, changed: bool) -> str:
    if result is None:
        return "These weights were not evaluated."
    lines = [
        f"Retrieval on {result['evaluated_on']}, {result['candidates']:.0f} candidates, {result['frames']} frames."
    ]
    if not held_out:
        lines.append("**No pairs were held out: these scores are of pairs that the model was trained on.**")
    if changed:
        lines.append("**The weights were changed or rounded since: these scores are of the run that they come from.**")
    if result["evaluation_skipped"]:
        lines.append(f"{result['evaluation_skipped']} clips could not be decoded and are left out.")
    table = ["| | |", "|---|---|"]
    table += [f"| {what} | {result[key]:.1%} |" for key, what in SCORES.items() if key in result]
    table += [f"| {what} | {result[key]:g} |" for key, what in MEDIANS.items() if key in result]
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
        f"data and evaluation) on {where}. {result['tokens_computed'] / 1e6:.1f} M tokens computed; a dense model "
        f"would have computed {result['tokens_dense'] / 1e6:.1f} M ({share:.0%})."
    )


def _training(recipe: Recipe, run: dict[str, Any], result: dict[str, Any] | None) -> Iterator[str]:
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
    yield f"objectives: {', '.join(recipe.objectives)}"
    yield (
        f"frames: {video.frames} of a clip in training, a token is {video.tubelet} frames of "
        f"{video.patch} x {video.patch} pixels"
    )
    if recipe.video_mask.ratio:
        last = f", none in the last {recipe.unmask_last:.0%} of the steps" if recipe.unmask_last else ""
        yield f"masked: {recipe.video_mask.ratio:.0%} of the patches ({recipe.video_mask.kind}){last}"
    if recipe.text_mask.ratio:
        yield f"masked: {recipe.text_mask.ratio:.0%} of the words of the contrast"
    if video.prune.blocks:
        blocks = ", ".join(str(block) for block in video.prune.blocks)
        yield f"pruned: {1 - video.prune.keep:.0%} of the patches at each of the blocks {blocks}, from 0; also in use"
    if recipe.model.selector.keep:
        yield f"selected: {recipe.model.selector.keep} frames a pair of text and video, for the match head; also in use"
    yield "computed in " + ("the fastest way of the machine (`--fast`)" if run["fast"] else "fp32")


def _licence(own_data: bool) -> str:
    if own_data:
        return (
            "The code that made them is Apache-2.0. The weights were trained on data of the user's own, whose licence "
            "smaug does not know: whoever publishes them has to say what it allows."
        )
    return "Apache-2.0, code and weights: the data set `shapes` is rendered by smaug itself."
