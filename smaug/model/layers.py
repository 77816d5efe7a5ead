"""The transformer block, on packed tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from smaug import ops
from smaug.tokens import PackedTokens, packed_uniform


class SelfAttention(nn.Module):
    """Multi-head attention of each sequence to itself; ViT, Dosovitskiy et al. 2021."""

    def __init__(self, width: int, heads: int, impl: str) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.impl = impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def of(self, queries: PackedTokens, tokens: PackedTokens) -> Tensor:
        """Some tokens of each sequence attend to all of it: queries (T', D) -> (T', D)."""
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
        if score:
            o, scores = ops.attention(
                q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, key_scores="cls", impl=self.impl
            )
            return self.proj(o.flatten(1)), scores
        o = ops.attention(q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, impl=self.impl)
        return self.proj(o.flatten(1)), None


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, impl: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, impl)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, int(mlp_ratio * width))
        self.down = nn.Linear(int(mlp_ratio * width), width)

    def forward(self, tokens: PackedTokens) -> PackedTokens:
        return self.mlp(self.attend(tokens)[0])

    def attend(self, tokens: PackedTokens, *, score: bool = False) -> tuple[PackedTokens, Tensor | None]:
        """The first half. Pruning, if any, happens between the halves, so that the MLP sees survivors only."""
        o, scores = self.attention(tokens.with_values(self.norm1(tokens.values)), score=score)
        return tokens.with_values(tokens.values + o), scores

    def end(self, tokens: PackedTokens, count: int) -> PackedTokens:
        """The block's output for the last `count` tokens of each sequence, sequences being of one length.

        For the block after which nobody reads the others: those are keys and values, and nothing else is computed.
        """
        assert isinstance(tokens.lengths, int)
        shape, x = (tokens.num_sequences, tokens.lengths, -1), self.norm1(tokens.values)
        asked, normed = (y.view(shape)[:, tokens.lengths - count :].flatten(0, 1) for y in (tokens.values, x))
        queries = packed_uniform(normed, count)
        return self.mlp(queries.with_values(asked + self.attention.of(queries, tokens.with_values(x))))

    def mlp(self, tokens: PackedTokens) -> PackedTokens:
        x = tokens.values
        return tokens.with_values(x + self.down(F.gelu(self.up(self.norm2(x)))))


def init_linear(module: nn.Module) -> None:
    """Truncated normal of variance 0.5 / fan-in: keeps a pre-norm stream of any width near unit size."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=(0.5 / m.in_features) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
