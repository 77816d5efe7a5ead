"""One training step, for every recipe: mask, encode, pair, sum the objectives."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.data.loader import Batch
from smaug.masks import PAIR_STREAM, VideoMask, noise
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.mlm import Mlm
from smaug.objectives.seen import Masked, Pairs, Removed, Seen
from smaug.objectives.vtc import VtcHeads
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.tokens import PackedTokens, cat_tokens, split_tokens, uniform_cu_seqlens


def training_step(model: Model, recipe: Recipe, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the loss, a scalar, and its unweighted parts by objective. Nothing here reads the device on the host."""
    mask = video_mask(recipe, batch.step)
    visible, removed = [], []
    for group in batch.groups:
        grid = model.video.config.grid(group.video.shape[1])
        ids_keep, ids_removed = mask.draw(group.samples, grid, seed=recipe.seed, epoch=batch.epoch, impl=model.impl)
        visible.append((group.video, ids_keep))
        removed.append(
            Removed(group.video, group.samples, ids_removed, model.video.config.sequences(group.video.shape[1]))
        )
    video = model.video(visible, keep_rate=keep_rate(recipe, batch.step), seed=recipe.seed, step=batch.step)

    features, words = encode_texts(model, text_views(recipe, batch))

    same, scores = positives(batch), contrast_scores(model, features["contrast"], video.features)
    pairs = masked = None
    if model.fusion is not None:
        pairs, masked = fuse(model, recipe, batch, video, features, words, same, next(iter(scores.values()), None))
    seen = Seen(video, features["contrast"], same, removed, pairs, masked, recipe.seed, batch.epoch, scores)

    parts = {name: objective(model.heads[name], seen) for name, objective in recipe.objectives.items()}
    weights = [recipe.objectives[name].weight for name in parts]
    each = [part if weight == 1 else weight * part for weight, part in zip(weights, parts.values(), strict=True)]
    return torch.stack(each).sum(), parts


def video_mask(recipe: Recipe, step: int) -> VideoMask:
    """The mask of a step: the recipe's, and none in the last `unmask_last` of all steps."""
    if step >= (1 - recipe.unmask_last) * recipe.optim.steps:
        return VideoMask(0.0, recipe.video_mask.kind)
    return recipe.video_mask


def keep_rate(recipe: Recipe, step: int) -> float:
    """How many patches stay at a pruning block: falls from 1 to the recipe's rate by a cosine; EViT, section 4.1."""
    prune = recipe.model.video.prune
    done = min(1.0, step / max(1.0, prune.warmup * recipe.optim.steps))
    return prune.keep + (1 - prune.keep) * 0.5 * (1 + math.cos(math.pi * done))


def text_views(recipe: Recipe, batch: Batch) -> dict[str, PackedTokens]:
    """What the objectives want to see of the captions; two views may be one object."""
    views = {"contrast": batch.contrast}
    for objective in recipe.objectives.values():
        if isinstance(objective, Vtm):
            views["match"] = batch.words if objective.words == "whole" else batch.contrast
        if isinstance(objective, Mlm) and batch.masked is not None:
            views["masked"] = batch.masked
    return views


def encode_texts(model: Model, views: dict[str, PackedTokens]) -> tuple[dict[str, Tensor], dict[str, PackedTokens]]:
    """Every view of the captions in one packed call, each distinct one once -> features (B, D) and words by view."""
    distinct = list({id(view): view for view in views.values()}.values())
    features, words = model.text(cat_tokens(distinct))
    each = features.split([v.num_sequences for v in distinct]), split_tokens(words, distinct)
    by_view = {id(view): seen for view, *seen in zip(distinct, *each, strict=True)}
    return (
        {name: by_view[id(view)][0] for name, view in views.items()},
        {name: by_view[id(view)][1] for name, view in views.items()},
    )


