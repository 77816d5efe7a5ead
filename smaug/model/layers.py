"""The transformer block, on packed tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from smaug import ops
from smaug.tokens import PackedTokens


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
