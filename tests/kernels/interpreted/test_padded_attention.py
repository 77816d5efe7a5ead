"""The yardstick of the static table computes attention, so that comparing instructions with it means something."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.static.padded_attention import padded_attention, padded_attention_backward
from smaug.kernels import launch


def test_forward_and_backward(monkeypatch):
    monkeypatch.setattr(launch, "_architecture", 80)
    torch.manual_seed(0)
    lengths = torch.tensor([70, 3], dtype=torch.int32)
    q, k, v, g = (torch.randn(2, 2, 70, 32) for _ in range(4))
    o, lse = padded_attention(q, k, v, lengths)
    grads = padded_attention_backward(g, q, k, v, o, lse, lengths)
    wanted = [x.double().requires_grad_() for x in (q, k, v)]
    mask = (torch.arange(70) < lengths[:, None])[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(*wanted, attn_mask=mask)
    out.backward(g.double())
    torch.testing.assert_close(o.double(), out.detach(), atol=1e-5, rtol=1e-4)
    for mine, x in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine.double(), x.grad, atol=1e-5, rtol=1e-4)
