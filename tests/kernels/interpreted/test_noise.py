"""noise: the same numbers as the reference, bit for bit."""

import pytest
import torch

from smaug import ops  # noqa: F401  (registers the reference)
from smaug.kernels import noise as kernel


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (513,), (64, 64)])
def test_equal(shape):
    for seed, draw, stream in ((0, 0, 0), (-1, 3, 2), (2**62 + 1, 2**24 - 1, 1), (2**32, 2**31, 6), (5, 2**23, 0)):
        want = torch.ops.smaug.noise(torch.empty(shape), seed, draw, stream)
        got = kernel.noise(torch.empty(shape), seed, draw, stream)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        there = kernel.noise(torch.empty(shape), seed, 0, stream, torch.tensor([1, draw])[1])
        assert torch.equal(there, want)


def test_program_order_changes_nothing(in_every_order):
    in_every_order(lambda: kernel.noise(torch.empty(1500), 3, 1, 0))
