"""attention: the formula in fp64, over every combination of edges, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smaug import ops
from smaug.testing import HostReads, offsets, packed, relative_error

ops.register_flops()

H, E = 4, 16
SELF = ([3, 0, 5, 5, 1], None)
CROSS = ([3, 0, 5, 5, 1], [4, 2, 7, 7, 0])
PAIRS = ([3, 2, 5, 0], [4, 2, 7, 0, 3])
CASES = {
    "self": (*SELF, {}),
    "cross": (*CROSS, {}),
    "grouped heads": (*CROSS, dict(heads_kv=2)),
    "one key head": (*CROSS, dict(heads_kv=1, key_bias=True)),
    "biases": (*CROSS, dict(segment_bias=True, key_bias=True)),
    "shared keys": (*PAIRS, dict(kv_ids=[4, 4, 2, 0])),
    "segments": (*PAIRS, dict(kv_ids=[[0, 1, -1], [4, -1, 0], [-1, -1, 3], [2, 2, 2]], segment_bias=True, heads_kv=2)),
    "a segment twice": (*PAIRS, dict(kv_ids=[[0, 0], [4, 2], [2, 4], [-1, 1]], segment_bias=True, key_bias=True)),
    "long": ([700], [900], dict(key_bias=True)),
    "equal": ([140, 140], None, {}),
}


def _make(
    lengths_q, lengths_k, dtype=torch.float64, heads_kv=H, kv_ids=None, segment_bias=False, key_bias=False, tail=2, e=E
):
    acc = torch.promote_types(dtype, torch.float32)
    q, cu_q = packed(lengths_q, H, e, tail=tail, dtype=dtype, seed=1)
    k, cu_k = packed(lengths_k or lengths_q, heads_kv, e, tail=tail, dtype=dtype, seed=2)
    v, _ = packed(lengths_k or lengths_q, heads_kv, e, tail=tail, dtype=dtype, seed=3)
    ids = None if kv_ids is None else torch.tensor(kv_ids, dtype=torch.int32)
    m = 1 if ids is None or ids.ndim == 1 else ids.shape[1]
    torch.manual_seed(0)
    segment = torch.randn(len(lengths_q), m, dtype=acc) if segment_bias else None
    key = torch.randn(k.shape[0], dtype=acc) if key_bias else None
    return [q, k, v, segment, key], (cu_q, cu_k if lengths_k else None), ids


def _run(leaves, cu, ids, weights=None, **kw):
    """Outputs and gradients of one call; weights are what o and lse are multiplied by."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    out = ops.attention(*leaves[:3], *cu, kv_ids=ids, segment_bias=leaves[3], key_bias=leaves[4], return_lse=True, **kw)
    o, lse = out[:2]
    loss = 0
    if weights is not None:
        loss = (o.double() * weights[0]).sum()
        if weights[1] is not None:
            loss = loss + (lse.double().masked_fill(lse.isinf(), 0) * weights[1]).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None]) if weights is not None else []
    return [x.detach() for x in out], grads


def _weights(q, with_lse=True):
    g = torch.Generator().manual_seed(7)
    o = torch.randn(q.shape, generator=g, dtype=torch.double)
    lse = torch.randn(q.shape[1], q.shape[0], generator=g, dtype=torch.double)
    return o, lse if with_lse else None


def test_reference_is_softmax_attention():
    """The reference itself, against torch on one padded batch."""
    leaves, cu, _ = _make([5, 3], [4, 6], tail=0)
    got, _ = _run(leaves, cu, None, impl="reference")
    for s, (nq, nk) in enumerate(zip((slice(0, 5), slice(5, 8)), (slice(0, 4), slice(4, 10)), strict=True)):
        q, k, v = (x[n].transpose(0, 1) for x, n in zip(leaves[:3], (nq, nk, nk), strict=True))
        torch.testing.assert_close(got[0][nq].transpose(0, 1), F.scaled_dot_product_attention(q, k, v))
        torch.testing.assert_close(got[1][:, nq], (q @ k.mT * E**-0.5).logsumexp(-1)), s


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_formula(case, dtype, scores):
    lengths_q, lengths_k, kw = CASES[case]
    _matches(lengths_q, lengths_k, dtype, scores, **kw)


