"""SparseAttention against nn.MultiheadAttention: the same weights, numbers and gradients, padded and packed."""

import copy
import itertools

import pytest
import torch
from torch import nn

from smaug.ops import SparseAttention
from smaug.testing import HostReads, relative_error
from smaug.tokens import PackedTokens, packed_uniform

D, H = 32, 2
LENGTHS_Q, LENGTHS_K = [3, 1, 5], [4, 6, 2]
KEPT = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()  # of LENGTHS_Q
KEPT_K = torch.tensor([[0, 1, 1, 0, 1, 1], [1] * 6, [1, 0, 0, 0, 1, 0]]).bool()  # of LENGTHS_K, with gaps


def pair(dtype=torch.float32, width=D, **options):
    """The two modules with the same weights, biases not zero."""
    theirs = nn.MultiheadAttention(width, H, dtype=dtype, **options)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ours = SparseAttention(width, H, dtype=dtype, **options)
    assert ours.load_state_dict(theirs.state_dict()) is not None
    return theirs, ours


def gradients(out, module, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad((out.double() * weights).sum(), [*module.parameters(), *inputs])


def agree(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        # absolute too: a bias of the keys has the gradient 0, and both sides round it
        assert (a - b).abs().max() <= bound * (1 + b.abs().max())


BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("case", "options"),
    [
        *itertools.product(["self", "q=k", "cross", "three"], [{}, dict(batch_first=True), dict(bias=False)]),
        ("three", dict(kdim=24, vdim=40)),
    ],
    ids=str,
)
def test_same_numbers_with_everything_kept(case, options, dtype):
    theirs, ours = pair(dtype, **options)
    first = options.get("batch_first", False)

    def rows(length, width):
        x = torch.randn(3, length, width, dtype=dtype)
        return (x if first else x.transpose(0, 1)).requires_grad_()

    q = rows(5, D)
    k = q if case in ("self", "q=k") else rows(6, options.get("kdim", D))
    v = k if case in ("self", "cross") else rows(k.shape[1 if first else 0], options.get("vdim", D))
    inputs = list({id(x): x for x in (q, k, v)}.values())
    want = theirs(q, k, v, need_weights=False)[0]
    got, weights = ours(q, k, v)
    assert weights is None
    agree([got], [want], BOUND[dtype])
    agree(gradients(got, ours, inputs), gradients(want, theirs, inputs), 20 * BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_of_self_attention(batch_first, kind, dtype):
    """Kept rows are equal, padded rows 0 - even where they hold NaN - and so are their gradients."""
    theirs, ours = pair(dtype, batch_first=batch_first)
    x = torch.randn(3, 5, D, dtype=dtype).masked_fill(~KEPT[..., None], 0).requires_grad_()
    y = x.detach().masked_fill(~KEPT[..., None], torch.nan).requires_grad_()
    mask = ~KEPT if kind == "bool" else torch.zeros(3, 5, dtype=dtype).masked_fill(~KEPT, -torch.inf)
    turn = (lambda z: z) if batch_first else (lambda z: z.transpose(0, 1))
    given = turn(x)
    want = turn(theirs(given, given, given, mask, need_weights=False)[0]).masked_fill(~KEPT[..., None], 0)
    given = turn(y)
    got = turn(ours(given, given, given, key_padding_mask=mask)[0])
    assert (got[~KEPT] == 0).all()
    agree([got], [want], BOUND[dtype])
    agree(gradients(got, ours, [y]), gradients(want, theirs, [x]), 20 * BOUND[dtype])


def test_padding_of_cross_attention():
    """Every query row is computed; keys may be missing anywhere; a finite float mask is added to the logits."""
    theirs, ours = pair(torch.float64, batch_first=True)
    q = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 6, D, dtype=torch.float64, requires_grad=True)
    for mask in (~KEPT_K, torch.randn(3, 6, dtype=torch.float64).masked_fill(~KEPT_K, -torch.inf)):
        want = theirs(q, k, k, mask, need_weights=False)[0]
        got = ours(q, k, key_padding_mask=mask)[0]
        # biases of the logits are fp32
        bound = 1e-13 if mask.dtype == torch.bool else 1e-6
        agree([got], [want], bound)
        agree(gradients(got, ours, [q, k]), gradients(want, theirs, [q, k]), 20 * bound)


def test_all_keys_ignored_gives_the_bias():
    _, ours = pair(batch_first=True)
    q, k = torch.randn(2, 3, D, requires_grad=True), torch.randn(2, 4, D)
    out = ours(q, k, key_padding_mask=torch.tensor([[True] * 4, [False] * 4]))[0]
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(3, D))
    out.sum().backward()
    assert (q.grad[0] == 0).all() and q.grad.isfinite().all()
    x = torch.randn(2, 3, D)
    assert (ours(x, key_padding_mask=torch.ones(2, 3, dtype=torch.bool))[0] == 0).all()


