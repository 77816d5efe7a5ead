"""The highest scores of each frame stay and the rest melt into one row, EViT's pruning.

    pytest benchmarks/bench_select_tokens.py --benchmark-only [--full]

`eager` is EViT's code on (B, N, D): topk, the complement of its index, two gathers, a weighted sum, a concatenation.
`spread` are frames of different lengths, where EViT's would run a frame at a time (`eager`).
"""

import pytest
import torch

from benchmarks.attention_rivals import lengths_of
from benchmarks.timing import PASSES, compiled, pass_of
from smaug import ops
from smaug.testing import offsets, relative_error
from smaug.tokens import PackedTokens

WIDTH = 768


def evit(x, scores, keep):
    """x (B, 1 + N, D) with [CLS] first, scores (B, 1 + N) -> (B, 1 + keep + 1, D), order of the input."""
    batch, n, width = x.shape
    index = scores[:, 1:].topk(keep, sorted=False).indices.sort(1).values
    every = torch.ones(batch, n - 1, dtype=torch.bool, device=x.device).scatter_(1, index, False)
    rest = every.nonzero()[:, 1].view(batch, n - 1 - keep)
    patches = x[:, 1:]
    kept = patches.gather(1, index[..., None].expand(-1, -1, width))
    lost = patches.gather(1, rest[..., None].expand(-1, -1, width))
    weight = scores[:, 1:].gather(1, rest)
    fused = (lost * (weight / weight.sum(1, keepdim=True))[..., None].to(x.dtype)).sum(1, keepdim=True)
    return torch.cat([x[:, :1], kept, fused], 1)


def eager(values, scores, lengths, keeps):
    if len(set(lengths)) == 1:
        batch = len(lengths)
        return evit(values.view(batch, lengths[0], -1), scores.view(batch, -1), keeps[0]).flatten(0, 1)
    parts = zip(values.split(lengths), scores.split(lengths), keeps, strict=True)
    return torch.cat([evit(x[None], s[None], k)[0] for x, s, k in parts])


@pytest.mark.parametrize("provider", ["smaug", "eager", "eager_compiled"])
@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("keep", [0.5, pytest.param(0.3, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [16, pytest.param(64, marks=pytest.mark.full)])
@pytest.mark.parametrize("distribution", ["equal", "spread"])
def test_select(timed, device, distribution, batch, keep, dtype, passed, provider):
    lengths = lengths_of(distribution, 1.0, batch)
    share = round(keep * 65536)
    keeps = [((n - 1) * share + 65535) >> 16 for n in lengths]  # as the op rounds a ratio
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(lengths), WIDTH, generator=generator).to(device, dtype).requires_grad_()
    scores = torch.rand(sum(lengths), generator=generator).to(device)
    cu, rows = offsets(lengths, device), sum(lengths)
    host = lengths[0] if distribution == "equal" else tuple(lengths)
    tokens = PackedTokens(
        values, cu, torch.arange(rows, dtype=torch.int32, device=device), torch.ones(rows, device=device),
        max(lengths), host,
    )  # fmt: skip
    kept = sum(keeps) + 2 * batch  # [CLS] and the fused row

    def smaug():
        out, _, _ = ops.select_tokens(tokens, scores, keep=keeps[0] if distribution == "equal" else keep, prefix=1)
        return out.values[:kept]

    if provider == "eager_compiled" and distribution == "spread":
        pytest.skip("a graph for each length, and a graph break for nonzero")
    plain = compiled(eager) if provider == "eager_compiled" else eager
    run = smaug if provider == "smaug" else lambda: plain(values, scores, lengths, keeps)
    with torch.no_grad():
        assert relative_error(run(), eager(values, scores, lengths, keeps)) < 1e-2
    grad = torch.randn(kept, WIDTH, generator=generator).to(device, dtype)
    size = (rows + kept) * WIDTH * dtype.itemsize
    timed(
        *(pass_of(passed, run, [values], grad), f"{batch} frames, {distribution}, {rows} rows, {kept} kept", dtype),
        least_bytes=size * (2 if passed == "step" else 1),
        countable=provider != "eager_compiled",
    )
