"""One training step, for every recipe: mask, encode, sum the objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from smaug.data.loader import Batch
from smaug.model.model import Model
from smaug.objectives.seen import Seen
from smaug.recipe import Recipe


def training_step(model: Model, recipe: Recipe, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the loss, a scalar, and its unweighted parts by objective. Nothing here reads the device on the host."""
    visible = []
    for group in batch.groups:
        ids_keep, _ = recipe.video_mask.draw(
            group.samples,
            model.video.config.grid(group.video.shape[1]),
            seed=recipe.seed,
            epoch=batch.epoch,
            impl=model.impl,
        )
        visible.append((group.video, ids_keep))

    video, video_tokens = model.video(visible)
    text, words = model.text(batch.words)
    seen = Seen(video, video_tokens, text, words, positives(batch))

    parts = {name: objective(model.heads[name], seen) for name, objective in recipe.objectives.items()}
    loss = torch.stack([recipe.objectives[name].weight * part for name, part in parts.items()]).sum()
    return loss, parts


def positives(batch: Batch) -> Tensor:
    """(B, B) bool: pairs that belong together, since the video or the caption is the same."""
    same_video = batch.video_keys[:, None] == batch.video_keys
    same_caption = batch.caption_keys[:, None] == batch.caption_keys
    return same_video | same_caption
