"""select_tokens: a loop over the groups that sorts in Python."""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smaug import ops
from smaug.testing import HostReads, packed, relative_error
from smaug.tokens import PackedTokens, packed_ragged, packed_uniform

LENGTHS = [7, 0, 1, 2, 9, 3]


def _ranking(scores):
    """Positions from best to worst: higher score, lower position, NaN last."""
    values = scores.tolist()
    return sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i] if values[i] == values[i] else 0, i)
    )


def _loop(tokens, scores, lengths, prefix, fuse, count):
    """values, ids, size, lengths, ids_kept, ids_dropped; autograd differentiates it. count: scores of a group -> k."""
    values, ids, size, after, kept, dropped = [], [], [], [], [], []
    start = 0
    for n in lengths:
        mine = torch.arange(start, start + n)
        front, rest = mine[:prefix], mine[prefix:]
        k = count(scores[rest])
        ranked = _ranking(scores[rest])
        stay = torch.cat([front, rest[sorted(ranked[:k])]])
        lost = rest[sorted(ranked[k:])]
        values.append(tokens.values[stay])
        ids.append(tokens.ids[stay])
        size.append(tokens.size[stay])
        if fuse and len(lost):
            w = (
                scores[lost]
                .masked_fill(~scores[lost].isfinite(), 0)
                .to(torch.promote_types(scores.dtype, tokens.values.dtype))
            )
            if fuse == "mean":
                w = w / w.sum() if w.sum() != 0 else torch.full_like(w, 1 / len(w))
            values.append((w[:, None] * tokens.values[lost]).sum(0, keepdim=True).to(tokens.values.dtype))
            ids.append(tokens.ids.new_full((1,), -1))
            size.append(tokens.size[lost].sum(0, keepdim=True))
        after.append(len(stay) + (1 if fuse and len(lost) else 0))
        kept.append(stay)
        dropped.append(lost)
        start += n
    return *(torch.cat(x) for x in (values, ids, size)), after, torch.cat(kept), torch.cat(dropped)


