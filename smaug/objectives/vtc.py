"""vtc: video-text contrast, the symmetric InfoNCE on normalised clip and caption vectors."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.distributed import gather_rows, ranks
from smaug.model.layers import init_linear
from smaug.model.model import Model, ModelConfig
from smaug.objectives.seen import Seen


class VtcHeads(nn.Module):
    """Projections into the shared space and the learned temperature."""

    def __init__(self, video_width: int, text_width: int, embed_dim: int, temperature: float) -> None:
        super().__init__()
        self.video = nn.Linear(video_width, embed_dim)
        self.text = nn.Linear(text_width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))  # FSDP2 shards no scalars
        init_linear(self)

    def embed_video(self, features: Tensor) -> Tensor:
        """(B, D) clip features -> (B, embed_dim) fp32 unit vectors."""
        return F.normalize(self.video(features).float(), dim=-1)

    def embed_text(self, features: Tensor) -> Tensor:
        """(B, D) caption features -> (B, embed_dim) fp32 unit vectors."""
        return F.normalize(self.text(features).float(), dim=-1)

    def embed(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Both, normalised in one go."""
        both = torch.cat([self.text(text), self.video(video)])
        texts, videos = F.normalize(both.float(), dim=-1).split([len(text), len(video)])
        return texts, videos

    def temperature(self) -> Tensor:
        # hardtanh is clamp with a backward of one launch, not of five
        return F.hardtanh(self.log_temperature.exp(), 0.001, 0.5)

    def scores(self, text: Tensor, video: Tensor) -> Tensor:
        """(texts, D) and (videos, D) features -> (texts, videos) fp32 logits."""
        temperature = self.temperature()
        texts, videos = self.embed(text, video)
        with in_fp32(texts):
            return texts @ videos.T / temperature


def in_fp32(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """In the bf16 of autocast, scores of different pairs would often be equal."""
    kind = x.device.type  # meta has no autocast
    return torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext()


def contrast_of(model: Model) -> VtcHeads | None:
    """The contrast head of a model, whatever its recipe calls it; None if it was trained without one."""
    return next((heads for heads in model.heads.values() if isinstance(heads, VtcHeads)), None)


class _InParts(torch.autograd.Function):
    """The contrast of some pairs with all pairs, which holds the scores of `part` columns at a time."""

    @staticmethod
    def forward(
        ctx: Any, text: Tensor, video: Tensor, texts: Tensor, videos: Tensor, scale: Tensor,
        keys: Tensor, every: Tensor, part: int,
    ) -> Tensor:  # fmt: skip
        loss = text.new_zeros(())
        ways = []
        for x, y in ((text, videos), (video, texts)):
            top, right, count = (x.new_full((len(x),), start) for start in (float("-inf"), 0.0, 0.0))
            for columns, their_keys in zip(y.split(part), every.split(part), strict=True):
                scores = x @ columns.T * scale
                same = same_pairs(keys, their_keys)
                top = torch.logaddexp(top, scores.logsumexp(1))
                right = right + (scores * same).sum(1)
                count = count + same.sum(1)
            loss = loss + (top - right / count).sum()
            ways += [top, count]
        ctx.save_for_backward(text, video, texts, videos, scale, keys, every, *ways)
        ctx.part = part
        return loss / (2 * len(text))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        text, video, texts, videos, scale, keys, every, *ways = ctx.saved_tensors
        weight = grads[0] / (2 * len(text))
        found, grad_scale = [], torch.zeros_like(scale)
        for x, y, top, count in ((text, videos, *ways[:2]), (video, texts, *ways[2:])):
            grad_x, grad_y = torch.zeros_like(x), []
            for columns, their_keys in zip(y.split(ctx.part), every.split(ctx.part), strict=True):
                bare = x @ columns.T
                grad = (bare * scale - top[:, None]).exp() - same_pairs(keys, their_keys) / count[:, None]
                grad_scale += (grad * bare).sum()
                grad_x += grad @ columns
                grad_y.append(grad.T @ x)
            found.append((grad_x * (scale * weight), torch.cat(grad_y) * (scale * weight)))
        (grad_text, grad_videos), (grad_video, grad_texts) = found
        return grad_text, grad_video, grad_texts, grad_videos, grad_scale * weight, None, None, None


def same_pairs(keys: Tensor, others: Tensor) -> Tensor:
    """(B, 2) and (A, 2) int64, keys of videos and captions -> (B, A) bool: pairs that share the one or the other."""
    return (keys[:, None, 0] == others[:, 0]) | (keys[:, None, 1] == others[:, 1])


@dataclass(frozen=True)
class Vtc:
    """(CE(s, y) + CE(s^T, y)) / 2 with s_ij = <text_i, video_j> / temperature.

    y spreads evenly over all positives of a row, same video or same caption, so that a repeated caption is not a false
    negative. Form and temperature range: Singularity, Lei et al. 2023, section 3 and its code.

    With several processes the candidates are the pairs of all of them, gathered with their gradients. Then, and above
    `part` pairs, the scores are computed again in the backward instead of being kept.
    """

    weight: float = 1.0
    embed_dim: int = 128
    temperature: float = 0.07  # at the start; learned, clamped to [0.001, 0.5]
    part: int = 8192  # pairs whose scores are held at a time, twice fp32 for each pair of a process

    def heads(self, model: ModelConfig, vocabulary: int) -> VtcHeads:
        return VtcHeads(model.video.width, model.text.width, self.embed_dim, self.temperature)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert isinstance(heads, VtcHeads)
        if ranks() > 1 or len(seen.text) > self.part:
            assert seen.keys is not None
            text, video = heads.embed(seen.text, seen.video.features)
            with in_fp32(text):
                vectors, keys = gather_rows(torch.cat([text, video], 1), seen.keys)
                texts, videos = vectors.tensor_split(2, 1)
                scale = 1 / heads.temperature()
                loss: Tensor = _InParts.apply(text, video, texts, videos, scale, seen.keys, keys, self.part)
                return loss
        scores = seen.scores.get(heads)
        if scores is None:
            scores = heads.scores(seen.text, seen.video.features)
        # rows and columns as one batch: half the launches of two calls of cross_entropy
        target = torch.stack([seen.positives, seen.positives.T]).float()
        target = target / target.sum(-1, keepdim=True)
        return (torch.stack([scores, scores.T]).log_softmax(-1) * target).sum() / (-2 * len(scores))

    def count(self, seen: Seen) -> None:
        """A pair each."""
