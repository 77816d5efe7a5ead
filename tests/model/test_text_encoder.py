"""Packed words equal padded words with a mask, to the last digits, and cost no padded row."""

import pytest
import torch
from torch.nn import functional as F

from smaug.data import text
from smaug.model.text_encoder import TextEncoder, TextEncoderConfig
from smaug.testing import relative_error

CONFIG = TextEncoderConfig(width=48, depth=2, heads=3, max_words=12)
CAPTIONS = [[5, 9, 7], [8], [6, 6, 6, 7, 19, 3, 11, 4, 5, 6, 10], [], [12, 13, 14, 15]]


def encoder(impl="auto"):
    torch.manual_seed(0)
    made = TextEncoder(CONFIG, vocabulary=20, impl=impl)
    for name, p in made.named_parameters():  # biases and norms start as zeros and ones, which would hide a lost one
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))
    return made


def padded(made, words):
    """(B, L, D) and the key mask (B, L): the formula with padding."""
    numbers, mask = words.to_padded()
    places, _ = words.with_values(words.ids).to_padded()
    x = made.word(numbers) + made.position[places.long()]
    for block in made.blocks:
        qkv = block.attention.qkv(block.norm1(x)).view(*x.shape[:2], 3, CONFIG.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + block.attention.proj(o.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    return made.norm(x), mask


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["whole", "dropped", "masked"])
def test_packed_equals_padded(kind, impl):
    made = encoder(impl)
    stay = [torch.arange(len(c))[len(c) % 2 :: 2] for c in CAPTIONS]
    kept = None if kind == "whole" else stay
    words = text.pack(CAPTIONS, 2, kept, mask=17 if kind == "masked" else None)
    assert words.rows == sum(1 + len(stay[i] if kind == "dropped" else c) for i, c in enumerate(CAPTIONS))
    features, tokens = made(words)
    all_rows, mask = padded(made, words)
    truth = all_rows[mask]
    assert relative_error(tokens.values, truth) < 2e-6
    assert relative_error(features, all_rows[:, 0]) < 2e-6

    g = torch.randn_like(truth)
    parameters = dict(made.named_parameters())
    got = torch.autograd.grad(tokens.values, parameters.values(), g)
    want = torch.autograd.grad(truth, parameters.values(), g)
    for name, a, b in zip(parameters, got, want, strict=True):
        assert relative_error(a, b) < 2e-5, name


def test_order_matters_and_neighbours_do_not():
    made = encoder()
    both = made(text.pack([[5, 9, 7], [7, 9, 5]], 2))[0]
    assert (both[0] - both[1]).abs().max() > 1e-2
    torch.testing.assert_close(made(text.pack([[5, 9, 7]], 2))[0], both[:1], atol=1e-6, rtol=1e-5)


def test_bf16_keeps_the_stream_in_bf16():
    made, words = encoder(), text.pack(CAPTIONS, 2)
    seen = []
    made.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].values.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = made(words)[0]
    assert seen == [torch.bfloat16]
    assert relative_error(features, made(words)[0]) < 0.02
