"""What is left out: patches of a video, words of a caption. Both by the counter-based generator of `ops.random_mask`.

No mask is ever boolean: a mask is the ascending list of what stays, of a length that the host knows beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smaug import ops
from smaug.ops.random_mask import keep_count

VIDEO_STREAM, TEXT_STREAM = 0, 1  # so that the two never share a random number


@dataclass(frozen=True)
class VideoMask:
    """Which patches the video encoder never sees, during training."""

    ratio: float = 0.6  # share of all patches that is removed, 0..1
    kind: Literal["random", "tube", "block", "frame"] = "random"

    def keep(self, times: int, patches: int) -> int:
        """Tokens kept of a clip of `times` moments: with "tube" the same places at each, with "frame" whole ones."""
        if self.kind == "tube":
            return times * keep_count(patches, self.ratio)
        if self.kind == "frame":
            return patches * keep_count(times, self.ratio)
        return keep_count(times * patches, self.ratio)

    def draw(
        self, samples: Tensor, grid: tuple[int, int, int], *, seed: int, epoch: int, impl: str
    ) -> tuple[Tensor, Tensor]:
        """ids_keep (B, K) and ids_removed (B, all - K), int32 ascending, for samples (B,) int64."""
        times, rows, columns = grid
        keep = self.keep(times, rows * columns)
        return ops.random_mask(
            samples, grid, keep, kind=self.kind, seed=seed, draw=epoch, stream=VIDEO_STREAM, impl=impl
        )


@dataclass(frozen=True)
class TextMask:
    """Which words of a caption are masked, during training."""

    ratio: float = 0.15  # of a caption's words; round(ratio * words) of them
    kind: Literal["drop", "mask"] = "drop"  # left out of the sequence, or replaced by [MASK]

    def draw(self, lengths: Sequence[int], samples: Sequence[int], *, seed: int, epoch: int) -> list[Tensor]:
        """For each caption, of `lengths[i]` words, the ascending positions (0-based, int32) of the words that stay."""
        kept: list[Tensor] = [torch.empty(0, dtype=torch.int32)] * len(lengths)
        for words in set(lengths):  # captions of one length share a call
            rows = [i for i, n in enumerate(lengths) if n == words]
            masked = round(self.ratio * words)
            if masked == 0:
                ids = torch.arange(words, dtype=torch.int32).expand(len(rows), -1)
            else:
                which = torch.tensor([samples[i] for i in rows], dtype=torch.int64)
                # At least one word stays: a caption of nothing says nothing.
                keep = max(1, words - masked)
                ids, _ = ops.random_mask(which, (1, words), keep, seed=seed, draw=epoch, stream=TEXT_STREAM)
            for row, i in zip(ids, rows, strict=True):
                kept[i] = row
        return kept