def _tokens(lengths, d=6, tail=0, dtype=torch.double, known=False, seed=0):
    values, cu = packed(lengths, d, tail=tail, dtype=dtype, seed=seed)
    rows = values.shape[0]
    generator = torch.Generator().manual_seed(seed + 1)
    scores = torch.rand(rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
    size = torch.randint(1, 5, (rows,), generator=generator).float()
    ids = torch.randperm(rows, generator=generator).int()
    scores[sum(lengths) :], size[sum(lengths) :] = torch.nan, torch.nan
    tokens = packed_ragged(values.requires_grad_(), cu, ids=ids, size=size, max_seqlen=max(lengths, default=0))
    return dataclasses.replace(tokens, lengths=tuple(lengths) if known else None), scores


def _compare(got, want, tokens):
    out, ids_kept, ids_dropped = got[:3]
    values, ids, size, after, kept, dropped = want
    rows = len(values)
    assert out.cu_seqlens.tolist() == [sum(after[:i]) for i in range(len(after) + 1)]
    assert out.cu_seqlens.dtype == out.ids.dtype == ids_kept.dtype == ids_dropped.dtype == torch.int32
    assert out.values.dtype == tokens.values.dtype and out.max_seqlen >= max(after, default=0)
    torch.testing.assert_close(out.values[:rows], values)
    assert torch.equal(out.ids[:rows], ids) and torch.equal(out.size[:rows], size)
    assert not out.values[rows:].any() and (out.ids[rows:] == -1).all() and not out.size[rows:].any()
    for found, true in ((ids_kept, kept), (ids_dropped, dropped)):
        assert found[: len(true)].tolist() == true.tolist() and (found[len(true) :] == -1).all()
    if out.lengths is not None:
        assert list([out.lengths] * len(after) if isinstance(out.lengths, int) else out.lengths) == after
        assert len(ids_kept) == len(kept) and len(ids_dropped) == len(dropped)


def _check(tokens, scores, lengths, count, prefix, fuse, **how):
    """Result and both gradients against the loop."""
    scores = scores.clone().requires_grad_()
    got = ops.select_tokens(tokens, scores, prefix=prefix, fuse=fuse, **how)
    want = _loop(tokens, scores, lengths, prefix, fuse, count)
    _compare(got, want, tokens)
    g = torch.randn_like(got[0].values)
    g[len(want[0]) :] = torch.nan
    dx, ds = torch.autograd.grad(got[0].values, (tokens.values, scores), g)
    tx, ts = torch.autograd.grad(want[0], (tokens.values, scores), g[: len(want[0])], allow_unused=True)
    used = sum(lengths)
    torch.testing.assert_close(dx[:used], tx[:used])
    torch.testing.assert_close(ds[:used], torch.zeros_like(ds[:used]) if ts is None else ts[:used].nan_to_num(0))
    assert not dx[used:].any() and not ds[used:].any()
    return got


def _ratio(q):
    return lambda scores: (len(scores) * round(q * 65536) + 65535) >> 16


@pytest.mark.parametrize("fuse", ["mean", "sum", None])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", [{"keep": 0}, {"keep": 2}, {"keep": 100}, {"keep": 0.0}, {"keep": 0.4}, {"keep": 1.0}])
def test_ragged_is_the_loop(how, known, prefix, fuse):
    k = how["keep"]
    count = _ratio(k) if isinstance(k, float) else lambda scores: min(k, len(scores))
    for tail in (0, 4):
        tokens, scores = _tokens(LENGTHS, tail=tail, known=known)
        out = _check(tokens, scores, LENGTHS, count, prefix, fuse, **how)[0]
        assert (out.lengths is not None) == known
        if known:
            assert out.rows == out.cu_seqlens[-1]
    _check(tokens, scores, LENGTHS, count, prefix, fuse, capacity=60, **how)


@given(st.data())
def test_any_lengths_are_the_loop(data):
    """Scores tie; all groups alike, known or not, is a case of its own."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    known = data.draw(st.sampled_from(["int", "each", None]))
    lengths = [max(lengths)] * len(lengths) if known == "int" else lengths
    tokens, scores = _tokens(
        lengths, d=data.draw(st.integers(1, 9)), tail=data.draw(st.integers(0, 3)), known=known == "each"
    )
    if known == "int":
        tokens = dataclasses.replace(tokens, lengths=lengths[0])
    k = data.draw(st.integers(0, 10) | st.floats(0, 1))
    count = _ratio(k) if isinstance(k, float) else lambda scores: min(k, len(scores))
    scores = (scores * 4).ceil() / 4
    fuse = data.draw(st.sampled_from(["mean", "sum", None]))
    _check(tokens, scores, lengths, count, data.draw(st.integers(0, 3)), fuse, keep=k)


@pytest.mark.parametrize("fuse", ["mean", "sum", None])
@pytest.mark.parametrize(
    ("length", "prefix", "how"),
    [(9, 1, {"keep": 5}), (9, 0, {"keep": 0.7}), (1, 0, {"keep": 0}), (1, 1, {"keep": 3}), (63, 2, {"keep": 60}),
     (5, 9, {"keep": 1}), (6, 1, {"keep": 0}), (6, 1, {"keep": 6}), (2, 0, {"keep": 1})],
)  # fmt: skip
def test_uniform_is_the_loop_and_is_static(length, prefix, how, fuse):
    lengths = [length] * 4
    tokens, scores = _tokens(lengths, seed=3)
    tokens = dataclasses.replace(tokens, lengths=length)
    k = how["keep"]
    count = _ratio(k) if isinstance(k, float) else lambda scores: min(k, len(scores))
    out, kept, dropped = _check(tokens, scores, lengths, count, prefix, fuse, **how)
    assert isinstance(out.lengths, int) and out.rows == 4 * out.lengths == out.cu_seqlens[-1]
    assert len(kept) + len(dropped) == tokens.rows
    # where nothing else is known the numbers are the same
    other, *_ = ops.select_tokens(dataclasses.replace(tokens, lengths=None), scores, prefix=prefix, fuse=fuse, **how)
    torch.testing.assert_close(other.values[: out.rows], out.values)
    # uniform with a tail: rows behind the last group
    tokens, scores = _tokens(lengths, seed=3, tail=3)
    _check(dataclasses.replace(tokens, lengths=length), scores, lengths, count, prefix, fuse, **how)


def test_evit_written_out():
    """EViT (Liang et al. 2022), complement_idx and the fused token, an image at a time."""
    x = torch.randn(3, 10, 4)
    attention_of_cls = torch.rand(3, 10).softmax(1)
    keep = math.ceil(0.7 * 9)
    for b in range(3):
        score = attention_of_cls[b, 1:]
        chosen = set(score.topk(keep).indices.tolist())
        others = [i for i in range(9) if i not in chosen]
        extra = sum(x[b, 1 + i] * score[i] for i in others)
        image = torch.stack([x[b, 0], *(x[b, 1 + i] for i in sorted(chosen)), extra])
        out, *_ = ops.select_tokens(
            packed_uniform(x[b], 10), attention_of_cls[b], keep=0.7, prefix=1, fuse="sum"
        )  # fmt: skip
        torch.testing.assert_close(out.values, image)


@pytest.mark.parametrize("known", [True, False])
def test_ties_and_what_is_not_finite(known):
    inf, nan = math.inf, math.nan
    scores = torch.tensor([1.0, 2, nan, 2, 1, 2, 0.0, -0.0, -inf, nan, -inf, -1, nan, nan, nan, nan, nan, nan])
    tokens = packed_uniform(torch.randn(18, 3).requires_grad_(), 6)
    tokens = tokens if known else dataclasses.replace(tokens, lengths=None)
    kept = {k: ops.select_tokens(tokens, scores, keep=k)[1].tolist() for k in range(7)}
    first = [[1], [1, 3], [1, 3, 5], [0, 1, 3, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    second = [[0], [0, 1], [0, 1, 5], [0, 1, 2, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    for k in range(1, 7):
        want = first[k - 1] + [6 + i for i in second[k - 1]] + [12 + i for i in range(k)]
        assert [r for r in kept[k] if r >= 0] == want
    for fuse in ("mean", "sum"):
        for k in (0, 1, 3, 5):
            _check(tokens, scores, [6] * 3, lambda s, k=k: k, 0, fuse, keep=k)


def test_weights_that_sum_to_nothing_are_alike():
    tokens = packed_uniform(torch.randn(8, 3), 4)
    out, *_ = ops.select_tokens(tokens, torch.zeros(8), keep=1)
    torch.testing.assert_close(out.values[1], tokens.values[1:4].mean(0))
    out, *_ = ops.select_tokens(tokens, torch.zeros(8), keep=1, fuse="sum")
    assert not out.values[1].any() and out.size.tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize("lengths", [5, (5, 5, 5), None])
def test_all_kept_is_identity(lengths):
    tokens = dataclasses.replace(packed_uniform(torch.randn(15, 3).requires_grad_(), 5), lengths=lengths)
    for keep in (1.0, 5, 99):
        out, kept, dropped = ops.select_tokens(tokens, torch.rand(15), keep=keep, prefix=1)
        for name in ("values", "ids", "size", "cu_seqlens"):
            assert torch.equal(getattr(out, name), getattr(tokens, name))
        assert kept.tolist() == list(range(15)) and (dropped == -1).all()
        assert len(dropped) == (15 if lengths is None else 0) and out.lengths == lengths
        g = torch.randn(15, 3)
        assert torch.equal(torch.autograd.grad(out.values, tokens.values, g)[0], g)


def test_twice_keeps_every_token_counted():
    tokens = packed_uniform(torch.randn(40, 3), 20)
    once, *_ = ops.select_tokens(tokens, torch.rand(40), keep=12, prefix=1)
    twice, *_ = ops.select_tokens(once, torch.rand(28), keep=0.5, prefix=1)
    for out, n in ((once, 14), (twice, 9)):
        assert out.lengths == n and out.size.view(2, -1).sum(1).tolist() == [20, 20]


def test_exit_states_of_the_dropped():
    tokens = packed_uniform(torch.randn(24, 3), 8)
    out, kept, dropped = ops.select_tokens(tokens, torch.rand(24), keep=4, prefix=1)
    exits, places = tokens.values.index_select(0, dropped), tokens.ids.index_select(0, dropped)
    assert exits.shape == (9, 3)
    both = torch.cat([out.values.view(3, 6, 3)[:, :5], exits.view(3, 3, 3)], 1)
    order = torch.cat([out.ids.view(3, 6)[:, :5], places.view(3, 3)], 1).argsort(1)
    assert torch.equal(both.gather(1, order[..., None].expand(-1, -1, 3)), tokens.values.view(3, 8, 3))
    assert torch.equal(kept, torch.cat([kept, dropped]).sort().values[torch.isin(torch.arange(24), kept)])


@pytest.mark.parametrize("fuse", ["mean", None])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.9, 1.0])
def test_mass(mass, fuse):
    def count(scores):
        best, total, k = 0.0, scores.sum().item(), 0
        for s in scores.sort(descending=True).values.tolist():
            if best >= mass * total * (1 - 1e-6):  # 1.0: the loop adds in another order
                break
            best, k = best + s, k + 1
        return k

    for tail, prefix in ((0, 0), (4, 1)):
        tokens, scores = _tokens(LENGTHS, tail=tail, known=True)
        *_, overflow = _check(tokens, scores, LENGTHS, count, prefix, fuse, mass=mass)
        assert overflow.dtype == torch.int32 and overflow == 0


def test_mass_overflow_drops_the_lowest():
    lengths = [8, 0, 3, 6]
    tokens, scores = _tokens(lengths, tail=2)
    scores[0] = scores[11] = 0  # prefixes stay whatever their score
    out, kept, dropped, overflow = ops.select_tokens(tokens, scores, mass=1.0, prefix=1, capacity=13)
    # 13 rows: 3 prefixes, room for 4 fused rows, so the best 6 of all
    candidates = [r for r in range(17) if r not in (0, 8, 11)]
    best = sorted(candidates, key=lambda r: -scores[r])[:6]
    assert [r for r in kept.tolist() if r >= 0] == sorted([0, 8, 11, *best])
    assert overflow == 14 - 6 and out.rows == 13 and out.cu_seqlens[-1] <= 13
    assert sorted(r for r in kept.tolist() + dropped.tolist() if r >= 0) == list(range(17))
    assert out.size[:13].sum() == tokens.size[:17].sum()
    # just enough room: nothing goes
    *_, overflow = ops.select_tokens(tokens, scores, mass=1.0, prefix=1, capacity=17)
    assert overflow == 0
    with pytest.raises(ValueError, match="too small"):
        ops.select_tokens(tokens, scores, mass=0.5, prefix=1, capacity=7)


def test_ratio_counts_are_integer_arithmetic():
    for n in (1, 10, 49, 196, 1568):
        for q in (0.05, 0.3, 0.5, 0.7, 0.9, 1.0):
            out, kept, _ = ops.select_tokens(packed_uniform(torch.randn(n, 1), n), torch.rand(n), keep=q, fuse=None)
            assert out.lengths == len(kept) == (n * round(q * 65536) + 65535) >> 16
            assert abs(out.lengths - n * q) < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_row_is_as_good_as_eager(dtype):
    """At most twice the error of weights and sums in the tokens' dtype."""
    lengths = [27] * 16
    tokens, scores = _tokens(lengths, d=32, dtype=dtype)
    exact = tokens.with_values(tokens.values.detach().double().requires_grad_())
    truth, *_, dropped = _loop(exact, scores.double(), lengths, 1, "mean", lambda s: 18)
    w = scores[dropped].view(16, 8, 1).to(dtype)
    eager = (tokens.values[dropped].view(16, 8, 32) * (w / w.sum(1, keepdim=True))).sum(1)
    g = torch.randn(16 * 20, 32).to(dtype)
    g_eager = g.view(16, 20, 32)[:, -1]
    (want,) = torch.autograd.grad(truth, exact.values, g.double())
    (eager_dx,) = torch.autograd.grad(eager, tokens.values, g_eager)
    for known in (27, None):
        out, *_ = ops.select_tokens(dataclasses.replace(tokens, lengths=known), scores, keep=18, prefix=1)
        got, true = (x.view(16, 20, 32)[:, -1] for x in (out.values[: 16 * 20], truth))
        assert out.values.dtype == dtype
        assert relative_error(got, true) <= 2 * relative_error(eager, true)
        grad = torch.cat([g, g.new_zeros(out.rows - 16 * 20, 32)])
        (dx,) = torch.autograd.grad(out.values, tokens.values, grad)
        assert dx.dtype == dtype
        assert relative_error(dx[dropped], want[dropped]) <= 2 * relative_error(eager_dx[dropped], want[dropped])


@pytest.mark.parametrize("fuse", ["mean", "sum"])
@pytest.mark.parametrize("uniform", [True, False])
def test_gradcheck(uniform, fuse):
    lengths = [5, 5] if uniform else [4, 1, 0, 5]
    tokens, scores = _tokens(lengths, d=2, dtype=torch.double, tail=0)
    tokens = dataclasses.replace(tokens, lengths=5 if uniform else None)

    def f(values, scores):
        return ops.select_tokens(tokens.with_values(values), scores, keep=2, prefix=1, fuse=fuse)[0].values

    assert torch.autograd.gradcheck(f, (tokens.values, scores.requires_grad_()))


def test_detached_scores_and_repeats():
    tokens, scores = _tokens(LENGTHS, dtype=torch.float32)
    runs = [ops.select_tokens(tokens, scores, keep=2)[0].values for _ in range(2)]
    grads = [torch.autograd.grad(out.square().sum(), tokens.values)[0] for out in runs]
    assert torch.equal(*runs) and torch.equal(*grads)


def test_nothing_at_all():
    for tokens in (
        packed_uniform(torch.zeros(0, 4), 3),
        packed_ragged(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int32), lengths=(0, 0, 0)),
        packed_ragged(torch.full((3, 4), torch.nan), torch.zeros(1, dtype=torch.int32)),
        packed_ragged(torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.int32)),
    ):
        tokens.values.requires_grad_()
        for how in ({"keep": 2}, {"keep": 0.5}, {"mass": 0.5}, {"keep": 2, "capacity": 9}):
            out, kept, dropped, *_ = ops.select_tokens(tokens, torch.rand(tokens.rows), **how)
            assert not out.values.any() and not out.cu_seqlens.any()
            assert (kept == -1).all() and (dropped == -1).all()
            assert not torch.autograd.grad(out.values.sum(), tokens.values)[0].any()


