"""Retrieval: every caption against every clip. Nothing is masked; pruning and frame selection are as they were trained.

Two stages where the model has a match head: the dual encoder ranks all, the match head ranks the best `top` again
(Singularity, Lei et al. 2023, and its code: what is not among them ranks behind). Singularity ranks them by the match
logit alone. But that logit was trained against negatives drawn in proportion to exp(dual logit), so it says how much
likelier a match is than such a draw: log p(match) = match logit + dual logit + constant. Both count here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.clips import Clips, check_share
from smaug.data.loader import middle_frames
from smaug.data.manifest import Skip
from smaug.metrics import recalls, retrieval_ranks
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.vtc import VtcHeads
from smaug.tokens import PackedTokens, cat_tokens, packed_ragged

CANDIDATES = 500  # at most this many clips, the first of the set
BATCH = 100  # fixed, so that a score does not depend on the machine's memory
PAIRS = 1000  # fused at once


@dataclass(frozen=True)
class Retrieval:
    """`scores`: recalls by name as fractions, and how many candidates there were; `skipped`: clips left out."""

    scores: dict[str, float]
    skipped: list[Skip]


@torch.no_grad()
def retrieval(
    model: Model,
    clips: Clips,
    tokenizer: Tokenizer,
    *,
    frames: int,
    max_bad: float,
    top: int = 16,
    shuffle: bool = False,
    sparse: bool = True,
) -> Retrieval:
    """t2v_r1 ... v2t_medr of the first 500 clips, and t2v_r1_{subset} for each subset among all candidates.

    With a match head these are the scores after the second stage on the best `top`, t2v_r1_dual and v2t_r1_dual those
    before it. Each clip is seen by `frames` middle frames, in a random order with `shuffle`; without `sparse` no patch
    is pruned and every frame is fused.
    """
    heads = model.heads["vtc"]
    if not isinstance(heads, VtcHeads):
        raise ValueError("retrieval needs the vtc objective; this model was trained without it")
    videos, numbers, skipped = _encode_videos(model, clips, frames, max_bad, shuffle, sparse)
    captions = [(i, c) for i, n in enumerate(numbers) for c in clips.samples[n].captions]
    features, words = _encode_texts(model, tokenizer, [c for _, c in captions])
    dual = heads.scores(features, videos.features)

    video_of_text = torch.tensor([i for i, _ in captions])
    ranks = dict(zip(("t2v", "v2t"), retrieval_ranks(dual.cpu(), video_of_text), strict=True))
    found: dict[str, float] = {}
    if model.fusion is not None and "vtm" in model.heads:
        found |= {f"{key}_r1_dual": recalls(r, key)[f"{key}_r1"] for key, r in ranks.items()}
        t2v, v2t = (side.topk(min(top, side.shape[1]), dim=1).indices for side in (dual, dual.T))
        pairs = {"t2v": (_rows(t2v), t2v.flatten()), "v2t": (v2t.flatten(), _rows(v2t))}
        for direction, (key, (text_ids, video_ids)) in enumerate(pairs.items()):
            scores = dual.cpu() + _match(model, videos, features, words, text_ids, video_ids, sparse)
            ranks[key] = retrieval_ranks(scores, video_of_text)[direction]

    found = recalls(ranks["t2v"], "t2v") | recalls(ranks["v2t"], "v2t") | found | {"candidates": float(len(numbers))}
    for name, member in clips.subsets.items():
        of_text = torch.from_numpy(member)[torch.tensor(numbers)][video_of_text]
        if of_text.any():
            found[f"t2v_r1_{name}"] = recalls(ranks["t2v"][of_text], "t2v")["t2v_r1"]
    return Retrieval(found, skipped)


def _encode_videos(
    model: Model, clips: Clips, frames: int, max_bad: float, shuffle: bool, sparse: bool
) -> tuple[EncodedVideo, list[int], list[Skip]]:
    """All clips as one EncodedVideo, and their numbers in the same order."""
    device = next(model.parameters()).device
    parts: list[EncodedVideo] = []
    numbers: list[int] = []
    skipped: list[Skip] = []
    total = min(CANDIDATES, len(clips))
    config = model.video.config
    config.times(frames)  # raises for a number that does not fill the tubes
    for start in range(0, total, BATCH):
        groups, bad = middle_frames(
            clips, range(start, min(start + BATCH, total)), frames, view=config.view, shuffle=shuffle
        )
        skipped += bad
        check_share(skipped, total, max_bad, clips.decoder.name)
        for group in groups:
            everything = torch.arange(math.prod(config.grid(group.video.shape[1])), dtype=torch.int32)
            ids = everything.expand(len(group.video), -1).to(device)
            parts.append(model.video([(group.video.to(device), ids)], keep_rate=None if sparse else 1.0))
            numbers += group.samples.tolist()
    most = max(part.frame_ids.shape[1] for part in parts)
    frame_ids, first = [], 0
    for part in parts:
        ids = torch.nn.functional.pad(part.frame_ids, (0, most - part.frame_ids.shape[1]), value=-1)
        frame_ids.append(torch.where(ids < 0, -1, ids + first))
        first += part.frames.num_sequences
    together = replace(
        parts[0],
        features=torch.cat([part.features for part in parts]),
        frames=cat_tokens([part.frames for part in parts]),
        summaries=torch.cat([part.summaries for part in parts]),
        frame_ids=torch.cat(frame_ids),
    )
    return together, numbers, skipped


def _encode_texts(model: Model, tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, PackedTokens]:
    device = next(model.parameters()).device
    config = model.text.config
    features, encoded = [], []
    for start in range(0, len(captions), BATCH):
        packed = text.pack_captions(tokenizer, captions[start : start + BATCH], config.max_words, config.sep)
        some, tokens = model.text(tree_map_only(Tensor, lambda t: t.to(device), packed))
        features.append(some)
        encoded.append(tokens)
    return torch.cat(features), cat_tokens(encoded)


def _rows(x: Tensor) -> Tensor:
    """The row of each element of a matrix, in the order of `flatten`."""
    return torch.arange(x.numel(), device=x.device) // x.shape[1]


def _match(
    model: Model,
    videos: EncodedVideo,
    features: Tensor,
    words: PackedTokens,
    text_ids: Tensor,
    video_ids: Tensor,
    sparse: bool,
) -> Tensor:
    """Match scores of the pairs (text_ids[i], video_ids[i]), (texts, videos) fp32 on the host; -inf for all others."""
    assert model.fusion is not None
    scores = torch.full((len(features), len(videos.features)), float("-inf"))
    bounds = words.cu_seqlens.tolist()
    for start in range(0, len(text_ids), PAIRS):
        pair_texts, pair_videos = text_ids[start : start + PAIRS], video_ids[start : start + PAIRS]
        spans = [torch.arange(bounds[t], bounds[t + 1]) for t in pair_texts.tolist()]
        lengths = tuple(len(span) for span in spans)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        rows = words.values.index_select(0, torch.cat(spans).to(words.values.device))
        texts = packed_ragged(rows, cu_seqlens.to(rows.device), lengths=lengths)
        kv_ids, gate = videos.frame_ids.index_select(0, pair_videos), None
        if model.selector is not None and sparse:
            kv_ids, gate = model.selector(videos.summaries, features.index_select(0, pair_texts), kv_ids)
        fused = model.fusion([texts], videos.frames, kv_ids, gate, rows=texts.first_rows(), lengths=1)
        logits = model.heads["vtm"](fused.values).float()
        scores[pair_texts.cpu(), pair_videos.cpu()] = (logits[:, 1] - logits[:, 0]).cpu()
    return scores
