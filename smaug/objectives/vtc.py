"""vtc: video-text contrast, the symmetric InfoNCE on normalised clip and caption vectors."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.model.layers import init_linear
from smaug.model.model import Model, ModelConfig
from smaug.objectives.seen import Seen


class VtcHeads(nn.Module):
    """Projections into the shared space and the learned temperature."""

    def __init__(self, video_width: int, text_width: int, embed_dim: int, temperature: float) -> None:
        super().__init__()
        self.video = nn.Linear(video_width, embed_dim)
        self.text = nn.Linear(text_width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        init_linear(self)

    def embed_video(self, features: Tensor) -> Tensor:
        """(B, D) clip features -> (B, embed_dim) fp32 unit vectors."""
        return F.normalize(self.video(features).float(), dim=-1)

    def embed_text(self, features: Tensor) -> Tensor:
        """(B, D) caption features -> (B, embed_dim) fp32 unit vectors."""
        return F.normalize(self.text(features).float(), dim=-1)

    def scores(self, text: Tensor, video: Tensor) -> Tensor:
        """(texts, D) and (videos, D) features -> (texts, videos) fp32 logits."""
        # hardtanh is clamp with a backward of one launch, not of five
        temperature = F.hardtanh(self.log_temperature.exp(), 0.001, 0.5)
        both = torch.cat([self.text(text), self.video(video)])  # normalised in one go
        texts, videos = F.normalize(both.float(), dim=-1).split([len(text), len(video)])
        kind = texts.device.type  # meta has no autocast
        # In the bf16 of autocast, scores of different pairs would often be equal.
        with torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext():
            return texts @ videos.T / temperature


def contrast_of(model: Model) -> VtcHeads | None:
    """The contrast head of a model, whatever its recipe calls it; None if it was trained without one."""
    return next((heads for heads in model.heads.values() if isinstance(heads, VtcHeads)), None)


@dataclass(frozen=True)
class Vtc:
    """(CE(s, y) + CE(s^T, y)) / 2 with s_ij = <text_i, video_j> / temperature.

    y spreads evenly over all positives of a row, same video or same caption, so that a repeated caption is not a false
    negative. Form and temperature range: Singularity, Lei et al. 2023, section 3 and its code.
    """

    weight: float = 1.0
    embed_dim: int = 128
    temperature: float = 0.07  # at the start; learned, clamped to [0.001, 0.5]

    def heads(self, model: ModelConfig, vocabulary: int) -> VtcHeads:
        return VtcHeads(model.video.width, model.text.width, self.embed_dim, self.temperature)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert isinstance(heads, VtcHeads)
        scores = seen.scores.get(heads)
        if scores is None:
            scores = heads.scores(seen.text, seen.video.features)
        # rows and columns as one batch: half the launches of two calls of cross_entropy
        target = torch.stack([seen.positives, seen.positives.T]).float()
        target = target / target.sum(-1, keepdim=True)
        return (torch.stack([scores, scores.T]).log_softmax(-1) * target).sum() / (-2 * len(scores))
