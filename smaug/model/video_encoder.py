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
from smaug.model.position import resample_time, sincos, sincos_grid
from smaug.tokens import PackedTokens, cat_tokens


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Sizes of the video encoder."""

    width: int = 128
    depth: int = 3  # blocks
    heads: int = 4
    mlp_ratio: float = 4.0
    image_size: int = 64  # pixels, square
    patch: int = 8  # pixels, square
    frames: int = 4  # of a training clip; other numbers work, their time embedding is interpolated
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels on the 0..1 scale
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    @property
    def rows(self) -> int:
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.rows**2


class VideoEncoder(nn.Module):
    """Space-time transformer over the visible patches of each clip, with one [CLS] a clip; MAC, section 3.1."""

    def __init__(self, config: VideoEncoderConfig, impl: str = "auto") -> None:
        super().__init__()
        if config.image_size % config.patch:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch {config.patch}")
        self.config = config
        self.impl = impl
        width = config.width
        self.patch_embed = nn.Linear(3 * config.patch**2, width)  # the Conv3d's weight, flattened
        self.position = nn.Parameter(0.5 * sincos_grid(config.rows, config.rows, width))  # (N, D)
        self.time = nn.Parameter(0.7 * sincos(config.frames, width))  # (F, D)
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, impl) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        init_linear(self)

    def embed(self, video: Tensor, ids_keep: Tensor) -> PackedTokens:
        """Visible patches of a group of clips with their places, [CLS] first.

        video (B, F, H, W, 3) or (B, F, 3, H, W) uint8; ids_keep (B, K) int32 ascending, frame * N + patch.
        -> PackedTokens of B sequences of 1 + K rows.
        """
        time = resample_time(self.time, video.shape[1])
        return ops.patch_embed(
            video,
            ids_keep,
            self.patch_embed.weight,
            self.patch_embed.bias,
            patch=self.config.patch,
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
