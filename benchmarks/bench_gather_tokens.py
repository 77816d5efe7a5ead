"""Rows of the kept tokens out of a grid (gather), and back among mask tokens (scatter: what a decoder reads).

    pytest benchmarks/bench_gather_tokens.py --benchmark-only [--full]

`eager` is MAE's: a gather with expanded indices; for the way back mask tokens repeated, concatenated and unshuffled.
Its backward adds into zeros, ours writes every row once.
"""

import pytest
import torch

from benchmarks.timing import PASSES, compiled, pass_of
from smaug import ops
from smaug.testing import relative_error

FRAMES, PATCHES, WIDTH = 8, 196, 768
N = FRAMES * PATCHES


def eager_gather(x, ids, fill):
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[2]))


def eager_scatter(x, ids, fill):
    batch, kept, width = x.shape
    removed = torch.ones(batch, N, dtype=torch.bool, device=x.device).scatter_(1, ids.long(), False)
    restore = torch.cat([ids.long(), removed.nonzero()[:, 1].view(batch, N - kept)], 1).argsort(1)
    full = torch.cat([x, fill.expand(batch, N - kept, width)], 1)
    return full.gather(1, restore[..., None].expand(-1, -1, width))


FUNCTIONS = {
    ("gather", "smaug"): lambda x, ids, fill: ops.gather_tokens(x, ids),
    ("gather", "eager"): eager_gather,
    ("scatter", "smaug"): lambda x, ids, fill: ops.scatter_tokens(x, ids, N, fill),
    ("scatter", "eager"): eager_scatter,
}


@pytest.mark.parametrize("provider", ["smaug", "eager", "eager_compiled"])
@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("ratio", [0.6, pytest.param(0.9, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [8, pytest.param(32, marks=pytest.mark.full)])
@pytest.mark.parametrize("op", ["gather", "scatter"])
def test_tokens(timed, device, op, batch, ratio, dtype, passed, provider):
    keep = ops.keep_count(N, ratio)
    ids, _ = ops.random_mask(torch.arange(batch, device=device), (FRAMES, PATCHES), keep, seed=0)
    generator = torch.Generator().manual_seed(0)
    x, fill, grad = (
        torch.randn(*shape, WIDTH, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((batch, N if op == "gather" else keep), (), (batch, keep if op == "gather" else N))
    )
    plain = FUNCTIONS[op, "eager"]
    function = FUNCTIONS.get((op, provider)) or compiled(plain)
    leaves = [x] if op == "gather" else [x, fill]
    run = lambda: function(x, ids, fill)  # noqa: E731
    grad = grad.detach()
    with torch.no_grad():
        assert torch.equal(run(), plain(x, ids, fill))
    if passed != "forward":
        for got, want in zip(
            *(torch.autograd.grad(f(x, ids, fill), leaves, grad) for f in (function, plain)), strict=True
        ):
            assert relative_error(got, want) < 2e-2
    a_pass = batch * keep * WIDTH * dtype.itemsize + (x.numel() if op == "gather" else grad.numel()) * dtype.itemsize
    timed(
        *(pass_of(passed, run, leaves, grad), f"{op}, {batch} clips, {keep} of {N} kept, width {WIDTH}", dtype),
        least_bytes=a_pass * (2 if passed == "step" else 1),
        countable=provider != "eager_compiled",
    )
