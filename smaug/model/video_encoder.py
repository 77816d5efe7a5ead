"""The video encoder: a vision transformer that is given visible patches and nothing else.

Masked patches are not read from the picture, not embedded and not attended to (MAE, He et al. 2022, section 3; MAC, Shu
et al. 2022, does the same for video and text). Images are videos of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smaug import ops
from smaug.model.layers import Block, init_linear
from smaug.model.position import resample_time
from smaug.tokens import PackedTokens, cat_tokens


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Sizes of the video encoder. A token is a tube: `tubelet` frames of a square of `patch` pixels."""

    width: int = 128
    depth: int = 3  # blocks
    heads: int = 4
    mlp_ratio: float = 4.0
    image_size: int = 64  # pixels, square
    patch: int = 8  # pixels, square
    tubelet: int = 4  # frames of a token; with 1 the order of frames is told by the table of times alone
    frames: int = 4  # of a training clip, a multiple of tubelet
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels on the 0..1 scale
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    @property
    def rows(self) -> int:
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Tokens of one moment."""
        return self.rows**2

    def times(self, frames: int) -> int:
        """Moments of a clip; an image is one. Raises ValueError for frames that do not fill their tubelets."""
        if frames != 1 and frames % self.tubelet:
            raise ValueError(
                f"{frames} frames do not fill tubelets of {self.tubelet}; use a multiple of {self.tubelet}"
            )
        return max(1, frames // self.tubelet)

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Of the tokens of a clip: (moments, rows, columns)."""
        return (self.times(frames), self.rows, self.rows)


class VideoEncoder(nn.Module):
    """Space-time transformer over the visible tubes of each clip, with one [CLS] a clip; MAC, section 3.1.

    Tubes are ViViT's tubelet embedding (Arnab et al. 2021, section 3.2). An image is a video that stands still: its
    token is what a tube of equal frames would give, from the weights summed over time, without repeating the image.
    """

    def __init__(self, config: VideoEncoderConfig, impl: str = "auto") -> None:
        super().__init__()
        if config.image_size % config.patch:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch {config.patch}")
        self.config = config
        self.impl = impl
        width = config.width
        self.patch_embed = nn.Linear(3 * config.tubelet * config.patch**2, width)  # the Conv3d's weight, flattened
        self.position = nn.Parameter(torch.randn(config.patches, width) * 0.02)
        self.time = nn.Parameter(torch.randn(config.times(config.frames), width) * 0.02)
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, impl) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        init_linear(self)

    def embed(self, video: Tensor, ids_keep: Tensor) -> PackedTokens:
        """Visible tubes of a group of clips with their places, [CLS] first.

        video (B, F, H, W, 3) or (B, F, 3, H, W) uint8; ids_keep (B, K) int32 ascending, moment * N + patch.
        -> PackedTokens of B sequences of 1 + K rows.
        """
        frames, tubelet, patch = video.shape[1], self.config.tubelet, self.config.patch
        weight = self.patch_embed.weight
        if frames == 1:
            weight, tubelet = weight.unflatten(1, (3, tubelet, patch * patch)).sum(2).flatten(1), 1
        time = resample_time(self.time, self.config.times(frames))
        return ops.patch_embed(
            video,
            ids_keep,
            weight,
            self.patch_embed.bias,
            patch=(tubelet, patch, patch),
            mean=self.config.mean,
            std=self.config.std,
            position=(time[:, None] + self.position).flatten(0, 1),
            prefix=self.cls,
            prefix_per="clip",
            impl=self.impl,
        )

    def forward(self, groups: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, PackedTokens]:
        """Rectangular groups of (video, ids_keep), e.g. videos and images, run as one packed batch.

        -> clip features (B, D), the normalised [CLS] rows in the order of the groups; and all tokens, normalised.
        """
        tokens = cat_tokens([self.embed(video, ids_keep) for video, ids_keep in groups])
        for block in self.blocks:
            tokens = block(tokens)
        tokens = tokens.with_values(self.norm(tokens.values))
        return tokens.values.index_select(0, tokens.first_rows()), tokens
