"""That the harness itself finds what it is there to find."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def last_wins(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * 0 + tl.program_id(0))


def test_a_kernel_whose_programs_write_over_each_other_is_found(in_every_order):
    x = torch.arange(10.0)

    def good():
        y = torch.empty(10)
        twice[(3,)](x, y, 10, BLOCK=4)
        return y

    def bad():
        y = torch.empty(4)
        last_wins[(3,)](x, y, BLOCK=4)
        return y

    assert torch.equal(in_every_order(good), 2 * x)
    with pytest.raises(AssertionError, match="program order"):
        in_every_order(bad)


def test_memory_that_nobody_wrote_is_nan():
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    assert torch.empty(2, dtype=torch.int64).tolist() == [-7, -7]
