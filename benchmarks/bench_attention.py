"""Attention of packed sequences, forward and backward, beside what plain PyTorch offers for them.

    pytest benchmarks/bench_attention.py --benchmark-only

`frames`: what is left of frames by a random mask at ViT-B width, 12 to 96 tokens of 196. `clips`: equal lengths, where
padding costs nothing and so our advantage is none. Every provider gives the same result, which is checked first.
"""

import pytest
import torch
from torch.nn import functional as F

from smaug import ops
from smaug.testing import offsets, relative_error

LENGTHS = {
    "frames": [12 + int(n) for n in torch.randint(0, 85, (64,), generator=torch.Generator().manual_seed(0))],
    "clips": [103] * 32,
}
HEADS, WIDTH = 12, 64


def packed(q, k, v, lengths):
    cu = offsets(lengths, q.device)
    host = tuple(lengths)
    return lambda: ops.attention(q, k, v, cu, lengths_q=host)


def looped(q, k, v, lengths):
    def run():
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)

    return run


def padded(q, k, v, lengths):
    """Rows and mask are made once, outside the time; bringing the rows in and out is part of it."""
    longest = max(lengths)
    mask = torch.arange(longest, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    rows = mask.flatten().nonzero()[:, 0]

    def run():
        full = [
            x.new_zeros(mask.numel(), HEADS, WIDTH)
            .index_copy(0, rows, x)
            .view(*mask.shape, HEADS, WIDTH)
            .transpose(1, 2)
            for x in (q, k, v)
        ]
        o = F.scaled_dot_product_attention(*full, attn_mask=mask[:, None, None])
        return o.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return run


PROVIDERS = {"smaug": packed, "looped_sdpa": looped, "padded_sdpa": padded}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", LENGTHS)
def test_attention(timed, device, case, dtype, provider):
    lengths = LENGTHS[case]
    generator = torch.Generator().manual_seed(1)
    q, k, v, g = (torch.randn(sum(lengths), HEADS, WIDTH, generator=generator).to(device, dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    run = PROVIDERS[provider](q, k, v, lengths)
    with torch.no_grad():
        truth = looped(*(x.double() for x in leaves), lengths)()
        assert relative_error(run(), truth) < (1e-5 if dtype == torch.float32 else 1e-2)
    shape = f"{len(lengths)} sequences of {min(lengths)}..{max(lengths)}, {HEADS} heads of {WIDTH}"
    timed(lambda: torch.autograd.grad(run(), leaves, g), shape, dtype, rounds=8)
