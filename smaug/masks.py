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
from smaug.ops.noise import noise as uniform
from smaug.ops.random_mask import keep_count
from smaug.tokens import uniform_cu_seqlens

# So that no two draws ever share a random number.
VIDEO_STREAM, TEXT_STREAM, DECODER_STREAM, PAIR_STREAM, MLM_STREAM, PRUNE_STREAM, FRAME_STREAM = range(7)
MOMENTS = 4096  # a moment of a clip is numbered sample * MOMENTS + moment where each draws for itself


@dataclass(frozen=True)
class VideoMask:
    """Which patches the video encoder never sees, during training."""

    ratio: float = 0.6  # share of all patches that is removed, 0..1
    # "even" is random with the same number of patches at each moment, which attend="frame" asks for.
    kind: Literal["random", "even", "tube", "block", "frame"] = "random"

    def keep(self, times: int, patches: int) -> int:
        """Tokens kept of a clip of `times` moments: "tube" and "even" the same number at each, "frame" whole ones."""
        if self.kind in ("tube", "even"):
            return times * keep_count(patches, self.ratio)
        if self.kind == "frame":
            return patches * keep_count(times, self.ratio)
        return keep_count(times * patches, self.ratio)

    def draw(
        self, samples: Tensor, grid: tuple[int, int, int], *, seed: int, epoch: int | Tensor, impl: str
    ) -> tuple[Tensor, Tensor]:
        """ids_keep (B, K) and ids_removed (B, all - K), int32 ascending, for samples (B,) int64.

        epoch: an int, or int64 () on the device.
        """
        times, rows, columns = grid
        keep = self.keep(times, rows * columns)
        if self.kind == "even":
            moment = torch.arange(times, device=samples.device)
            each = ops.random_mask(
                torch.add(moment, samples[:, None], alpha=MOMENTS).flatten(),
                (1, rows * columns),
                keep // times,
                seed=seed,
                draw=epoch,
                stream=VIDEO_STREAM,
                impl=impl,
            )
            first = uniform_cu_seqlens(times - 1, rows * columns, samples.device)[:, None]
            kept, removed = ((ids.view(len(samples), times, -1) + first).flatten(1) for ids in each)
            return kept, removed
        return ops.random_mask(
            samples, grid, keep, kind=self.kind, seed=seed, draw=epoch, stream=VIDEO_STREAM, impl=impl
        )


@dataclass(frozen=True)
class TextMask:
    """Which words of a caption are masked, during training."""

    ratio: float = 0.15  # of a caption's words; round(ratio * words) of them
    kind: Literal["drop", "mask"] = "drop"  # left out of the sequence, or replaced by [MASK]

    def draw(
        self, lengths: Sequence[int], samples: Sequence[int], *, seed: int, epoch: int, stream: int = TEXT_STREAM
    ) -> list[Tensor]:
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
                ids, _ = ops.random_mask(which, (1, words), keep, seed=seed, draw=epoch, stream=stream)
            for row, i in zip(ids, rows, strict=True):
                kept[i] = row
        return kept


def noise(count: int, *, seed: int, step: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """(count,) fp32, uniform in (0, 1): the same for a step on every device, without torch's own generators.

    step: an int, or int64 () on the device.
    """
    return uniform(torch.empty(count, device=device), seed=seed, draw=step, stream=stream)
