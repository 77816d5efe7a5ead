"""Attention of packed sequences, ViT-B's 12 heads of 64, beside everybody who offers it.

    pytest benchmarks/bench_attention.py --benchmark-only [--full]

Keep ratio of 196 patches x how lengths are spread x number of sequences. Every provider gives the same result, which
is checked first. `test_flex_mask` and `test_compile` are what FlexAttention and torch.compile cost beside their calls.
"""

import pytest
import torch

from benchmarks import attention_rivals as rivals
from benchmarks.attention_rivals import BATCH, DISTRIBUTIONS, KEEP, PROVIDERS, Unavailable, lengths_of
from benchmarks.timing import PASSES, pass_of
from smaug.testing import relative_error

SHORT = {("equal", 0.1, 64), ("spread", 0.1, 64), ("spread", 0.4, 16)}  # without --full, besides bf16 alone
POINTS = [(d, k, b) for d in DISTRIBUTIONS for k in KEEP for b in BATCH]
COMPILED = {"eager_compiled", "flex"}


def _case(point, dtype, passed):
    short = point in SHORT and (dtype == torch.bfloat16 or passed == "step")
    name = f"{point[0]}-{point[1]}-{point[2]}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}-{passed}"
    return pytest.param(point, dtype, passed, id=name, marks=() if short else pytest.mark.full)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("point", "dtype", "passed"),
    [_case(point, dtype, p) for point in POINTS for dtype in (torch.float32, torch.bfloat16) for p in PASSES],
)
def test_attention(timed, device, point, dtype, passed, provider):
    lengths = lengths_of(*point)
    *leaves, grad = rivals.inputs(lengths, dtype, device)
    with torch.set_grad_enabled(passed != "forward"):
        try:
            run = PROVIDERS[provider](*leaves, lengths)
        except Unavailable as why:
            pytest.skip(str(why))
    with torch.no_grad():
        truth = rivals.looped_sdpa(*(x.double() for x in leaves), lengths)()
        assert relative_error(run(), truth) < (1e-5 if dtype == torch.float32 else 2e-2)
    d, keep, batch = point
    shape = f"{batch} sequences, {d}, {keep:.0%} of {rivals.PATCHES} kept: {min(lengths)} to {max(lengths)} tokens"
    rows = grad.numel() * grad.element_size()
    timed(
        *(pass_of(passed, run, leaves, grad.detach()), shape, dtype),
        least_bytes={"forward": 4, "backward": 8, "step": 8}[passed] * rows,  # q k v o; q k v o g dq dk dv
        countable=provider not in {*COMPILED, "nested_sdpa"},  # the counters do not know nested tensors
    )


@pytest.mark.parametrize(
    "point", [p if p in SHORT else pytest.param(p, marks=pytest.mark.full) for p in POINTS], ids=str
)
def test_flex_mask(timed, device, point):
    """FlexAttention's block mask, once for each batch of lengths."""
    lengths = lengths_of(*point)
    d, keep, batch = point
    shape = f"{batch} sequences, {d}, {keep:.0%} of {rivals.PATCHES} kept: {sum(lengths)} rows"
    timed(lambda: rivals.flex_mask(lengths, device), shape, torch.int32, countable=False)


@pytest.mark.parametrize("provider", sorted(COMPILED))
def test_compile(benchmark, device, provider):
    """The first call of a compiled provider, nothing cached on disk: what torch.compile costs for each new shape."""
    lengths = lengths_of("spread", 0.1, 64)
    *leaves, _ = rivals.inputs(lengths, torch.float32, device)

    def first() -> None:
        torch.compiler.reset()
        rivals._compiled_flex.cache_clear()
        rivals._compiled_softmax.cache_clear()
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            PROVIDERS[provider](*leaves, lengths)()

    benchmark.pedantic(first, rounds=1)
