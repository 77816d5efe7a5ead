"""One training step, for every recipe: mask, encode, pair, sum the objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.data.loader import Batch
from smaug.distributed import ranks, total
from smaug.masks import PAIR_STREAM, VideoMask, noise
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.answer import Answer
from smaug.objectives.mc import Mc
from smaug.objectives.mlm import Mlm
from smaug.objectives.seen import Asked, Choices, Masked, Pairs, Removed, Seen
from smaug.objectives.vtc import VtcHeads
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.tokens import PackedTokens, cat_tokens, packed_uniform, split_tokens


@dataclass(frozen=True)
class Encoded:
    """What the encoders make of a batch, and what the objectives need of it besides."""

    video: EncodedVideo
    features: dict[str, Tensor]  # of texts by view, (B, D)
    words: dict[str, PackedTokens]  # by view


class Step(nn.Module):
    """One training step as a module, which is what DDP and FSDP2 want to wrap."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return training_step(self.model, self.recipe, batch)

    def encode(self, batch: Batch, visible: Sequence[tuple[Tensor, Tensor]], views: dict[str, PackedTokens]) -> Encoded:
        return encode(self.model, self.recipe, batch, visible, views)

    def judge(self, batch: Batch, removed: Sequence[Removed], encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        return judge(self.model, self.recipe, batch, removed, encoded)


def training_step(model: Model, recipe: Recipe, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the loss, a scalar, and its unweighted parts by objective. Nothing here reads the device on the host.

    With several processes, each of which has its share of the batch, the mean of their losses and of their gradients is
    that of one process with all of it.
    """
    removed, visible = draw_masks(model, recipe, batch)
    return judge(model, recipe, batch, removed, encode(model, recipe, batch, visible, text_views(recipe, batch)))


def draw_masks(model: Model, recipe: Recipe, batch: Batch) -> tuple[list[Removed], list[tuple[Tensor, Tensor]]]:
    """-> by group what is masked, and (video, ids_keep)."""
    mask, (epoch, _) = video_mask(recipe, batch.step), batch.draws
    visible, removed = [], []
    for group in batch.groups:
        grid = model.video.config.grid(group.video.shape[1])
        ids_keep, ids_removed = mask.draw(group.samples, grid, seed=recipe.seed, epoch=epoch, impl=model.impl)
        visible.append((group.video, ids_keep))
        removed.append(
            Removed(group.video, group.samples, ids_removed, model.video.config.sequences(group.video.shape[1]))
        )
    return removed, visible


def encode(
    model: Model, recipe: Recipe, batch: Batch, visible: Sequence[tuple[Tensor, Tensor]], views: dict[str, PackedTokens]
) -> Encoded:
    """Videos and texts of a batch, or of neighbouring pairs of it: no pair knows of another here."""
    rate, (_, step) = keep_rate(recipe, batch.step), batch.draws
    video = model.video(visible, keep_rate=rate, seed=recipe.seed, step=step, first=batch.first)
    return Encoded(video, *encode_texts(model, views))


def judge(
    model: Model, recipe: Recipe, batch: Batch, removed: Sequence[Removed], encoded: Encoded
) -> tuple[Tensor, dict[str, Tensor]]:
    """All objectives on what was encoded -> the loss and its parts."""
    video, features = encoded.video, encoded.features
    same, fused = positives(batch), {}
    scores: dict[nn.Module, Tensor] = {}
    if any(isinstance(objective, Vtm) for objective in recipe.objectives.values()):  # else (B, B) may be too much
        scores = contrast_scores(model, features["contrast"], video.features)
    if model.fusion is not None:
        fused = fuse(model, recipe, batch, video, features, encoded.words, same, next(iter(scores.values()), None))
    keys = torch.stack([batch.video_keys, batch.caption_keys], 1)
    seen = Seen(video, features["contrast"], same, removed, recipe.seed, batch.draws[0], scores, keys, **fused)

    parts = {name: objective(model.heads[name], seen) for name, objective in recipe.objectives.items()}
    if ranks() > 1:
        counts = {name: objective.count(seen) for name, objective in recipe.objectives.items()}
        parts = balanced(parts, {name: count for name, count in counts.items() if count is not None})
    weights = [recipe.objectives[name].weight for name in parts]
    each = [part if weight == 1 else weight * part for weight, part in zip(weights, parts.values(), strict=True)]
    return torch.stack(each).sum(), parts


def seed_of(loss: Tensor) -> Tensor:
    """What to begin the backward of a loss with: 1, or NaN where it is not finite. Every gradient is NaN then, of all
    processes that share them, and so all of them leave the step out."""
    return torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def balanced(parts: dict[str, Tensor], counts: dict[str, int | Tensor]) -> dict[str, Tensor]:
    """Means over this process' things (words, pairs) -> numbers whose mean over the processes is that over all things:
    a process with more of them counts for more."""
    if not counts:
        return parts
    device = next(iter(parts.values())).device
    own = torch.stack([torch.full((), n, device=device) if isinstance(n, int) else n for n in counts.values()]).float()
    share = own * ranks() / total(own).clamp(min=1)
    return parts | {name: parts[name] * weight for name, weight in zip(counts, share.unbind(), strict=True)}


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
        if isinstance(objective, Mc) and batch.options is not None:
            views["options"] = batch.options
        if isinstance(objective, Answer):
            views["question"] = batch.words
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
) -> dict[str, Any]:
    """All that any objective wants to see fused, in one call of the fusion encoder -> fields of `Seen`.

    Pairs that match and hard negatives, options, questions and masked captions. scores (B, B) choose the negatives;
    without them all are alike.
    """
    assert model.fusion is not None
    texts: list[PackedTokens] = []
    summaries: list[Tensor] = []
    videos: list[Tensor] = []
    asked: list[Tensor] = []  # the words whose answers are read, such as the [CLS] of a pair
    counts: list[Sequence[int] | Tensor] = []  # how many of each text
    own = torch.arange(len(same), device=same.device)
    rows: int | Tensor = 0

    def add(view: str, video_ids: Tensor, these: Tensor, each: Sequence[int] | Tensor) -> None:
        nonlocal rows
        texts.append(words[view])
        summaries.append(features[view])
        videos.append(video_ids)
        asked.append(these + rows)
        counts.append(each)
        used = words[view].used
        rows = rows + (words[view].cu_seqlens[-1] if used is None else used)

    def add_first(view: str, video_ids: Tensor) -> None:
        add(view, video_ids, words[view].first_rows(), [1] * len(video_ids))

    parts: dict[str, int] = {}  # rows of the result that belong to each
    valid: list[Tensor] = []
    for objective in recipe.objectives.values():
        if isinstance(objective, Vtm):
            likely = torch.zeros(same.shape, device=same.device) if scores is None else scores.detach()
            pool = Pool(objective.among, batch.first, batch.places)
            negatives, found = hard_negatives(likely, same, objective.negatives, recipe.seed, batch.draws[1], pool)
            for video_ids in (own, *negatives.unbind(1)):
                add_first("match", video_ids)
            valid = [torch.ones_like(found[:, 0]), *found.unbind(1)]
            parts["pairs"] = len(own) * len(valid)
    if "options" in words:
        each = words["options"].num_sequences // len(own)
        add_first("options", own[:, None].expand(-1, each).flatten())
        parts["choices"] = len(own) * each
    if "question" in words:
        if batch.begun is None:
            add_first("question", own)
        else:  # a decoder reads all words of the question
            asks = words["question"]
            every = torch.arange(asks.rows, device=own.device)
            add("question", own, every, asks.cu_seqlens.diff() if asks.lengths is None else cast(Any, asks.lengths))
        parts["asked"] = len(asked[-1])
    if "masked" in words:
        add("masked", own, batch.masked_rows, batch.masked_counts)
        parts["masked"] = len(batch.masked_rows)

    kv_ids = video.frame_ids.index_select(0, torch.cat(videos))
    gate = None
    if model.selector is not None:
        query = torch.cat(summaries)
        if model.selector.config.query == "own":
            query = features.get("match", features["contrast"]).index_select(0, torch.cat(videos))
        kv_ids, gate = model.selector(video.summaries, query, kv_ids, seed=recipe.seed, step=batch.draws[1])
    lengths: Sequence[int] | Tensor = [n for each in counts if not isinstance(each, Tensor) for n in each]
    if any(isinstance(each, Tensor) for each in counts):  # with capacity; the other counts are ones
        lengths = torch.cat([x if isinstance(x, Tensor) else torch.ones_like(own[:1]).expand(len(x)) for x in counts])
    fused = model.fusion(texts, video.frames, kv_ids, gate, rows=torch.cat(asked), lengths=lengths)

    seen: dict[str, Any] = {}
    for (name, count), values in zip(parts.items(), fused.values.split(list(parts.values())), strict=True):
        if name == "pairs":
            labels = F.pad(torch.ones_like(own), (0, count - len(own)))
            seen[name] = Pairs(values, labels, torch.cat(valid))
        elif name == "choices":
            seen[name] = Choices(values, batch.answers)
        elif name == "asked":
            question = packed_uniform(values, 1) if batch.begun is None else words["question"].with_values(values)
            seen[name] = Asked(question, batch.answers, batch.begun, batch.begun_labels, batch.begun_of)
        else:
            seen[name] = Masked(values, batch.masked_labels)
    return seen


def contrast_scores(model: Model, text: Tensor, video: Tensor) -> dict[nn.Module, Tensor]:
    """(texts, videos) logits of the contrast, by its head: for the negatives, and for the loss."""
    return {head: head.scores(text, video) for head in model.heads.values() if isinstance(head, VtcHeads)}


@dataclass(frozen=True)
class Pool:
    """Whose videos a text may be paired with: those of the `among` neighbours in the batch of all processes."""

    among: int = 0  # 0: all that the process has
    first: int = 0  # place of the process' first pair
    places: Tensor | None = None  # (B,) int64; None: first, first + 1, ...


def hard_negatives(
    scores: Tensor, same: Tensor, count: int, seed: int, step: int | Tensor, pool: Pool | None = None
) -> tuple[Tensor, Tensor]:
    """Videos that a text is likely to be confused with, drawn without replacement in proportion to exp(score).

    scores and same (B, B) -> (B, count) int64, and whether each really is a negative, (B, count) bool: where a text has
    too few of them, positives stand in. Gumbel top-k, Kool et al. 2019, since `multinomial` reads the device.

    A text's random numbers are those of its place in the whole batch, however many processes share that.
    """
    pool = pool or Pool()
    pairs = len(same)
    among = pool.among or pairs
    if pairs % among:
        raise ValueError(f"negatives are drawn among {among} pairs, which do not divide the {pairs} of a process")
    taken = (pool.first + pairs) * among
    uniform = noise(taken, seed=seed, step=step, stream=PAIR_STREAM, device=same.device)
    uniform = uniform[taken - pairs * among :].view(pairs, among)
    if among < pairs or pool.places is not None:
        ordered = torch.arange(pool.first, pool.first + pairs, device=same.device)
        places = ordered if pool.places is None else pool.places
        uniform = uniform.index_select(0, places - pool.first).index_select(1, places % among)
        block = places // among
        same = same | (block[:, None] != block)
    gumbel = -torch.log(-torch.log(uniform)).view_as(scores)
    drawn = (scores + gumbel).masked_fill(same, float("-inf")).topk(min(count, pairs), dim=1)
    return drawn.indices, drawn.values > float("-inf")