def test_unbatched_and_empty():
    theirs, ours = pair()
    x = torch.randn(4, D)
    mask = torch.tensor([False, True, False, False])
    want = theirs(x, x, x, mask, need_weights=False)[0]
    got = ours(x, x, x, mask)[0]
    assert (got[1] == 0).all()
    agree([got[~mask]], [want[~mask]], 2e-6)
    agree([ours(x)[0]], [theirs(x, x, x)[0]], 2e-6)
    assert ours(torch.zeros(4, 0, D))[0].shape == (4, 0, D) and ours(torch.zeros(0, 2, D))[0].shape == (0, 2, D)


@pytest.mark.parametrize("heads_of", [4, 12, 20, 72])
def test_heads_of_any_width(heads_of):
    theirs, ours = pair(torch.float64, heads_of * H, batch_first=True)
    x = torch.randn(2, 5, heads_of * H, dtype=torch.float64, requires_grad=True)
    want, got = theirs(x, x, x, need_weights=False)[0], ours(x)[0]
    agree([got], [want], 1e-13)
    agree(gradients(got, ours, [x]), gradients(want, theirs, [x]), 1e-11)


@pytest.mark.parametrize("known", [True, False], ids=["lengths known", "lengths on the device"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_packed(cross, known):
    theirs, ours = pair(torch.float64, batch_first=True)
    q = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 6, D, dtype=torch.float64, requires_grad=True) if cross else q
    kept = torch.arange(6) < torch.tensor(LENGTHS_K)[:, None] if cross else KEPT

    def pack(x, lengths):
        if known:
            return PackedTokens.from_padded(x, lengths=tuple(lengths))
        mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
        return PackedTokens.from_padded(x, mask, total=sum(lengths) + 3)  # three rows of tail

    packed = pack(q, LENGTHS_Q)
    inputs = [q, k] if cross else [q]
    with HostReads() as reads:
        out = ours(packed, pack(k, LENGTHS_K)) if cross else ours(packed)
        got = out.to_padded(5)[0]
        grads = gradients(got, ours, inputs)
    assert not reads.found
    assert (out.values[sum(LENGTHS_Q) :] == 0).all()
    assert out.cu_seqlens is packed.cu_seqlens and out.lengths == packed.lengths and out.ids is packed.ids
    want = theirs(q, k, k, ~kept, need_weights=False)[0].masked_fill(~KEPT[..., None], 0)
    agree([got], [want], 1e-13)
    agree(grads, gradients(want, theirs, inputs), 1e-11)


def test_no_host_read_without_a_mask():
    _, ours = pair(batch_first=True)
    with HostReads() as reads:
        ours(torch.randn(2, 5, D), torch.randn(2, 3, D))[0].sum().backward()
    assert not reads.found


def test_key_scores_are_the_mean_weights():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(3, 5, D)
    weights = theirs(x, x, x, ~KEPT)[1]  # (B, L, S), a mean over heads
    _, cls = ours(x, key_padding_mask=~KEPT, key_scores="cls")
    _, mean = ours(x, key_padding_mask=~KEPT, key_scores="mean", need_weights=False)
    torch.testing.assert_close(cls, weights[:, 0])
    torch.testing.assert_close(mean, (weights * KEPT[..., None]).sum(1) / KEPT.sum(1, keepdim=True))
    out, scores = ours(PackedTokens.from_padded(x, KEPT), key_scores="cls")
    assert isinstance(out, PackedTokens)
    torch.testing.assert_close(scores, cls[KEPT])


def test_autocast_and_bf16_are_as_good_as_torch():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 60, D)
    truth = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double(), need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(x, x, x, need_weights=False)[0], ours(x)[0]
    assert got.dtype == torch.bfloat16
    assert relative_error(got, truth) <= 2 * relative_error(want, truth)


