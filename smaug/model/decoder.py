"""The pixel decoder: rebuilds masked patches from the visible ones; MAE, He et al. 2022, section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.model.layers import Block, init_linear
from smaug.model.video_encoder import VideoEncoderConfig
from smaug.tokens import packed_uniform


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the pixel decoder. It decides the GPU-hours as much as the encoder does."""

    width: int = 64
    depth: int = 1
    heads: int = 2
    mlp_ratio: float = 4.0
    share: float = 0.5  # of the masked patches that are rebuilt, a random part
    # What stands for a visible patch that was pruned: its state at the block where it left, or nothing.
    decoder_input: Literal["exit", "mask"] = "exit"
    cls: bool = False  # MAE's way: [CLS] enters too, and all that enters has passed a LayerNorm


class Decoder(nn.Module):
    """Runs on frames: each sequence holds a frame's visible tokens and a mask token for each patch to rebuild."""

    def __init__(self, config: DecoderConfig, video: VideoEncoderConfig, impl: str = "auto") -> None:
        super().__init__()
        self.tube = (video.tubelet, video.patch, video.patch)
        width = config.width
        self.before = nn.LayerNorm(video.width, video.eps) if config.cls else nn.Identity()
        self.enter = nn.Linear(video.width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(video.times(video.frames) * video.patches, width) * 0.02)
        self.cls_place = nn.Parameter(torch.randn(1, width) * 0.02) if config.cls else None
        how: dict[str, Any] = {"eps": video.eps, "activation": video.activation}
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, impl, **how) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, video.eps)
        self.pixels = nn.Linear(width, 3 * math.prod(self.tube))
        init_linear(self)

    def forward(
        self, visible: Sequence[tuple[Tensor, Tensor]], ids_masked: Tensor, cls: Tensor | None = None
    ) -> Tensor:
        """Pixels of masked patches.

        visible     parts of (states (S, n, D_v), ids (S, n) int32, moment * N + patch): survivors and exits.
        ids_masked  (S, R) int32, the patches to rebuild, of the same S frames.
        cls         (S, D_v), their [CLS], not normalised; read if the configuration says `cls`.
        -> (S, R, pixels)
        """
        states = torch.cat([self.enter(self.before(states)) for states, _ in visible], dim=1)
        ids = torch.cat([ids for _, ids in visible] + [ids_masked], dim=1)
        place = F.embedding(ids, self.position).to(states.dtype)
        masks = self.mask_token.to(states.dtype).expand(*ids_masked.shape, -1)
        x = torch.cat([states, masks], dim=1) + place
        if self.cls_place is not None:
            assert cls is not None
            x = torch.cat([self.enter(self.before(cls))[:, None] + self.cls_place.to(x.dtype), x], dim=1)
            ids = F.pad(ids, (1, 0), value=-1)
        tokens = packed_uniform(x.flatten(0, 1), x.shape[1], ids=ids.flatten())
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        rebuilt = x[:, x.shape[1] - ids_masked.shape[1] :]
        for block in self.blocks[-1:]:
            assert isinstance(block, Block)
            rebuilt = block.end(tokens, ids_masked.shape[1]).values.view_as(rebuilt)
        return self.pixels(self.norm(rebuilt))