def positives(batch: Batch) -> Tensor:
    """(B, B) bool: pairs that belong together, since the video or the caption is the same."""
    same_video = batch.video_keys[:, None] == batch.video_keys
    same_caption = batch.caption_keys[:, None] == batch.caption_keys
    return same_video | same_caption


def fuse(
    model: Model,
    recipe: Recipe,
    batch: Batch,
    video: EncodedVideo,
    features: dict[str, Tensor],
    words: dict[str, PackedTokens],
    same: Tensor,
    scores: Tensor | None,
) -> tuple[Pairs | None, Masked | None]:
    """Positives, hard negatives and masked captions in one call of the fusion encoder. scores (B, B) choose the
    negatives; without them all are alike."""
    assert model.fusion is not None
    texts: list[PackedTokens] = []
    summaries: list[Tensor] = []
    videos: list[Tensor] = []
    valid: list[Tensor] = []
    asked: list[Tensor] = []  # the words whose answers are read: [CLS] of a pair, the masked ones of a masked caption
    counts: list[int] = []
    own = torch.arange(len(same), device=same.device)
    for objective in recipe.objectives.values():
        if isinstance(objective, Vtm):
            likely = torch.zeros(same.shape, device=same.device) if scores is None else scores.detach()
            negatives, found = hard_negatives(likely, same, objective.negatives, recipe.seed, batch.step)
            copies = 1 + negatives.shape[1]
            texts += [words["match"]] * copies
            summaries += [features["match"]] * copies
            videos += [own, *negatives.unbind(1)]
            valid += [torch.ones_like(found[:, 0]), *found.unbind(1)]
            each = uniform_cu_seqlens(copies - 1, words["match"].rows, same.device)
            asked.append((each[:, None] + words["match"].first_rows()).flatten())
            counts += [1] * copies * len(own)
    pairs_count = len(counts)
    if "masked" in words:
        asked.append(batch.masked_rows + sum(text.rows for text in texts))
        counts += batch.masked_counts
        texts.append(words["masked"])
        summaries.append(features["masked"])
        videos.append(own)

    kv_ids = video.frame_ids.index_select(0, torch.cat(videos))
    gate = None
    if model.selector is not None:
        query = torch.cat(summaries)
        if model.selector.config.query == "own":
            query = features.get("match", features["contrast"]).index_select(0, torch.cat(videos))
        kv_ids, gate = model.selector(video.summaries, query, kv_ids, seed=recipe.seed, step=batch.step)
    fused = model.fusion(texts, video.frames, kv_ids, gate, rows=torch.cat(asked), lengths=tuple(counts))

    pairs = masked = None
    answers, hidden = fused.values.split([pairs_count, fused.rows - pairs_count])
    if pairs_count:
        labels = F.pad(torch.ones_like(own), (0, pairs_count - len(own)))
        pairs = Pairs(answers, labels, torch.cat(valid))
    if "masked" in words:
        masked = Masked(hidden, batch.masked_labels)
    return pairs, masked


def contrast_scores(model: Model, text: Tensor, video: Tensor) -> dict[nn.Module, Tensor]:
    """(texts, videos) logits of the contrast, by its head: for the negatives, and for the loss."""
    return {head: head.scores(text, video) for head in model.heads.values() if isinstance(head, VtcHeads)}


def hard_negatives(scores: Tensor, same: Tensor, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Videos that a text is likely to be confused with, drawn without replacement in proportion to exp(score).

    scores and same (B, B) -> (B, count) int64, and whether each really is a negative, (B, count) bool: where a text has
    too few of them, positives stand in. Gumbel top-k, Kool et al. 2019, since `multinomial` reads the device.
    """
    uniform = noise(same.numel(), seed=seed, step=step, stream=PAIR_STREAM, device=same.device)
    gumbel = -torch.log(-torch.log(uniform)).view_as(scores)
    drawn = (scores + gumbel).masked_fill(same, float("-inf")).topk(min(count, len(same)), dim=1)
    return drawn.indices, drawn.values > float("-inf")
