"""select_tokens: every output of the launchers against the reference, through the public function's arguments."""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smaug import ops
from smaug.kernels import select_tokens as kernel
from smaug.testing import packed, surrounded
from smaug.tokens import packed_ragged, packed_uniform

LENGTHS = [7, 0, 19]
TIGHT = {torch.float16: (1e-3, 1e-3), torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-12)}
NAMES = ("values", "cu_seqlens", "ids", "size", "ids_kept", "ids_dropped", "overflow", "target", "weight", "factor")


@pytest.fixture
def both(monkeypatch):
    """both(tokens, scores, ...) calls ops.select_tokens with the reference and the launchers -> its result.

    The results are compared, all that the op returns, and so are both gradients of it.
    """
    module = importlib.import_module("smaug.ops.select_tokens")
    reference = module._select._init_fn

    def close(name, got, want, tight=None):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        if want.is_floating_point():
            atol, rtol = TIGHT[tight or want.dtype]
            torch.testing.assert_close(got, want, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")
        else:
            assert torch.equal(got, want), f"{name}: {got.tolist()} is not {want.tolist()}"

    def select(values, scores, cu_seqlens, *rest):
        want = reference(values, scores, cu_seqlens, *rest)
        got = kernel.select_tokens(values, scores, cu_seqlens, *rest)
        tight = values.dtype
        for name, a, b in zip(NAMES, got, want, strict=True):
            close(name, a, b, tight if name == "values" else None)
        used = int(want[1][-1])
        kept = want[4][want[4] >= 0].long()
        places = want[7][kept].long()
        assert torch.equal(got[0][places], values[kept])
        grad = torch.randn(want[0].shape).to(values.dtype)
        grad[used:] = torch.nan
        # without a fused row the scores get no gradient: then the other branch, as when they ask for none
        for_scores = (values, scores) if rest[-3] else (None, None)
        args = (grad, *for_scores, cu_seqlens, got[5], *got[7:], rest[-3], rest[-2])
        want_grads = module._select_backward._init_fn(*args)
        for name, a, b in zip(("dvalues", "dscores"), kernel.select_tokens_backward(*args), want_grads, strict=True):
            close(name, a, b, tight if name == "dvalues" else None)
        return want

    monkeypatch.setattr(module, "_select", select)
    return ops.select_tokens


def _tokens(lengths, d=6, tail=0, dtype=torch.float32, known=False, seed=0):
    values, cu = packed(lengths, d, tail=tail, dtype=dtype, seed=seed)
    rows, used = values.shape[0], sum(lengths)
    generator = torch.Generator().manual_seed(seed + 1)
    scores = torch.rand(rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
    size = torch.randint(1, 5, (rows,), generator=generator).float()
    scores[used:], size[used:] = torch.nan, torch.nan
    tokens = packed_ragged(surrounded(values), cu, ids=torch.randperm(rows, generator=generator).int(), size=size)
    return dataclasses.replace(tokens, lengths=tuple(lengths) if known else None), surrounded(scores)


HOWS = [{"keep": 0}, {"keep": 2}, {"keep": 100}, {"keep": 0.4}, {"mass": 0.6}]


@pytest.mark.parametrize("fuse", ["mean", "sum", None])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_ragged(both, how, fuse):
    prefix, tail, known = {"mean": (1, 4, False), "sum": (2, 4, True), None: (0, 0, True)}[fuse]
    tokens, scores = _tokens(LENGTHS, tail=tail, known=known)
    both(tokens, scores, prefix=prefix, fuse=fuse, **how)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])  # `both` keeps nothing
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    d=st.integers(1, 40),
    tail=st.integers(0, 4),
    known=st.booleans(),
    prefix=st.integers(0, 2),
    fuse=st.sampled_from(["mean", "sum", None]),
    how=st.sampled_from(HOWS),
)
def test_any_lengths(both, lengths, d, tail, known, prefix, fuse, how):
    tokens, scores = _tokens(lengths, d, tail, known=known)
    both(tokens, scores, prefix=prefix, fuse=fuse, **how)


def test_more_room_than_needed(both):
    tokens, scores = _tokens(LENGTHS, tail=3)
    for how in ({"keep": 0.4}, {"mass": 0.6}):
        out, *_ = both(tokens, scores, prefix=1, capacity=60, **how)
        assert out.rows == 60


