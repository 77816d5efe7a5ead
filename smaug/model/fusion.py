"""The fusion encoder: words attend to the frames of the video that they are paired with.

Keys and values of a frame are projected once per layer and never copied: a pair is an index (`kv_ids`) into them, so a
video that meets ten texts costs no more memory than one that meets one. Form: Singularity, Lei et al. 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from smaug import ops
from smaug.model.layers import ACTIVATIONS, Activation, Norm, SelfAttention, init_linear, normed
from smaug.tokens import Lengths, PackedTokens, cat_tokens, regroup, split_tokens, take_rows

KeyValue = tuple[Tensor, Tensor]  # of all frames in one block, each (T_k, H, E)


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of the fusion encoder. Its width is the text encoder's."""

    depth: int = 0  # blocks; with 0 there is no fusion encoder
    heads: int = 4
    mlp_ratio: float = 4.0
    norm: Norm = "pre"  # as the text encoder's
    eps: float = 1e-5  # of LayerNorms
    activation: Activation = "gelu"


class FusionBlock(nn.Module):
    """Self-attention over the words, cross-attention to the frames, then the MLP.

    With norm="post" it is a layer of BERT, in whose middle the words gain what they read from the frames: where that is
    nothing, the layer gives what BERT's gives.
    """

    def __init__(self, width: int, video_width: int, config: FusionConfig, impl: str) -> None:
        super().__init__()
        self.heads, self.impl = config.heads, impl
        self.post, self.activation = config.norm == "post", ACTIVATIONS[config.activation]
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.attention = SelfAttention(width, config.heads, impl)
        self.norm_cross = nn.LayerNorm(width, config.eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(video_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.up = nn.Linear(width, int(config.mlp_ratio * width))
        self.down = nn.Linear(int(config.mlp_ratio * width), width)

    def attend(self, words: PackedTokens) -> PackedTokens:
        """The words among themselves: the same for whatever frames they are paired with."""
        x = words.values
        if self.post:
            return words.with_values(normed(self.norm1, x + self.attention(words)[0]))
        return words.with_values(x + self.attention(words.with_values(self.norm1(x)))[0])

    def project(self, frames: PackedTokens) -> KeyValue:
        k, v = self.key_value(frames.values).view(len(frames.values), 2, self.heads, -1).unbind(1)
        return k, v

    def see(
        self,
        words: PackedTokens,
        frames: PackedTokens,
        kv_ids: Tensor,
        gate: Tensor | None,
        key_value: KeyValue | None = None,
    ) -> PackedTokens:
        x = words.values
        single = gate is not None and gate.shape[1] == 1
        q = self.query(self.norm_cross(x)).unflatten(1, (self.heads, -1))
        k, v = FusionBlock.project(self, frames) if key_value is None else key_value
        o = ops.attention(
            q,
            k,
            v,
            words.cu_seqlens,
            frames.cu_seqlens,
            kv_ids=kv_ids,
            segment_bias=None if single else gate,
            lengths_q=words.lengths,
            lengths_k=frames.lengths,
            impl=self.impl,
        )
        o = o.flatten(1)
        if single:
            # The softmax would cancel a number added to all keys. So the gate scales what was read: top-1 routing of
            # Switch Transformer, Fedus et al. 2022, section 2.1.
            assert gate is not None
            rows = torch.arange(words.rows, device=x.device)
            text = torch.searchsorted(words.cu_seqlens[1:], rows, right=True)
            if words.used != words.rows:  # a tail, of no text
                text = text.clamp(max=len(gate) - 1)
            o = o * (1 + gate.index_select(0, text)).to(o.dtype)
        x = x + self.proj(o)
        if self.post:
            return words.with_values(normed(self.norm2, x + self.down(self.activation(self.up(x)))))
        return words.with_values(x + self.down(self.activation(self.up(self.norm2(x)))))


class Fusion(nn.Module):
    def __init__(self, width: int, video_width: int, config: FusionConfig, impl: str = "auto") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(width, video_width, config, impl) for _ in range(config.depth))
        self.norm = nn.Identity() if config.norm == "post" else nn.LayerNorm(width, config.eps)
        init_linear(self)

    def project(self, frames: PackedTokens) -> list[KeyValue]:
        """Keys and values of the frames (T_k, D_v) in each block: made once, they serve any number of calls."""
        return [block.project(frames) for block in cast(list[FusionBlock], list(self.blocks))]

    def read(self, texts: PackedTokens) -> PackedTokens:
        """The texts after the first block's self-attention: what `fuse` takes, the same for whatever they meet."""
        return cast(FusionBlock, self.blocks[0]).attend(texts)

    def forward(
        self,
        texts: Sequence[PackedTokens],
        frames: PackedTokens,
        kv_ids: Tensor,
        gate: Tensor | None,
        *,
        rows: Tensor | None = None,
        lengths: Lengths | Tensor = None,
        keys_values: Sequence[KeyValue] | None = None,
    ) -> PackedTokens:
        """P packed texts, each paired with the frames that its row of kv_ids names -> their words, fused, (T, D).

        texts       P sequences of encoded words in parts. A part that is in it several times (one object), to meet
                    several videos, goes through the first block's self-attention once.
        frames      S sequences of encoded patches, (T_k, D_v), one sequence a frame.
        kv_ids      (P, M) int32, the frames that a text sees; -1 is none.
        gate        (P, M) fp32 added to the logits of a frame's keys, or None; see `FrameSelector`.
        rows        (n,) int64 ascending, the words that are asked for, lengths[p] of text p (see `take_rows`); None:
                    all of them. In the last block these alone look at the frames: nobody reads what it would say of
                    the others.
        keys_values `project(frames)`, if it has been made already.
        """
        distinct = list({id(text): text for text in texts}.values())
        read = split_tokens(self.read(cat_tokens(distinct)), distinct)
        by_text = {id(text): part for text, part in zip(distinct, read, strict=True)}
        words = cat_tokens([by_text[id(text)] for text in texts])
        return self.fuse(words, frames, kv_ids, gate, rows=rows, lengths=lengths, keys_values=keys_values)

    def fuse(
        self,
        words: PackedTokens,
        frames: PackedTokens,
        kv_ids: Tensor,
        gate: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        lengths: Lengths | Tensor = None,
        keys_values: Sequence[KeyValue] | None = None,
        together: Sequence[int] | None = None,
    ) -> PackedTokens:
        """What `forward` does with texts that `read` has returned, as one PackedTokens.

        together    host numbers that sum up to P: so many neighbouring texts see the same frames, kv_ids and gate have
                    one row for them, and their words are the queries of one attention over keys read once.
        """
        blocks = cast(list[FusionBlock], list(self.blocks))
        for number, block in enumerate(blocks):
            words = block.attend(words) if number else words
            if rows is not None and number == len(blocks) - 1:
                assert lengths is not None
                words = take_rows(words, rows, lengths)
            queries = words if together is None else regroup(words, together)
            key_value = None if keys_values is None else keys_values[number]
            words = words.with_values(block.see(queries, frames, kv_ids, gate, key_value).values)
        return words.with_values(self.norm(words.values))