def _matches(lengths_q, lengths_k, dtype, scores, **kw):
    """fp64 exactly, fp32 to rounding, bf16 to what its logits are rounded to."""
    leaves, cu, ids = _make(lengths_q, lengths_k, dtype, **kw)
    with_lse = scores is not None  # without it the flash kernel may run
    weights = _weights(leaves[0], with_lse)
    want, want_grads = _run(
        [None if x is None else x.double() for x in leaves], cu, ids, weights, impl="reference", key_scores=scores
    )
    got, grads = _run(leaves, cu, ids, weights, key_scores=scores)
    assert got[0].dtype == dtype and got[1].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(got[1].isinf(), want[1].isinf())
    bound = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for i, (a, b) in enumerate(zip([*got, *grads], [*want, *want_grads], strict=True)):
        finite = b.isfinite()
        assert torch.isfinite(a[finite]).all()
        if i < len(got) + 3:
            # of a query with one key the gradient is 0, and its error nothing to be divided by that
            assert relative_error(a[finite], b[finite]) < bound or (a[finite] - b[finite]).abs().max() < 4 * bound
        else:  # a bias's gradient is a sum that cancels, to 0 where there is one segment
            assert (a - b).abs().max() < 4 * bound * (1 + b.abs().max())
    rows = sum(lengths_q)
    assert (got[0][rows:] == 0).all() and (got[1][:, rows:] == 0).all() and (grads[0][rows:] == 0).all()
    assert (grads[1][sum(lengths_k or lengths_q) :] == 0).all()


@given(st.data())
def test_matches_the_formula_for_any_lengths(data):
    lengths = st.lists(st.integers(0, 12) | st.integers(30, 70), min_size=1, max_size=5)
    lengths_q, lengths_k = data.draw(lengths), data.draw(lengths)
    kw = dict(heads_kv=data.draw(st.sampled_from([1, 2, 4])), e=data.draw(st.sampled_from([16, 24, 72])))
    segments = data.draw(st.sampled_from(["self", "cross", 1, 2, 3]))
    if segments == "self":
        lengths_k = None
    elif segments == "cross":
        lengths_k = (lengths_k * 5)[: len(lengths_q)]
    else:
        row = st.lists(st.integers(-1, len(lengths_k) - 1), min_size=segments, max_size=segments)
        kw["kv_ids"] = [data.draw(row) for _ in lengths_q]
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    for name in ("segment_bias", "key_bias"):
        # their gradients are sums over all queries, which bf16 spoils as it likes
        kw[name] = dtype != torch.bfloat16 and data.draw(st.booleans())
    _matches(lengths_q, lengths_k, dtype, data.draw(st.sampled_from([None, "cls", "mean"])), **kw)


def test_bf16_is_as_good_as_eager():
    leaves, cu, _ = _make([60, 60], None, torch.bfloat16, tail=0)
    q, k, v = (x.view(2, 60, H, E).transpose(1, 2) for x in leaves[:3])
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    eager = ((q @ k.mT) * E**-0.5).softmax(-1) @ v
    got = ops.attention(*leaves[:3], cu[0]).view(2, 60, H, E).transpose(1, 2)
    assert relative_error(got, truth) <= 2 * relative_error(eager, truth)


def test_kv_ids_equals_copied_keys():
    lengths = [4, 2, 7, 3]
    leaves, cu, ids = _make([3, 2, 5], lengths, torch.float32, kv_ids=[[3, 0], [2, -1], [0, 2]], tail=0)
    rows = [list(range(cu[1][j], cu[1][j + 1])) for j in range(4)]
    copied = [rows[3] + rows[0], rows[2], rows[0] + rows[2]]
    flat = torch.tensor([row for rows in copied for row in rows])
    want = ops.attention(leaves[0], leaves[1][flat], leaves[2][flat], cu[0], offsets([len(c) for c in copied]))
    torch.testing.assert_close(ops.attention(*leaves[:3], *cu, kv_ids=ids), want)


def test_hidden_keys_and_empty_queries_give_zero_gradients():
    leaves, cu, ids = _make([3, 2], [4, 5], torch.float32, segment_bias=True, key_bias=True, kv_ids=[0, 1])
    leaves[3][0] = -torch.inf
    leaves[4][5:7] = -torch.inf
    for impl in ("auto", "reference"):
        got, grads = _run(leaves, cu, ids, _weights(leaves[0]), impl=impl, key_scores="mean")
        assert (got[0][:3] == 0).all() and (got[1][:, :3] == -torch.inf).all()
        assert all(g.isfinite().all() for g in grads)
        assert (got[2][:4] == 0).all() and (got[2][5:7] == 0).all()
        assert (grads[0][:3] == 0).all() and (grads[1][:4] == 0).all() and (grads[2][:4] == 0).all()


def test_gradcheck():
    for kw in (dict(kv_ids=[[0, 1], [1, -1]], segment_bias=True, key_bias=True, heads_kv=2), {}):
        leaves, cu, ids = _make([2, 1], [2, 3], tail=0, **kw)
        leaves = [None if x is None else x.requires_grad_() for x in leaves]
        used = [x for x in leaves if x is not None]

        def f(*x, ids=ids, cu=cu, kw=kw):
            extra = dict(segment_bias=x[3], key_bias=x[4]) if kw else {}
            return ops.attention(*x[:3], *cu, kv_ids=ids, return_lse=True, **extra)

        assert torch.autograd.gradcheck(f, used, fast_mode=True)


