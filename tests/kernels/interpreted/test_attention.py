"""The attention kernels against the registered CPU op in fp64: edges, gradients, scores, and programs in any order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from smaug import ops
from smaug.kernels import attention as kernels
from smaug.kernels import launch
from smaug.testing import offsets, packed, relative_error, surrounded

# lengths_q, lengths_k or None, E, the rest. Tiles are 32 or 64 rows, so 70 is more than one.
CASES = {
    "self": ([3, 0, 70, 1], None, 16, {}),
    "cross": ([3, 0, 5, 33, 1], [4, 2, 70, 0, 7], 24, {}),
    "grouped heads": ([3, 0, 40], [34, 2, 7], 16, dict(heads=4, heads_kv=2, key_bias=True)),
    "one key head, biases": ([3, 0, 5, 2], [4, 2, 0, 9], 72, dict(heads=3, segment_bias=True, key_bias=True)),
    "shared keys": ([3, 2, 35, 0], [4, 2, 7, 0, 36], 16, dict(kv_ids=[4, 4, 2, 0], key_bias=True)),
    "segments": (
        [3, 2, 5, 0, 1],
        [4, 2, 7, 0, 3],
        24,
        dict(kv_ids=[[0, 1, -1], [4, -1, 0], [-1, -1, 3], [2, 2, 2], [-1, -1, -1]], segment_bias=True),
    ),
    "a segment twice": (
        [3, 2, 5, 0],
        [4, 2, 7, 0, 3],
        72,
        dict(kv_ids=[[0, 0], [4, 2], [2, 4], [-1, 1]], heads=4, heads_kv=2, segment_bias=True, key_bias=True),
    ),
    "wide": ([2, 9], [7, 3], 128, {}),
    "widest": ([2, 5], [7, 3], 200, {}),
}


def _make(case, dtype, tail=3):  # a name of CASES, or what could stand there
    """(q, k, v, cu_q, cu_k, kv_ids, segment_bias, key_bias), grad, grad_lse, scale: between NaN, with tails of NaN."""
    lengths_q, lengths_k, e, options = CASES[case] if isinstance(case, str) else case
    lengths_k = lengths_k or lengths_q
    heads = options.get("heads", 2)
    heads_kv = options.get("heads_kv", 1 if heads == 3 else heads)
    q, cu_q = packed(lengths_q, heads, e, tail=tail, dtype=dtype, seed=1)
    k, cu_k = packed(lengths_k, heads_kv, e, tail=tail, dtype=dtype, seed=2)
    v, _ = packed(lengths_k, heads_kv, e, tail=tail, dtype=dtype, seed=3)
    ids = torch.tensor(options["kv_ids"], dtype=torch.int32) if "kv_ids" in options else None
    segments = 1 if ids is None or ids.ndim == 1 else ids.shape[1]
    segment, _ = packed([len(lengths_q)], segments, seed=4)
    key, _ = packed([sum(lengths_k)], tail=tail, seed=5)
    grad, _ = packed(lengths_q, heads, e, tail=tail, dtype=dtype, seed=6)
    grad_lse, _ = packed(lengths_q, heads, tail=tail, seed=7)
    inputs = [
        *map(surrounded, (q, k, v)),
        *(cu_q, cu_k, ids),
        surrounded(segment) if options.get("segment_bias") else None,
        surrounded(key) if options.get("key_bias") else None,
    ]
    return inputs, surrounded(grad), surrounded(grad_lse.t().contiguous()), e**-0.5


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _run(op, backward, inputs, grad, grad_lse, scale, scores):
    out = op(*inputs, scale, scores, [], [])
    grads = backward(grad, grad_lse, *inputs[:3], *out[:2], *inputs[3:], scale, True, [], [])
    return [*out, *grads]


def _launchers(*args):
    return _run(kernels.attention, kernels.attention_backward, *args)


def _cpu(*args):
    return _run(torch.ops.smaug.attention, torch.ops.smaug.attention_backward, *args)


@pytest.fixture(params=[80, 90], ids=["pointers", "descriptors"])
def copies(request, monkeypatch):
    """Tiles come as they do on sm_80 or, for 16 bits, as on sm_90."""
    monkeypatch.setattr(launch, "_architecture", request.param)
    blocks = dict(E1=16, E2=0, BLOCK_M=16)
    tiles, _ = kernels._streamed(torch.zeros(1, 1, 16, dtype=torch.float16), "BLOCK_M", blocks)
    assert isinstance(tiles, TensorDescriptor) == (request.param == 90)


@pytest.mark.parametrize(
    ("dtype", "copies"),
    [
        pytest.param(torch.float32, 80, id="fp32"),
        pytest.param(torch.float16, 80, id="fp16"),
        pytest.param(torch.float16, 90, id="fp16 through descriptors"),
    ],
    indirect=["copies"],
)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_formula(case, dtype, copies):
    """Forward, backward and scores: fp32 to rounding, fp16 at most twice the error of the CPU path in fp16."""
    inputs, grad, grad_lse, scale = _make(case, dtype)
    scores = "cls" if CASES[case][2] == 24 else "mean"
    want = _cpu(
        *([_double(x) for x in y] if isinstance(y, list) else _double(y) for y in (inputs, grad, grad_lse)),
        scale,
        scores,
    )
    eager = _cpu(inputs, grad, grad_lse, scale, scores)
    got = _launchers(inputs, grad, grad_lse, scale, scores)
    names = "o", "lse", "scores", "dq", "dk", "dv", "dsegment", "dkey"
    for name, a, b, c in zip(names, got, want, eager, strict=True):
        assert a.shape == c.shape and a.dtype == c.dtype, name
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite) and torch.equal(a[~finite].double(), b[~finite]), name
        a, b, c = a[finite].double(), b[finite], c[finite].double()
        if not a.numel():
            continue
        if name in ("dsegment", "dkey"):  # sums that cancel, to 0 where there is one segment
            bound = 2e-5 if dtype == torch.float32 else max(2e-3, 2 * (c - b).abs().max().item())
            assert (a - b).abs().max().item() < bound * (1 + b.abs().max().item()), name
        else:
            bound = 3e-6 if dtype == torch.float32 else 2 * relative_error(c, b) + 1e-5
            assert relative_error(a, b) < bound, name


@settings(max_examples=4)
@given(st.data())
def test_any_lengths(data):
    lengths = st.lists(st.integers(0, 9) | st.integers(31, 40), min_size=1, max_size=4)
    lengths_q, lengths_k, segments = data.draw(lengths), data.draw(lengths), data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-1, len(lengths_k) - 1), min_size=segments, max_size=segments)
    heads_kv = data.draw(st.sampled_from([1, 2]))
    options = dict(kv_ids=[data.draw(row) for _ in lengths_q], heads_kv=heads_kv, segment_bias=True, key_bias=True)
    drawn = lengths_q, lengths_k, data.draw(st.sampled_from([16, 24, 40])), options
    inputs, *rest = _make(drawn, torch.float32)
    for a, b in zip(_launchers(inputs, *rest, "mean"), _cpu(inputs, *rest, "mean"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "copies"), [("self", 80), ("a segment twice", 80), ("self", 90)], indirect=["copies"])
def test_tail_is_zero_and_programs_do_not_depend_on_each_other(case, copies, in_every_order):
    inputs, *rest = _make(case, torch.float16)
    o, lse, scores, dq, dk, dv, _, dkey = in_every_order(lambda: _launchers(inputs, *rest, "mean"))
    rows_q, rows_k = int(inputs[3][-1]), int(inputs[4][-1])
    for x in (o[rows_q:], lse[:, rows_q:], dq[rows_q:], scores[rows_k:], dk[rows_k:], dv[rows_k:], dkey[rows_k:]):
        assert (x == 0).all()


def test_each_gradient_alone():
    inputs, grad, grad_lse, scale = _make("segments", torch.float32)
    both = _launchers(inputs, grad, grad_lse, scale, "")
    first = _launchers(inputs, grad, None, scale, "")
    second = _launchers(inputs, None, grad_lse, scale, "")
    for a, b, c in zip(both[3:], first[3:], second[3:], strict=True):
        torch.testing.assert_close(a, b + c)


def test_views_of_one_projection_and_strided_offsets():
    """q, k, v as the model makes them, cu_seqlens sliced into clips, int64 numbers, and layouts that need a copy."""
    qkv, cu = packed([4, 5, 3, 9], 3, 2, 24, tail=2)
    q, k, v = qkv.unbind(1)
    cu = cu.long()[::2]
    ids, scale = torch.tensor([1, 0]), 0.2
    ones = torch.ones(()).expand(q.shape)
    plain = [x.contiguous() for x in (q, k, v)]
    want = _cpu([*plain, cu, cu, ids, None, None], ones.contiguous(), None, scale, "cls")
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
    for views in ((q, k, v), swapped):
        for a, b in zip(_launchers([*views, cu, cu, ids, None, None], ones, None, scale, "cls"), want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_many_uses_are_found_by_scanning_and_by_an_index(monkeypatch):
    """More entries than are looked at together; the sorted index gives the same bits."""
    ids = torch.full((3, 400), -1, dtype=torch.int32)
    for place, j in ((0, 1), (399, 0), (401, 1), (799, 1), (800, 0), (1199, 1)):
        ids.view(-1)[place] = j
    q, cu_q = packed([2, 3, 1], 1, 16, tail=1, seed=1)
    k, cu_k = packed([3, 2, 4], 1, 16, tail=1, seed=2)
    inputs = [q, k, k, cu_q, cu_k, ids, torch.randn(3, 400), None]
    args = inputs, q.clone(), None, 0.25, "mean"
    want, scanned = _cpu(*args), _launchers(*args)
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", 0)
    for a, b, c in zip(scanned, _launchers(*args), want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=2e-6, rtol=1e-5)


def test_biases_that_hide_keys():
    inputs, grad, grad_lse, scale = _make("a segment twice", torch.float32)
    inputs[6][0] = inputs[7][6:9] = -torch.inf
    want = _cpu(inputs, grad, grad_lse, scale, "mean")
    got = _launchers(inputs, grad, grad_lse, scale, "mean")
    assert (got[0][:3] == 0).all() and (got[1][:, :3] == -torch.inf).all() and (got[3][:3] == 0).all()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["one key head, biases", "segments"])
def test_descriptors_give_the_bits_of_pointers(case, monkeypatch):
    """Views of one projection, some of which begin between 16-byte borders: the same tiles, the same bits."""
    inputs, grad, _, scale = _make(case, torch.float16)
    for shift in (0, 1):
        for place, x in enumerate(inputs[:3]):
            t, h, e = x.shape
            side = torch.full((t * (h + 1) * e + shift,), torch.nan, dtype=x.dtype)[shift:].view(t, h + 1, e)
            inputs[place] = side[:, 1:].copy_(x)
        monkeypatch.setattr(launch, "_architecture", 90)
        got = _launchers(inputs, grad, None, scale, "mean")
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_streamed", lambda x, *_: (x, None))
            want = _launchers(inputs, grad, None, scale, "mean")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([3], [0]), ([0, 0], [2, 3]), ([], []), ([0], [0])])
def test_nothing_at_all(lengths_q, lengths_k, copies):
    q, cu_q = packed(lengths_q, 2, 16, tail=1, dtype=torch.float16)
    k, cu_k = packed(lengths_k, 2, 16, tail=0 if lengths_q == [3] else 2, dtype=torch.float16)
    inputs = [q, k, k, cu_q, cu_k, None, None, None]
    for a, b in zip(_launchers(inputs, q, None, 1.0, "mean"), _cpu(inputs, q, None, 1.0, "mean"), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    ids = torch.zeros(len(lengths_q), 0, dtype=torch.int32)
    assert (_launchers([q, k, k, cu_q, offsets([]), ids, None, None], q, None, 1.0, "")[0] == 0).all()


def test_fp64_is_refused():
    q, cu = packed([3], 2, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="reference"):
        kernels.attention(q, q, q, cu, cu, None, None, None, 1.0, "", [], [])
    assert ops.attention(q, q, q, cu, impl="reference").dtype == torch.float64
