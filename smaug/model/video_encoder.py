"""The video encoder: a vision transformer that is given visible patches and nothing else, and loses more on the way.

Masked patches are not read from the picture, not embedded and not attended to (MAE, He et al. 2022, section 3). At
chosen blocks the patches that [CLS] attended to least leave the frame, fused into one token (EViT, Liang et al. 2022,
section 3; SMAUG's Figure 2 b puts this inside the image encoder, frame by frame). Images are videos of one moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug import ops
from smaug.masks import PRUNE_STREAM, noise
from smaug.model.layers import Activation, Block, init_linear, normed
from smaug.model.position import resample_time
from smaug.tokens import PackedTokens, cat_tokens, packed_uniform


@dataclass(frozen=True)
class PruneConfig:
    """Spatial sparsification inside the encoder."""

    blocks: tuple[int, ...] = ()  # 0-based; between attention and MLP of these, patches leave
    keep: float = 0.7  # share of the patches that stays at each of them, once warmed up
    warmup: float = 0.3  # share of the training steps over which the rate falls from 1 to keep, by a cosine
    score: Literal["attention", "random"] = "attention"  # "random" is the twin in the benchmark
    fuse: Literal["mean", "sum", "none"] = "mean"  # what becomes of those that leave: one token, or nothing

    def count(self, patches: int, rate: float) -> int:
        """How many of a frame's patches stay, rounded up, in integers so that every machine agrees."""
        return (patches * round(rate * 65536) + 65535) >> 16


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
    # Whether the frames of a tube are neighbours, or spread over the whole clip: with M tubes, every M-th frame.
    tubes: Literal["adjacent", "spread"] = "adjacent"
    # A sequence is all of a clip, or one moment of it with a [CLS] of its own, followed by layers over the moments.
    attend: Literal["clip", "frame"] = "clip"
    temporal_layers: int = 0
    prune: PruneConfig = field(default_factory=PruneConfig)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels on the 0..1 scale
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    eps: float = 1e-5  # of LayerNorms
    activation: Activation = "gelu"
    norm_before: bool = False  # a LayerNorm in front of the blocks, CLIP's
    relative_position: bool = False  # BEiT's bias by head and pair of patches, in every block
    start: str = ""  # the checkpoint it began from, see smaug/pretrained.py; "": random weights

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
            tubelet = self.tubelet
            raise ValueError(f"{frames} frames do not fill tubelets of {tubelet}; use a multiple of {tubelet}")
        return max(1, frames // self.tubelet)

    @property
    def view(self) -> int:
        """Frames that have to come one after the other over the whole clip; see `loader.in_views`."""
        return self.tubelet if self.tubes == "spread" else 1

    def sequences(self, frames: int) -> int:
        """Sequences that a clip of this many frames is run as."""
        return self.times(frames) if self.attend == "frame" else 1

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Of the tokens of a clip: (moments, rows, columns)."""
        return (self.times(frames), self.rows, self.rows)

    def every_patch(self, video: Tensor) -> Tensor:
        """ids_keep (B, K) int32 of clips (B, F, H, W, 3) of which nothing is masked."""
        ids = torch.arange(math.prod(self.grid(video.shape[1])), dtype=torch.int32, device=video.device)
        return ids.expand(len(video), -1)


@dataclass(frozen=True)
class EncodedVideo:
    """What the encoder makes of B clips, S sequences in all (clips, or moments of clips)."""

    features: Tensor  # (B, D), one vector a clip
    frames: PackedTokens  # S sequences, normalised: [CLS], the patches that stayed, fused tokens
    summaries: Tensor  # (S, D), the [CLS] rows of frames
    frame_ids: Tensor  # (B, M) int32, the sequences of each clip; -1 where a clip has fewer than M
    # For the decoder: (states (S, n, D), ids (S, n) int32) of the patches that stayed, and of those that left, as they
    # left. Fused tokens are in neither.
    stayed: tuple[Tensor, Tensor]
    left: list[tuple[Tensor, Tensor]]
    cls: Tensor | None = None  # (S, D), the [CLS] rows of frames before they were normalised


class VideoEncoder(nn.Module):
    """Transformer over the visible tubes of clips or of moments, with a [CLS] each.

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
        how: dict[str, Any] = {"eps": config.eps, "activation": config.activation}
        self.before = nn.LayerNorm(width, config.eps) if config.norm_before else nn.Identity()
        grid = config.rows if config.relative_position else 0
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, impl, relative=grid, **how) for _ in range(config.depth)
        )
        self.temporal = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, impl, **how) for _ in range(config.temporal_layers)
        )
        self.norm = nn.LayerNorm(width, config.eps)
        init_linear(self)

    def embed(self, video: Tensor, ids_keep: Tensor) -> PackedTokens:
        """Visible tubes of a group of clips with their places, [CLS] first in each sequence.

        video (B, F, H, W, 3) or (B, F, 3, H, W) uint8; ids_keep (B, K) int32 ascending, moment * N + patch; with
        attend="frame" the same number at each moment.
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
            prefix_per=self.config.attend,
            uniform=True,
            impl=self.impl,
        )

    def forward(
        self,
        groups: Sequence[tuple[Tensor, Tensor]],
        *,
        keep_rate: float | None = None,
        seed: int = 0,
        step: int | Tensor = 0,
        first: int = 0,
    ) -> EncodedVideo:
        """Rectangular groups of (video, ids_keep), e.g. videos and images, run as one packed batch.

        keep_rate is that of this step, by default the configuration's; seed and step choose the patches where the
        configuration asks for random pruning, and `first`, how many clips of the batch stand before these.
        """
        tokens = cat_tokens([self.embed(video, ids_keep) for video, ids_keep in groups])
        tokens = tokens.with_values(normed(self.before, tokens.values))
        rate = self.config.prune.keep if keep_rate is None else keep_rate
        left: list[tuple[Tensor, Tensor]] = []
        fused = 0
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            leave = self._leave(tokens, rate, fused) if number in self.config.prune.blocks else 0
            if not leave:
                tokens = block(tokens)
                continue
            tokens, scores = block.attend(tokens, score=True)
            assert scores is not None
            if self.config.prune.score == "random":
                before = first * tokens.rows // sum(len(video) for video, _ in groups)
                every = noise(before + tokens.rows, seed=seed, step=step, stream=PRUNE_STREAM, device=scores.device)
                scores = every[before:]
            tokens, gone, fused = self._prune(tokens, scores, leave, fused)
            left.append(gone)
            tokens = block.mlp(tokens)
        return self._summarise(groups, tokens, left, fused)

    def _leave(self, tokens: PackedTokens, rate: float, fused: int) -> int:
        """How many patches of each sequence leave at a pruning block."""
        if not isinstance(tokens.lengths, int):
            raise ValueError("pruning needs sequences of one length: use attend='frame', or batches without images")
        patches = tokens.lengths - 1 - fused
        return max(0, patches - self.config.prune.count(patches, rate))

    def _prune(
        self, tokens: PackedTokens, scores: Tensor, leave: int, fused: int
    ) -> tuple[PackedTokens, tuple[Tensor, Tensor], int]:
        """Drops the patches with the lowest scores. Earlier fused tokens stay, so that every count is known here."""
        length = tokens.lengths
        assert isinstance(length, int)
        keep = length - 1 - fused - leave
        fuse = None if self.config.prune.fuse == "none" else self.config.prune.fuse
        if fused:
            scores = torch.cat([scores.view(-1, length)[:, :-fused], scores.new_full((1, fused), float("inf")).expand(
                tokens.num_sequences, -1)], dim=1).flatten()  # fmt: skip
        kept, _, dropped = ops.select_tokens(tokens, scores, keep=keep + fused, prefix=1, fuse=fuse, impl=self.impl)
        shape = (tokens.num_sequences, leave)
        states, ids = (x.index_select(0, dropped).unflatten(0, shape) for x in (tokens.values, tokens.ids))
        return kept, (states, ids), fused + (fuse is not None)

    def _summarise(
        self,
        groups: Sequence[tuple[Tensor, Tensor]],
        tokens: PackedTokens,
        left: list[tuple[Tensor, Tensor]],
        fused: int,
    ) -> EncodedVideo:
        sizes = [(len(v), self.config.sequences(v.shape[1])) for v, _ in groups]
        values = tokens.values
        cls, patches, melted = self._apart(values, tokens, fused)
        if self.temporal:
            parts = []
            for (clips, times), part in zip(sizes, self._by_group(cls, sizes), strict=True):
                when = resample_time(self.time, times).to(part.dtype)
                parts.append(packed_uniform((part.view(clips, times, -1) + when).flatten(0, 1), times))
            moments = cat_tokens(parts)
            for block in self.temporal:
                moments = block(moments)
            if isinstance(tokens.lengths, int):
                values = torch.cat([moments.values[:, None], patches, melted], dim=1).flatten(0, 1)
            else:
                values = values.index_copy(0, tokens.first_rows().long(), moments.values)
            cls = moments.values
        frames = tokens.with_values(self.norm(values))
        if isinstance(tokens.lengths, int):
            summaries = frames.values.unflatten(0, (-1, tokens.lengths))[:, 0]
        else:
            summaries = frames.values.index_select(0, tokens.first_rows())

        features, frame_ids, first = [], [], 0
        most = max(times for _, times in sizes)
        for (clips, times), part in zip(sizes, self._by_group(summaries, sizes), strict=True):
            features.append(part.view(clips, times, -1).mean(1))
            ids = torch.arange(first, first + clips * times, dtype=torch.int32, device=values.device).view(clips, times)
            frame_ids.append(F.pad(ids, (0, most - times), value=-1) if times < most else ids)
            first += clips * times
        stayed = patches, self._apart(tokens.ids, tokens, fused)[1]
        if len(groups) > 1:
            features, frame_ids = [torch.cat(features)], [torch.cat(frame_ids)]
        return EncodedVideo(features[0], frames, summaries, frame_ids[0], stayed, left, cls)

    @staticmethod
    def _by_group(x: Tensor, sizes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
        """x (S, D) in parts of `clips * times` rows; itself where there is one, since a split copies its gradient."""
        return [x] if len(sizes) == 1 else x.split([clips * times for clips, times in sizes])

    @staticmethod
    def _apart(x: Tensor, tokens: PackedTokens, fused: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (T, ...) as those of [CLS] (S, ...), of patches (S, n, ...) and of fused tokens (S, fused, ...); none of
        the latter two where lengths differ. Views where they do not: one copy of the gradient for all three."""
        if not isinstance(tokens.lengths, int):
            none = x[:0].unflatten(0, (1, 0))
            return x.index_select(0, tokens.first_rows()), none, none
        sizes = [1, tokens.lengths - 1 - fused, fused]
        cls, patches, melted = x.unflatten(0, (tokens.num_sequences, tokens.lengths)).split(sizes, dim=1)
        return cls.squeeze(1), patches, melted
