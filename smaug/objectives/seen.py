"""What one step has to show to its objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from smaug.model.video_encoder import EncodedVideo
from smaug.tokens import PackedTokens


@dataclass(frozen=True)
class Removed:
    """A group of B clips as it was before masking, and what was taken away."""

    video: Tensor  # (B, F, H, W, 3) uint8
    samples: Tensor  # (B,) int64
    ids: Tensor  # (B, R) int32 ascending, moment * N + patch
    sequences: int  # of the encoder a clip; each lost the same number of patches


@dataclass(frozen=True)
class Pairs:
    """Texts fused with videos: B matching pairs, then the negatives."""

    features: Tensor  # (P, D), the fused [CLS] rows
    labels: Tensor  # (P,) int64, 1 where text and video belong together
    valid: Tensor  # (P,) bool, False for a negative of a text that has none in this batch


@dataclass(frozen=True)
class Choices:
    """Each clip's own options, fused with it."""

    features: Tensor  # (B * options, D), the fused [CLS] rows
    labels: Tensor  # (B,) int64, which of a clip's options is right


@dataclass(frozen=True)
class Asked:
    """Questions, fused with their videos."""

    words: PackedTokens  # B sequences of fused words, normalised; [CLS] alone where nobody asks for more
    labels: Tensor  # (B,) int64, numbers in the list of answers; -100 for what is not in it
    begun: PackedTokens | None  # word numbers of the answers' beginnings, for a decoder
    begun_labels: Tensor  # (n,) int64, the word after each
    begun_of: Tensor  # (n,) int64, the question that each belongs to


@dataclass(frozen=True)
class Masked:
    """Captions with masked words, fused with their own videos."""

    features: Tensor  # (n, D), the masked words
    labels: Tensor  # (n,) int64, which words they were


@dataclass(frozen=True)
class Seen:
    """The encoders' outputs for B pairs, and which pairs belong together. What no objective needs is None."""

    video: EncodedVideo
    text: Tensor  # (B, D) caption features that the contrast sees
    positives: Tensor  # (B, B) bool, text i belongs to video j: same video or same caption
    removed: Sequence[Removed]  # one a group
    seed: int
    epoch: int | Tensor  # or int64 () on the device
    # (B, B) logits by contrast head, where they have been computed already, for the negatives
    scores: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None  # (B, 2) int64, equal where videos, where captions are the same
    pairs: Pairs | None = None
    choices: Choices | None = None
    asked: Asked | None = None
    masked: Masked | None = None
