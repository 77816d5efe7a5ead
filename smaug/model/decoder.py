"""The pixel decoder: rebuilds masked patches from the visible ones; MAE, He et al. 2022, section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


class Decoder(nn.Module):
    """Runs on frames: each sequence holds a frame's visible tokens and a mask token for each patch to rebuild."""

    def __init__(self, config: DecoderConfig, video: VideoEncoderConfig, impl: str = "auto") -> None:
        super().__init__()
        self.tube = (video.tubelet, video.patch, video.patch)
        width = config.width
        self.enter = nn.Linear(video.width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(video.times(video.frames) * video.patches, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, impl) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * math.prod(self.tube))
        init_linear(self)

    def forward(self, visible: Sequence[tuple[Tensor, Tensor]], ids_masked: Tensor) -> Tensor:
        """Pixels of masked patches.

        visible     parts of (states (S, n, D_v), ids (S, n) int32, moment * N + patch): survivors and exits.
        ids_masked  (S, R) int32, the patches to rebuild, of the same S frames.
        -> (S, R, pixels)
        """
        states = torch.cat([self.enter(states) for states, _ in visible], dim=1)
        ids = torch.cat([ids for _, ids in visible] + [ids_masked], dim=1)
        place = F.embedding(ids, self.position).to(states.dtype)
        masks = self.mask_token.to(states.dtype).expand(*ids_masked.shape, -1)
        x = torch.cat([states, masks], dim=1) + place
        tokens = packed_uniform(x.flatten(0, 1), x.shape[1], ids=ids.flatten())
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        rebuilt = x[:, states.shape[1] :]
        for block in self.blocks[-1:]:
            assert isinstance(block, Block)
            rebuilt = block.end(tokens, ids_masked.shape[1]).values.view_as(rebuilt)
        return self.pixels(self.norm(rebuilt))