def test_nothing_at_all():
    q = torch.randn(4, H, E, requires_grad=True)
    k = torch.randn(0, H, E, requires_grad=True)
    o, lse = ops.attention(q, k, k, offsets([3]), offsets([0]), return_lse=True)
    assert (o == 0).all() and (lse[:, :3] == -torch.inf).all() and (lse[:, 3] == 0).all()
    assert (torch.autograd.grad(o.sum(), q)[0] == 0).all()
    assert ops.attention(q[:0], k, k, offsets([0, 0])).shape == (0, H, E)
    for impl in ("auto", "reference"):
        o = ops.attention(q, k, k, offsets([3]), offsets([0]), impl=impl)
        assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), (q, k)))


def test_scores_are_detached_and_unused_keys_get_none():
    leaves, cu, ids = _make([3, 2], [4, 5, 2], torch.float32, kv_ids=[1, 1], tail=0)
    q = leaves[0].requires_grad_()
    _, scores = ops.attention(q, *leaves[1:3], *cu, kv_ids=ids, key_scores="cls")
    assert (scores[:4] == 0).all() and (scores[9:] == 0).all() and scores.sum().item() == pytest.approx(1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        scores.sum().backward()


def test_repeats_are_bit_equal():
    leaves, cu, ids = _make(*PAIRS, torch.float32, kv_ids=[[0, 0], [4, 2], [2, 4], [-1, 1]])
    weights = _weights(leaves[0])
    first, second = (_run(leaves, cu, ids, weights) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_strided_views_of_one_projection():
    x = torch.randn(12, 3, H, E)
    q, k, v = x.unbind(1)
    for lengths in ([4, 4, 4], [5, 7]):
        cu = offsets(lengths)
        torch.testing.assert_close(
            ops.attention(q, k, v, cu), ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), cu)
        )


def test_autocast():
    leaves, cu, _ = _make([3, 4], None, torch.float32, tail=0)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = ops.attention(*leaves[:3], *cu, return_lse=True)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        (dict(causal=True), "bidirectional"),
        (dict(dropout_p=0.1), "no dropout"),
        (dict(return_attn_probs=True), "key_scores"),
        (dict(impl="triton"), "runs on CUDA tensors"),
        (dict(impl="flash_attn"), "use impl="),
        (dict(impl="xformers"), "use impl="),
        (dict(impl="torch"), "only on CUDA"),
        (dict(impl="best"), "unknown"),
        (dict(kv_ids=torch.zeros(3, dtype=torch.int32)), "kv_ids must be"),
        (dict(segment_bias=torch.zeros(2, 3)), "segment_bias must be"),
    ],
)
def test_refusals(kw, match):
    leaves, cu, _ = _make([3, 4], None, torch.float32, tail=0)
    with pytest.raises((ValueError, RuntimeError), match=match):
        ops.attention(*leaves[:3], *cu, **kw)


def test_bounds_are_accepted_and_hints_agree():
    leaves, cu, _ = _make([4, 4], None, torch.float32, tail=0)
    plain = ops.attention(*leaves[:3], *cu)
    for kw in (dict(max_seqlen_q=9, max_seqlen_k=torch.tensor(9)), dict(lengths_q=4), dict(lengths_q=(4, 4))):
        assert torch.equal(ops.attention(*leaves[:3], *cu, **kw), plain)


def test_no_host_read():
    leaves, cu, ids = _make(*PAIRS, torch.float32, kv_ids=[[0, 0], [4, 2], [2, 4], [-1, 1]], segment_bias=True, tail=0)
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    with HostReads() as reads:
        o, _, _ = ops.attention(*leaves[:3], *cu, kv_ids=ids, segment_bias=leaves[3], return_lse=True, key_scores="cls")
        o.sum().backward()
    assert not reads.found


def test_meta_at_base_size_and_flops():
    meta = lambda *s, **k: torch.empty(*s, device="meta", **k)  # noqa: E731
    q, k, v = (meta(8 * 157, 12, 64, requires_grad=True) for _ in range(3))
    cu = meta(9, dtype=torch.int32)
    ids, bias = meta(8, 3, dtype=torch.int32), meta(8, 3, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        o, lse, scores = ops.attention(q, k, v, cu, return_lse=True, key_scores="cls", lengths_q=157)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    one = 12 * 64 * 8 * 157 * 157
    assert forward.get_total_flops() == 4 * one and backward.get_total_flops() == 10 * one
    assert o.shape == q.shape and lse.shape == (12, 8 * 157) and scores.shape == (8 * 157,)
    ops.attention(q, k, v, cu, kv_ids=ids, segment_bias=bias).sum().backward()
    assert bias.grad.shape == bias.shape
    leaves, cu, kv = _make(*PAIRS, torch.float32, kv_ids=[[0, 0], [4, 2], [2, 4], [-1, 1]])
    with FlopCounterMode(display=False) as ragged:
        ops.attention(*leaves[:3], *cu, kv_ids=kv)
    assert ragged.get_total_flops() == 4 * H * E * (3 * 8 + 2 * 10 + 5 * 10)
