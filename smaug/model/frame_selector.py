"""Which frames of a video matter for a text: the temporal half of SMAUG's sparsification (Figure 2 c of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from smaug.masks import FRAME_STREAM, noise
from smaug.model.layers import init_linear


@dataclass(frozen=True)
class FrameSelectorConfig:
    """How many frames a pair keeps. The paper scores frames from visual and text features; the network is ours."""

    keep: int = 0  # frames a pair; 0: all, and there is no selector
    score: Literal["learned", "random"] = "learned"  # "random" is the twin in the benchmark
    width: int = 64  # of the space in which a frame meets a text
    # Whose words choose: those of the pair's text, or in training, as an ablation, those of the video's own caption.
    # The latter tells the match head which pairs are true.
    query: Literal["pair", "own"] = "pair"


class FrameSelector(nn.Module):
    """score = <frame, text> in a small space. The best frames stay; a straight-through gate carries the gradient.

    Scoring is done for every pair that is asked about, matching or not. Choosing frames by a video's own caption and
    pairing them with other texts would tell the match head which pairs are true.
    """

    def __init__(self, video_width: int, text_width: int, config: FrameSelectorConfig) -> None:
        super().__init__()
        self.config = config
        self.frame = nn.Linear(video_width, config.width)
        self.text = nn.Linear(text_width, config.width)
        init_linear(self)

    def forward(
        self, frames: Tensor, text: Tensor, kv_ids: Tensor, *, seed: int = 0, step: int | Tensor = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Keeps the best `keep` of each pair's frames.

        frames (S, D_v) frame summaries; text (P, D) text features; kv_ids (P, M) int32, the frames of each pair's
        video, -1 for none; seed and step choose the frames where the configuration asks for random ones.
        -> kv_ids (P, keep) ascending in time, gate (P, keep) fp32: value 0, gradient that of the frame's probability.
        """
        keep = self.config.keep
        if keep == 0 or keep >= kv_ids.shape[1]:
            return kv_ids, None
        own = F.normalize(self.frame(frames).float(), dim=-1)[kv_ids.clamp(min=0).long()]  # (P, M, width)
        meets = F.normalize(self.text(text).float(), dim=-1)
        # Not einsum, which autocast would run in bf16. 8: a scale at which softmax can prefer.
        scores = (own * meets[:, None]).sum(-1) * 8.0
        scores = scores.masked_fill(kv_ids < 0, float("-inf"))
        ranked = scores
        if self.config.score == "random":
            ranked = noise(scores.numel(), seed=seed, step=step, stream=FRAME_STREAM, device=scores.device)
            ranked = ranked.view_as(scores).masked_fill(kv_ids < 0, -1.0)
        best = ranked.topk(keep, dim=1).indices.sort(dim=1).values
        probability = scores.softmax(1).gather(1, best)
        return kv_ids.gather(1, best), probability - probability.detach()