def test_refusals():
    tokens, scores = _tokens(LENGTHS)
    for how, words in (
        ({}, "keep .* or mass"),
        ({"keep": 2, "mass": 0.5}, "one of them"),
        ({"keep": 1.5}, "no ratio"),
        ({"keep": -1}, "at least 0"),
        ({"keep": True}, "count"),
        ({"mass": 2.0}, "between 0 and 1"),
        ({"keep": 2, "prefix": -1}, "prefix"),
        ({"keep": 2, "fuse": "max"}, "unknown"),
        ({"keep": 2, "capacity": 3}, "too small"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.select_tokens(tokens, scores, **how)
    with pytest.raises(ValueError, match="scores must be"):
        ops.select_tokens(tokens, scores[:-1], keep=2)
    with pytest.raises(ValueError, match="floating point"):
        ops.select_tokens(tokens, scores.long(), keep=2)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        ops.select_tokens(tokens, scores, keep=2, impl="triton")


HOWS = [{"keep": 3}, {"keep": 0.5}, {"mass": 0.5, "capacity": 20}]


def test_no_host_read():
    for lengths in (5, (5, 5, 5, 5, 5), None):
        tokens = dataclasses.replace(packed_uniform(torch.randn(25, 3).requires_grad_(), 5), lengths=lengths)
        scores = torch.rand(25, requires_grad=True)
        for how in HOWS:
            with HostReads() as reads:
                ops.select_tokens(tokens, scores, prefix=1, **how)[0].values.sum().backward()
            assert not reads.found
            assert reads.launched.count("smaug::select_tokens") == 1


def test_no_host_read_inside_either():
    """On a GPU each would be a wait."""
    module = importlib.import_module("smaug.ops.select_tokens")
    for uniform in (True, False):
        tokens, scores = packed_uniform(torch.randn(20, 3), 5), torch.rand(20)
        for keep, ratio, mass in ((2, -1, -1.0), (-1, 32768, -1.0), (-1, -1, 0.5)):
            if uniform and keep < 0:
                continue
            rows = [16, 12, 8] if mass < 0 else [20, 20, 20]  # of the result, kept, dropped; by mass any number may go
            rest = (tokens.cu_seqlens, tokens.ids, tokens.size, 1, keep, ratio, mass, "mean", uniform, rows)
            with HostReads() as reads:
                out = module._select._init_fn(tokens.values, scores, *rest)
                module._select_backward._init_fn(
                    out[0], tokens.values, scores, tokens.cu_seqlens, out[5], *out[7:], "mean", uniform
                )
            assert not reads.found and len(reads.launched) > 20


def test_group_sums_elsewhere_than_on_a_cpu():
    """torch.segment_reduce, which other devices use as it has no atomics, with an empty group and rows of none."""
    module = importlib.import_module("smaug.ops.select_tokens")
    x, group = torch.randn(7, 3), torch.tensor([0, 0, 2, 2, 2, 3, 4])
    want = module._group_sum(x, group, 4)
    assert torch.equal(want[0], x[:2].sum(0)) and not want[1].any() and torch.equal(want[3], x[5])
    torch.testing.assert_close(module._segment_sum(x, group, 4), want)
    torch.testing.assert_close(module._segment_sum(x[:, 0], group, 4), want[:, 0])


def test_strided_scores_and_grouped_frames():
    tokens = packed_uniform(torch.randn(24, 3).requires_grad_(), 6)
    scores = torch.rand(24, 2)
    for known in (6, None):
        frames = dataclasses.replace(tokens, lengths=known)
        got, want = (ops.select_tokens(frames, s, keep=2)[0] for s in (scores[:, 0], scores[:, 0].clone()))
        assert torch.equal(got.values, want.values)
        _check(frames.group(2), scores[:, 1], [12, 12], lambda s: 4, 1, "mean", keep=4)


def test_meta_and_flops():
    for lengths, rows in ((197, 8 * 139), ((197,) * 8, 8 * 139), (None, 8 * 197)):
        values = torch.empty(8 * 197, 768, device="meta", requires_grad=True)
        scores = torch.empty(8 * 197, device="meta", requires_grad=True)
        cu, ids = (torch.empty(n, dtype=torch.int32, device="meta") for n in (9, 8 * 197))
        tokens = PackedTokens(values, cu, ids, torch.empty(8 * 197, device="meta"), 197, lengths)
        ops.register_flops()
        with FlopCounterMode(display=False) as counter:
            out, kept, dropped = ops.select_tokens(tokens, scores, keep=137, prefix=1)
            assert out.lengths == (139 if lengths == 197 else None if lengths is None else (139,) * 8)
            grads = torch.autograd.grad(out.values.sum(), (values, scores))
        assert [g.shape for g in grads] == [values.shape, scores.shape]
        assert out.max_seqlen == 139
        if lengths is not None:
            assert out.rows == rows and kept.shape == (8 * 138,) and dropped.shape == (8 * 59,)
            assert counter.get_total_flops() == 5 * 8 * 59 * 768
        out, *_, overflow = ops.select_tokens(tokens, scores, mass=0.9, capacity=1000)
        assert out.rows == 1000 and overflow.shape == ()
