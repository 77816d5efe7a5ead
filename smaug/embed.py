"""Videos and texts as vectors whose product is their similarity: the dual encoder of a trained model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from smaug.data import text
from smaug.objectives.vtc import VtcHeads, contrast_of
from smaug.recipe import Recipe
from smaug.run import Run
from smaug.tokens import PackedTokens


def contrast_heads(run: Run) -> VtcHeads:
    """Raises ValueError for a model that was trained without a contrast."""
    heads = contrast_of(run.model)
    if heads is None:
        raise ValueError("embedding needs the vtc objective; this model was trained without it")
    return heads


@torch.no_grad()
def embed_videos(run: Run, video: Tensor) -> Tensor:
    """video (B, F, H, W, 3) uint8, H and W of `recipe.model.video.image_size`, frames in the order of `in_views`
    -> (B, embed_dim) fp32 unit vectors on the model's device. Nothing is masked; pruning is at its trained rate."""
    heads, video = contrast_heads(run), video.to(run.way.device)
    run.model.eval()
    with run.way.autocast():
        encoded = run.model.video([(video, run.model.video.config.every_patch(video))])
        return heads.embed_video(encoded.features)


def pack_texts(recipe: Recipe, tokenizer: Tokenizer, texts: Sequence[str]) -> PackedTokens:
    """The words of each text as a model of this recipe reads them; more than `max_words` pieces are cut."""
    return text.pack_captions(tokenizer, texts, recipe.model.text.max_words, recipe.model.text.sep)


@torch.no_grad()
def embed_texts(run: Run, texts: Sequence[str]) -> Tensor:
    """-> (n, embed_dim) fp32 unit vectors on the model's device; a text of more than `max_words` pieces is cut."""
    heads = contrast_heads(run)
    words = pack_texts(run.recipe, run.tokenizer, texts)
    run.model.eval()
    with run.way.autocast():
        features, _ = run.model.text(words.to(run.way.device))
        return heads.embed_text(features)
