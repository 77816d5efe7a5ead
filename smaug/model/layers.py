"""The transformer block, on packed tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from smaug import ops
from smaug.tokens import PackedTokens


class SelfAttention(nn.Module):
    """Multi-head attention of each sequence to itself. values (T, D) -> (T, D); ViT, Dosovitskiy et al. 2021."""

    def __init__(self, width: int, heads: int, impl: str) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.impl = impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, values: Tensor, tokens: PackedTokens) -> Tensor:
        q, k, v = self.qkv(values).view(len(values), 3, self.heads, -1).unbind(1)
        o = ops.attention(q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, impl=self.impl)
        return self.proj(o.flatten(1))


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
        x = tokens.values
        x = x + self.attention(self.norm1(x), tokens)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return tokens.with_values(x)


def init_linear(module: nn.Module) -> None:
    """Truncated normal of variance 0.5 / fan-in: keeps a pre-norm stream of any width near unit size."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=(0.5 / m.in_features) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