@pytest.mark.parametrize("training", [True, False])
def test_inside_a_transformer_encoder(training):
    """nn.TransformerEncoder calls it with a float mask, and has no way around it in eval mode."""
    layer = nn.TransformerEncoderLayer(D, H, 64, dropout=0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    ours, calls = copy.deepcopy(theirs), []
    for part in ours.layers:
        attention = SparseAttention(D, H, batch_first=True)
        attention.load_state_dict(part.self_attn.state_dict())
        attention.register_forward_hook(lambda *_: calls.append(1))
        part.self_attn = attention.train(training)
    x = torch.randn(3, 5, D)
    with torch.set_grad_enabled(training):
        want, got = (m(x, src_key_padding_mask=~KEPT) for m in (theirs, ours))
    assert len(calls) == 2
    torch.testing.assert_close(got[KEPT], want[KEPT])


def test_starts_from_the_same_weights():
    for options in ({}, dict(kdim=24, vdim=40), dict(bias=False)):
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(D, H, **options).state_dict()
        torch.manual_seed(3)
        ours = SparseAttention(D, H, **options).state_dict()
        assert list(theirs) == list(ours)
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_meta():
    ours = SparseAttention(D, H, batch_first=True, device="meta")
    assert ours(torch.empty(2, 5, D, device="meta"))[0].shape == (2, 5, D)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (dict(need_weights=True), "need_weights=False, .* key_scores"),
        (dict(is_causal=True), "bidirectional; for causal masks use"),
        (dict(attn_mask=torch.zeros(5, 5)), "no attn_mask; pass key_padding_mask, or PackedTokens"),
        (dict(key_padding_mask=torch.zeros(5, 3).bool()), r"must be \(3, 5\)"),
        (dict(key_padding_mask=torch.zeros(3, 5).int()), "True = ignore"),
        (dict(key=packed_uniform(torch.zeros(6, D), 2)), "must all be tensors or all PackedTokens"),
        (dict(key=torch.zeros(2, 5, D)), "share the batch"),
        (dict(key=torch.zeros(3, 5, 8)), "key must be batched or unbatched rows of 32"),
    ],
)
def test_refusals(call, match):
    ours = SparseAttention(D, H, batch_first=True)
    with pytest.raises(ValueError, match=match):
        ours(torch.zeros(3, 5, D), **call)


def test_refusals_of_packed_calls_and_of_the_constructor():
    ours = SparseAttention(D, H)
    tokens = packed_uniform(torch.zeros(6, D), 2)
    with pytest.raises(ValueError, match="hold no padding"):
        ours(tokens, key_padding_mask=torch.zeros(3, 2).bool())
    with pytest.raises(ValueError, match="must pair up"):
        ours(tokens, packed_uniform(torch.zeros(6, D), 3))
    dropping = SparseAttention(D, H, dropout=0.1)
    with pytest.raises(ValueError, match=r"make it with dropout=0 .* or call eval"):
        dropping(tokens)
    dropping.eval()(tokens)
    for options, match in ((dict(add_bias_kv=True), "no add_bias_kv"), (dict(add_zero_attn=True), "append the extra")):
        with pytest.raises(ValueError, match=match):
            SparseAttention(D, H, **options)
    with pytest.raises(ValueError, match="no multiple of 3"):
        SparseAttention(D, 3)
