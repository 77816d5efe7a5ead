"""Retrieval metrics from a matrix of scores. Ties, and scores that are not numbers, count against the model."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_ranks(scores: Tensor, video_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks, from 1, of what belongs together.

    scores (texts, videos); video_of_text (texts,) int64, the one video that a text tells of.
    -> text-to-video ranks (texts,), and video-to-text ranks (videos,): of a video's best text among all other videos'
    texts. A video without a text has rank 0. Singularity, Lei et al. 2023, counts the best of several texts so too.
    """
    texts, videos = scores.shape
    own = scores.gather(1, video_of_text[:, None])
    t2v = (~(scores < own)).sum(1)  # its own score is among them, hence from 1; so written, a NaN loses

    belongs = torch.zeros(texts, videos, dtype=torch.bool)
    belongs[torch.arange(texts), video_of_text] = True
    best = scores.masked_fill(~belongs, float("-inf")).amax(0)
    v2t = 1 + (~(scores < best) & ~belongs).sum(0)
    return t2v, torch.where(belongs.any(0), v2t, 0)


def recalls(ranks: Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5, R@10 as fractions and MedR, the median rank (the mean of the middle two), of ranks from 1."""
    found = {f"{prefix}_r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return found | {f"{prefix}_medr": torch.quantile(ranks.double(), 0.5).item()}
