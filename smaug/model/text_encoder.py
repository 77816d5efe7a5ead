"""The text encoder: a BERT-like transformer over packed words. No padding word is ever computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from smaug.model.layers import Activation, Block, Norm, init_linear, normed
from smaug.tokens import PackedTokens


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder. The number of words it knows comes from the tokenizer."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    max_words: int = 32  # of a caption, [CLS] and [SEP] included; longer captions are cut
    sep: bool = False  # [SEP] behind each caption, as BERT has learned it; never masked, never dropped
    norm: Norm = "pre"  # "post" is BERT's: a LayerNorm behind the embeddings too, and none at the end
    eps: float = 1e-5  # of LayerNorms
    activation: Activation = "gelu"
    start: str = ""  # the checkpoint it began from, see smaug/pretrained.py; "": random weights


class TextEncoder(nn.Module):
    def __init__(self, config: TextEncoderConfig, vocabulary: int, impl: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        how: dict[str, Any] = {"norm": config.norm, "eps": config.eps, "activation": config.activation}
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, impl, **how) for _ in range(config.depth)
        )
        post = config.norm == "post"
        self.before = nn.LayerNorm(config.width, config.eps) if post else nn.Identity()
        self.norm = nn.Identity() if post else nn.LayerNorm(config.width, config.eps)
        init_linear(self)
        nn.init.normal_(self.word.weight, std=0.02)

    def forward(self, words: PackedTokens) -> tuple[torch.Tensor, PackedTokens]:
        """words.values (T,) int64 are word numbers, words.ids (T,) int32 their places in the caption, [CLS] first.

        -> text features (B, D), the normalised [CLS] rows; and all words, normalised, (T, D).
        """
        x = F.embedding(words.values, self.word.weight) + F.embedding(words.places, self.position)
        # Embeddings are fp32 under autocast; the stream is kept in the precision of the products, as the video's is.
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        tokens = words.with_values(normed(self.before, x))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = tokens.with_values(self.norm(tokens.values))
        return tokens.values.index_select(0, tokens.first_rows()), tokens
