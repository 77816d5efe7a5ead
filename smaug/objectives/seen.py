"""What one step has to show to its objectives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smaug.tokens import PackedTokens


@dataclass(frozen=True)
class Seen:
    """The encoders' outputs for B pairs, and which pairs belong together."""

    video: Tensor  # (B, D) clip features
    video_tokens: PackedTokens  # B sequences
    text: Tensor  # (B, D) caption features
    words: PackedTokens  # B sequences
    positives: Tensor  # (B, B) bool, text i belongs to video j: same video or same caption
