"""What a training step would start on a GPU, counted without one: benchmarks/launches.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from smaug import ops
from smaug.tokens import uniform_cu_seqlens

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.launches import Launches, launches, table

del sys.path[0]  # or transformers finds our folder `kernels`, takes it for its own package and fails


def test_what_counts():
    x = torch.randn(4, 8)
    assert launches(lambda: x.view(8, 4).t()[:2]) == launches(lambda: torch.empty(3)) == 0
    assert launches(lambda: (x * 2).sum()) == 2
    assert launches(lambda: x.t().reshape(-1)) == 1  # it copies
    assert launches(lambda: torch.tensor([1, 2])) == 1


def test_dense_and_outside():
    """A residual connection is dense, another addition is not; forward and backward, with autocast's casts."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with Launches() as counter:
        (x + layer(x)).backward(torch.ones(4, 8))
    # Forward: the product, x + y. Backward: products for x and the weight, a sum for the bias, x's two paths added.
    assert counter.dense == {"addmm": 1, "add": 2, "mm": 2, "sum": 1}
    assert counter.outside == {"ones": 1}
    with Launches() as counter, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert counter.dense == {"addmm": 1, "_to_copy": 3} and not counter.outside
    with Launches() as counter:
        x + x * 2
    assert counter.outside == {"mul": 1, "add": 1} and not counter.dense


@pytest.mark.parametrize("scores, forward", [(None, 1), ("cls", 2)])
def test_an_op_counts_what_its_launcher_starts(scores, forward):
    q, k, v = (torch.randn(12, 2, 16, requires_grad=True) for _ in range(3))
    cu_seqlens = uniform_cu_seqlens(3, 4, "cpu")
    with Launches() as counter:
        o = ops.attention(q, k, v, cu_seqlens, lengths_q=4, key_scores=scores)
    assert counter.outside.total() == forward and counter.outside["smaug::attention_forward"] == 1
    o = o[0] if scores else o
    with Launches() as counter:
        o.backward(o.detach())
    assert counter.outside == {"smaug::attention_backward_queries": 1, "smaug::attention_backward_keys": 1}


def test_a_step_of_ours_starts_fewer():
    """docs/method.md has the numbers and why they are no lower."""
    found = table()
    outside = {label: counter.outside.total() for label, counter in found.items()}
    dense = {label: counter.dense.total() for label, counter in found.items()}
    assert outside["ours"] <= 235 and dense["ours"] < dense["eager"]
    assert outside["eager"] >= 1.25 * outside["ours"]
    assert outside["eager, attention written out"] >= 1.75 * outside["ours"]
