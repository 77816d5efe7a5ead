"""Metrics from scores. Ties, and scores that are not numbers, count against the model."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 24  # scores looked at together, so that what is made of them is small beside the matrix


def retrieval_ranks(scores: Tensor, video_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks, from 1, of what belongs together.

    scores (texts, videos); video_of_text (texts,) int64, the one video that a text tells of.
    -> `text_to_video_ranks` (texts,) and `video_to_text_ranks` (videos,), for which two matrices may be given as well.
    """
    return text_to_video_ranks(scores, video_of_text), video_to_text_ranks(scores, video_of_text)


def text_to_video_ranks(scores: Tensor, video_of_text: Tensor) -> Tensor:
    """(texts,) int64, from 1: of each text's video among all videos."""
    ranks = []
    step = max(1, BLOCK // max(1, scores.shape[1]))
    for part, video in zip(scores.split(step), video_of_text.split(step), strict=True):
        own = part.gather(1, video[:, None])
        ranks.append((~(part < own)).sum(1))  # its own score is among them, hence from 1; so written, a NaN loses
    return torch.cat(ranks)


def video_to_text_ranks(scores: Tensor, video_of_text: Tensor) -> Tensor:
    """(videos,) int64, from 1: of a video's best text among all other videos' texts; 0 for a video without a text.

    Singularity, Lei et al. 2023, counts the best of several texts so too.
    """
    ranks = []
    step = max(1, BLOCK // max(1, len(scores)))
    for first in range(0, scores.shape[1], step):
        part = scores[:, first : first + step]
        belongs = video_of_text[:, None] == torch.arange(first, first + part.shape[1], device=scores.device)
        best = part.masked_fill(~belongs, float("-inf")).amax(0)
        rank = 1 + (~(part < best) & ~belongs).sum(0)
        ranks.append(torch.where(belongs.any(0), rank, 0))
    return torch.cat(ranks)


def recalls(ranks: Tensor, prefix: str, suffix: str = "") -> dict[str, float]:
    """Of ranks from 1: R@1, R@5, R@10 as fractions, MedR, the median rank (the mean of the middle two), and MeanR.

    By name: {prefix}_r1{suffix} ... {prefix}_medr{suffix}, {prefix}_meanr{suffix}.
    """
    exact = ranks.double()
    found = {f"r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    found |= {"medr": exact.quantile(0.5).item(), "meanr": exact.mean().item()}
    return {f"{prefix}_{name}{suffix}": value for name, value in found.items()}
