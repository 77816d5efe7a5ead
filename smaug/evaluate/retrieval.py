"""Retrieval: every caption against every clip. Nothing is masked; pruning and frame selection are as they were trained.

Two stages where the model has a match head: the dual encoder ranks all, the match head ranks the best `top` again
(Singularity, Lei et al. 2023, and its code: what is not among them ranks behind). Singularity ranks them by the match
logit alone. But that logit was trained against negatives drawn in proportion to exp(dual logit), so it says how much
likelier a match is than such a draw: log p(match) = match logit + dual logit + constant. Both count here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from smaug.data.clips import Clips
from smaug.data.manifest import Skip
from smaug.data.shapes import Report
from smaug.evaluate.encode import BATCH, EncodedClips, EncodedTexts, encode_set, encode_texts, look
from smaug.evaluate.ensemble import Ensemble
from smaug.evaluate.match import has_match_head, match, read_texts
from smaug.metrics import recalls, retrieval_ranks, text_to_video_ranks, video_to_text_ranks
from smaug.model.model import Model
from smaug.objectives.vtc import contrast_of


@dataclass(frozen=True)
class Retrieval:
    """`scores`: recalls by name as fractions, and how many candidates there were; `skipped`: clips left out."""

    scores: dict[str, float]
    skipped: list[Skip]
    captions: int  # asked
    cut: int  # of them, longer than the model reads


@torch.no_grad()
def retrieval(
    model: Model,
    clips: Clips,
    tokenizer: Tokenizer,
    *,
    frames: int,
    max_bad: float,
    top: int = 16,
    ensemble: Ensemble = "concat",
    shuffle: bool = False,
    sparse: bool = True,
    dual_softmax: bool = False,
    batch: int = BATCH,
    report: Report | None = None,
) -> Retrieval:
    """t2v_r1 ... v2t_meanr of all clips, and t2v_r1_{subset} for each subset among all candidates.

    With a match head these are the scores after the second stage on the best `top`, t2v_r1_dual and v2t_r1_dual those
    before it; `ensemble` says how the frames of a clip become one match score. The dual encoder's vector is always the
    mean over the frames. Each clip is seen by `frames` middle frames, in a random order with `shuffle`; without
    `sparse` no patch is pruned and every frame is fused. `dual_softmax` adds t2v_r1_dsl ... beside the others, see
    `with_dual_softmax`. `batch` clips are encoded, and their keys and values held, at once.
    """
    heads = contrast_of(model)
    if heads is None:
        raise ValueError("retrieval needs the vtc objective; this model was trained without it")
    two_stages = has_match_head(model)
    if ensemble != "concat" and not two_stages:
        raise ValueError(
            f"--ensemble {ensemble} joins match scores, and this model was trained without the vtm objective"
        )
    how = look(model.video.config, frames, ensemble, shuffle=shuffle, sparse=sparse)
    videos = encode_set(model, clips, how, max_bad=max_bad, tokens=two_stages, batch=batch, report=report)
    captions = [(i, c) for i, n in enumerate(videos.numbers) for c in clips.samples[n].captions]
    texts = encode_texts(model, tokenizer, [c for _, c in captions], tokens=two_stages, batch=batch)
    video_of_text = torch.tensor([i for i, _ in captions], device=texts.features.device)
    dual = heads.scores(texts.features, videos.features)

    ranks = dict(zip(("t2v", "v2t"), retrieval_ranks(dual, video_of_text), strict=True))
    beside: dict[str, float] = {}
    if dual_softmax:
        beside |= recalls(text_to_video_ranks(with_dual_softmax(dual, over=0), video_of_text), "t2v", "_dsl")
        beside |= recalls(video_to_text_ranks(with_dual_softmax(dual, over=1), video_of_text), "v2t", "_dsl")
    if two_stages:
        beside |= {f"{key}_r1_dual": recalls(r, key)[f"{key}_r1"] for key, r in ranks.items()}
        ranks = _rank_again(model, videos, texts, dual, video_of_text, top, ensemble, sparse, report)

    found = recalls(ranks["t2v"], "t2v") | recalls(ranks["v2t"], "v2t") | beside
    found["candidates"] = float(len(videos.numbers))
    for name, member in clips.subsets.items():
        of_text = torch.from_numpy(member)[torch.tensor(videos.numbers)].to(dual.device)[video_of_text]
        if of_text.any():
            found[f"t2v_r1_{name}"] = recalls(ranks["t2v"][of_text], "t2v")["t2v_r1"]
    return Retrieval(found, videos.skipped, len(captions), texts.cut)


def with_dual_softmax(scores: Tensor, *, over: int) -> Tensor:
    """score * softmax(score) over dimension `over`, the queries: each candidate's shares of all queries sum to 1.

    scores (texts, videos) are the contrast's logits, so the softmax has the temperature that the model has learned.
    DSL of CAMoE, Cheng et al. 2021. It looks at all test queries at once, which a system that is asked one
    question does not have: its numbers are not to be mixed with plain ones.
    """
    return scores * scores.softmax(over)


def _rank_again(
    model: Model,
    videos: EncodedClips,
    texts: EncodedTexts,
    dual: Tensor,
    video_of_text: Tensor,
    top: int,
    ensemble: Ensemble,
    select: bool,
    report: Report | None,
) -> dict[str, Tensor]:
    """Ranks of texts' videos ("t2v") and of videos' texts ("v2t") after the second stage; see the top of this file.

    A pair that is among the best of both directions is matched once. The device is read for the best, once.
    """
    best = {
        "t2v": dual.topk(min(top, dual.shape[1]), dim=1).indices.cpu().numpy(),
        "v2t": dual.T.topk(min(top, dual.shape[0]), dim=1).indices.cpu().numpy(),
    }
    count = len(dual)
    own = {key: np.arange(len(others)).repeat(others.shape[1]) for key, others in best.items()}
    coded = {"t2v": best["t2v"].ravel() * count + own["t2v"], "v2t": own["v2t"] * count + best["v2t"].ravel()}
    pairs = np.unique(np.concatenate([*coded.values()]))  # by video, then by text
    video_ids, text_ids = np.divmod(pairs, count)

    read, logits = read_texts(model, texts), []
    for first, block in videos.blocks():
        low, high = np.searchsorted(video_ids, [first, first + len(block.numbers)])
        mine = slice(low, high)
        logits.append(
            match(model, block, texts, read, text_ids[mine], video_ids[mine] - first, how=ensemble, select=select)
        )
        if report is not None:
            report("pairs matched", int(high), len(pairs))
    matched = torch.cat(logits)

    ranks = {}
    for key, codes in coded.items():
        where = torch.from_numpy(np.searchsorted(pairs, codes)).to(dual.device)
        video, text = (torch.from_numpy(x).to(dual.device) for x in np.divmod(codes, count))
        scores = torch.full_like(dual, float("-inf"))
        scores[text, video] = dual[text, video] + matched.index_select(0, where)
        ranks[key] = (text_to_video_ranks if key == "t2v" else video_to_text_ranks)(scores, video_of_text)
    return ranks
