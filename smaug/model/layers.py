"""The transformer block, on packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug import ops
from smaug.tokens import PackedTokens, packed_uniform

Norm = Literal["pre", "post"]  # LayerNorm on what a branch reads, as in ViT; or on the sum behind it, as in BERT
Activation = Literal["gelu", "quick_gelu"]  # the latter is CLIP's


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x); Hendrycks and Gimpel 2016, section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class RelativePosition(nn.Module):
    """A learned number for each head and each offset between two patches of a grid; BEiT, Bao et al. 2022 (its code).

    Rows of `table`: (2 rows - 1)^2 offsets, then [CLS] to patch, patch to [CLS], [CLS] to itself.
    """

    def __init__(self, rows: int, heads: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) ** 2 + 3, heads))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (S, n) of tokens, moment * N + patch, [CLS] first -> what their logits gain, (S, heads, n, n) fp32.

        Moments do not matter. A fused token, whose id is -1, stands nowhere: it gains nothing with patches.
        """
        rows, entries = self.rows, len(self.table)
        place = ids % rows**2
        y, x = place // rows, place % rows
        entry = (y[:, :, None] - y[:, None, :] + rows - 1) * (2 * rows - 1) + x[:, :, None] - x[:, None, :] + rows - 1
        nowhere = ids < 0
        entry = entry.masked_fill(nowhere[:, :, None] | nowhere[:, None, :], entries)
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        entry = entry.masked_fill(first[:, None], entries - 3).masked_fill(first, entries - 2)
        entry = entry.masked_fill(first[:, None] & first, entries - 1)
        return F.embedding(entry, F.pad(self.table, (0, 0, 0, 1))).permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention of each sequence to itself; ViT, Dosovitskiy et al. 2021.

    relative    rows of the grid for BEiT's bias, or 0 for none. The op has biases by key, not by pair, so with this one
                PyTorch's attention computes, which takes sequences of one length.
    """

    def __init__(self, width: int, heads: int, impl: str, relative: int = 0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.impl = impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative = RelativePosition(relative, heads) if relative else None

    def of(self, queries: PackedTokens, tokens: PackedTokens) -> Tensor:
        """Some tokens of each sequence attend to all of it: queries (T', D) -> (T', D)."""
        assert self.relative is None
        own, rest = self.qkv.weight.split([len(self.proj.weight), 2 * len(self.proj.weight)])
        own_bias, rest_bias = self.qkv.bias.split([len(own), len(rest)])
        q = F.linear(queries.values, own, own_bias).unflatten(1, (self.heads, -1))
        k, v = F.linear(tokens.values, rest, rest_bias).view(tokens.rows, 2, self.heads, -1).unbind(1)
        o = ops.attention(
            q,
            k,
            v,
            queries.cu_seqlens,
            tokens.cu_seqlens,
            lengths_q=queries.lengths,
            lengths_k=tokens.lengths,
            impl=self.impl,
        )
        return self.proj(o.flatten(1))

    def forward(self, tokens: PackedTokens, *, score: bool = False) -> tuple[Tensor, Tensor | None]:
        """-> (T, D); and with `score` how much attention each row got from its sequence's [CLS], (T,) fp32."""
        q, k, v = self.qkv(tokens.values).view(tokens.rows, 3, self.heads, -1).unbind(1)
        if self.relative is not None:
            o, received = self._by_pair(q, k, v, tokens, self.relative, score)
            return self.proj(o), received
        if score:
            o, scores = ops.attention(
                q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, key_scores="cls", impl=self.impl
            )
            return self.proj(o.flatten(1)), scores
        o = ops.attention(q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, impl=self.impl)
        return self.proj(o.flatten(1)), None

    def _by_pair(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, relative: RelativePosition, score: bool
    ) -> tuple[Tensor, Tensor | None]:
        length = tokens.lengths
        if not isinstance(length, int):
            raise ValueError(
                "positions by pairs (BEiT's) need sequences of one length: use attend='frame', or no images"
            )
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # (S, H, n, E)
        bias = relative(tokens.ids.view(-1, length)).to(q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2).flatten(0, 1)
        if not score:
            return o, None
        with torch.no_grad():
            logits = (q[:, :, :1].float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3) + bias[:, :, :1]
            return o, logits.softmax(-1).mean(1).flatten()


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); with norm="post" norm(x + attention(x)), then
    norm(x + mlp(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        impl: str,
        *,
        norm: Norm = "pre",
        eps: float = 1e-5,
        activation: Activation = "gelu",
        relative: int = 0,
    ) -> None:
        super().__init__()
        self.post, self.activation = norm == "post", ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = SelfAttention(width, heads, impl, relative)
        self.norm2 = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, int(mlp_ratio * width))
        self.down = nn.Linear(int(mlp_ratio * width), width)

    # What `smaug.blocks` compiles or recomputes as one piece. Pieces call each other by the class: those of an instance
    # may have been replaced.

    def forward(self, tokens: PackedTokens) -> PackedTokens:
        return Block.mlp(self, Block.attend(self, tokens)[0])

    def attend(self, tokens: PackedTokens, *, score: bool = False) -> tuple[PackedTokens, Tensor | None]:
        """The first half. Pruning, if any, happens between the halves, so that the MLP sees survivors only."""
        if self.post:
            o, scores = self.attention(tokens, score=score)
            return tokens.with_values(normed(self.norm1, tokens.values + o)), scores
        o, scores = self.attention(tokens.with_values(self.norm1(tokens.values)), score=score)
        return tokens.with_values(tokens.values + o), scores

    def end(self, tokens: PackedTokens, count: int) -> PackedTokens:
        """The block's output for the last `count` tokens of each sequence, sequences being of one length.

        For the block after which nobody reads the others: those are keys and values, and nothing else is computed.
        """
        assert isinstance(tokens.lengths, int) and not self.post
        shape, x = (tokens.num_sequences, tokens.lengths, -1), self.norm1(tokens.values)
        asked, normed = (y.view(shape)[:, tokens.lengths - count :].flatten(0, 1) for y in (tokens.values, x))
        queries = packed_uniform(normed, count)
        return Block.mlp(self, queries.with_values(asked + self.attention.of(queries, tokens.with_values(x))))

    def mlp(self, tokens: PackedTokens) -> PackedTokens:
        x = tokens.values
        if self.post:
            return tokens.with_values(normed(self.norm2, x + self.down(self.activation(self.up(x)))))
        return tokens.with_values(x + self.down(self.activation(self.up(self.norm2(x)))))


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) where that is the stream itself: it stays in its precision, while autocast's layer_norm on a GPU returns
    fp32."""
    return norm(x).to(x.dtype)


def init_linear(module: nn.Module) -> None:
    """Truncated normal of variance 0.5 / fan-in: keeps a pre-norm stream of any width near unit size."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=(0.5 / m.in_features) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