@pytest.mark.parametrize("fuse", ["mean", "sum", None])
def test_uniform(both, fuse):
    for length, prefix, how in (
        (9, 0, {"keep": 0.7}), (1, 0, {"keep": 0}), (1, 1, {"keep": 3}), (33, 2, {"keep": 30}), (5, 9, {"keep": 1}),
        (6, 1, {"keep": 6}),
    ):  # fmt: skip
        tokens, scores = _tokens([length] * 2, seed=3)
        both(dataclasses.replace(tokens, lengths=length), scores, prefix=prefix, fuse=fuse, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(both, dtype):
    tokens, scores = _tokens(LENGTHS, d=33, dtype=dtype)
    both(tokens, scores, keep=3, prefix=1)
    tokens, scores = _tokens([20], d=8, dtype=dtype)
    both(dataclasses.replace(tokens, lengths=20), scores.to(dtype), keep=0.5, fuse="sum")


@pytest.mark.parametrize("known", [6, None])
def test_ties_and_what_is_not_finite(both, known):
    inf, nan = math.inf, math.nan
    scores = torch.tensor([1.0, 2, nan, 2, 1, 2, 0.0, -0.0, -inf, nan, -inf, -1, nan, nan, nan, nan, nan, nan])
    scores = torch.cat([scores, torch.tensor([inf, 3.0, inf, 0.0, 3.0, inf])])
    tokens = dataclasses.replace(packed_uniform(torch.randn(24, 3), 6), lengths=known)
    for keep, fuse in ((1, "mean"), (2, "sum"), (4, "mean")):
        both(tokens, scores, keep=keep, fuse=fuse)


def test_mass(both):
    tokens, scores = _tokens([7, 12], tail=4)
    for mass in (0.0, 0.3, 1.0):
        both(tokens, scores, mass=mass, prefix=1)
    # ties at the threshold, the last of them exactly on it; scores that weigh nothing; scores that are not finite
    tokens, _ = _tokens([10, 4, 6])
    scores = torch.full((20,), 0.1)
    scores[10:14] = 0
    scores[[14, 16, 18, 19]] = torch.tensor([math.inf, math.nan, -math.inf, math.inf])
    both(tokens, scores, mass=0.3)


def test_mass_overflow(both):
    tokens, scores = _tokens([8, 0, 6], tail=3)
    ties = (scores * 4).ceil() / 4
    for prefix, capacity, fuse, values in ((0, 3, "mean", scores), (1, 9, None, ties), (1, 13, "sum", torch.ones(17))):
        *_, overflow = both(tokens, values, mass=0.95, prefix=prefix, capacity=capacity, fuse=fuse)
        assert overflow > 0 or capacity == 13


def test_more_groups_and_rows_than_are_looked_at_together(both, monkeypatch):
    for name, number in (("SCORES", 8), ("GROUPS", 2), ("CUTTERS", 2), ("COLUMN_BYTES", 16), ("ROWS", 4)):
        monkeypatch.setattr(kernel, name, number)
    tokens, scores = _tokens([3, 11, 0], d=7, tail=9)
    ties = (scores * 4).ceil() / 4
    both(tokens, ties, keep=4, prefix=1)
    both(tokens, ties, mass=0.9, prefix=1, capacity=8)


def test_strides(both):
    tokens = packed_uniform(torch.randn(24, 7)[:, 1:5], 6)
    scores = torch.rand(24, 2)
    both(tokens, scores[:, 0], keep=2)
    frames = dataclasses.replace(tokens, lengths=None).group(2)
    both(frames, scores[:, 1], keep=4, prefix=1)
    both(frames, scores[:, 1], mass=0.5)
    for values in (torch.randn(4, 24).t(), torch.randn(1, 4).expand(24, 4)):
        both(dataclasses.replace(frames, values=values), scores[:, 0], keep=2)


def test_backward_where_scores_want_none():
    for uniform in (True, False):
        tokens, scores = _tokens([5, 5])
        args = (scores, tokens.cu_seqlens, tokens.ids, tokens.size, 1, 2, -1, -1.0, "mean", uniform, [8, 6, 4])
        out = torch.ops.smaug.select_tokens(tokens.values, *args)
        args = (torch.randn(8, 6), None, None, tokens.cu_seqlens, out[5], *out[7:], "mean", uniform)
        (got, none), (want, _) = kernel.select_tokens_backward(*args), torch.ops.smaug.select_tokens_backward(*args)
        torch.testing.assert_close(got, want)
        assert none.shape == (0,)


def test_nothing_at_all(both):
    for tokens in (
        packed_uniform(torch.zeros(0, 4), 3),
        packed_ragged(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int32), lengths=(0, 0, 0)),
        packed_ragged(torch.full((3, 4), torch.nan), torch.zeros(1, dtype=torch.int32)),
        packed_ragged(torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.int32)),
    ):
        for how in ({"keep": 0.5}, {"mass": 0.5}, {"keep": 2, "capacity": 9}):
            both(tokens, torch.rand(tokens.rows), **how)


def test_program_order_changes_nothing(in_every_order):
    tokens, scores = _tokens([7, 0, 9], d=3, tail=3)
    rest = (tokens.cu_seqlens, tokens.ids, tokens.size, 1)
    for keep, ratio, mass, rows in ((2, -1, -1.0, 15), (-1, -1, 0.9, 9)):
        sizes = [rows, rows, tokens.rows]
        args = (tokens.values, scores, *rest, keep, ratio, mass, "mean", False, sizes)
        out = in_every_order(lambda args=args: kernel.select_tokens(*args))
        grad = torch.randn(rows, 3)
        back = (grad, tokens.values, scores, tokens.cu_seqlens, out[5], *out[7:], "mean", False)
        in_every_order(lambda back=back: kernel.select_tokens_backward(*back))
