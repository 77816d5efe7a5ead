"""How the CPU path cuts its work must not show: buckets, surplus places, chunks, and the shift of the exponents."""

import pytest
import torch

from smaug import ops
from smaug.ops import attention_cpu
from smaug.testing import offsets, packed, relative_error

LENGTHS = [5, 1, 0, 7, 5, 2, 11, 3]
H, E = 4, 16


def _run(dtype=torch.float32, scale=None, bias=False, kv=None, poison=None, heads_kv=H):
    """o, lse and all gradients."""
    q = packed(LENGTHS, H, E, dtype=dtype, seed=1)[0]
    k, v = (packed(LENGTHS, heads_kv, E, dtype=dtype, seed=s)[0] for s in (2, 3))
    leaves = [q, k, v] + ([packed(LENGTHS, seed=4)[0]] if bias else [])
    if poison is not None:
        k[poison] = torch.nan
    leaves = [x.requires_grad_() for x in leaves]
    cu = offsets(LENGTHS)
    how = dict(scale=scale, return_lse=True, kv_ids=kv, key_bias=leaves[3] if bias else None)
    o, lse = ops.attention(*leaves[:3], cu, **how, lengths_q=None if kv is not None else LENGTHS)
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    dlse = torch.where(lse.isfinite(), lse.cos().detach(), 0)
    grads = torch.autograd.grad((o, lse), leaves, (g, dlse))
    return [o.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads_kv", [H, 2])
@pytest.mark.parametrize("kv", [None, [[0, 3], [1, -1], [2, 2], [3, 5], [4, 0], [6, -1], [7, 1], [5, 5]]])
def test_cuts_do_not_show(monkeypatch, bias, heads_kv, kv):
    kv = None if kv is None else torch.tensor(kv, dtype=torch.int32)
    how = dict(dtype=torch.float64, bias=bias, kv=kv, heads_kv=heads_kv)
    monkeypatch.setattr(attention_cpu, "_BUCKET", 0)  # equal shapes alone
    attention_cpu._known_plan.cache_clear()
    want = _run(**how)
    for bucket, chunk in ((1 << 30, 1 << 17), (1 << 30, 1), (0, 1), (300, 64)):  # one bucket, one row at a time, ...
        monkeypatch.setattr(attention_cpu, "_BUCKET", bucket)
        monkeypatch.setattr(attention_cpu, "_CHUNK", chunk)
        attention_cpu._known_plan.cache_clear()
        torch.testing.assert_close(_run(**how), want, rtol=1e-11, atol=1e-11)
    attention_cpu._known_plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sequences", "length"), [(5, 1), (1, 7), (4, 3), (3, 100)])
def test_results_are_laid_out_as_the_fake_says(dtype, sequences, length):
    """A compiled graph has counted on it: torch's flash kernel gives lse of one query a sequence in another order."""
    q = torch.randn(sequences * length, H, E, dtype=dtype)
    o, lse = ops.attention(q, q, q, offsets([length] * sequences), lengths_q=length, return_lse=True)
    assert o.is_contiguous() and lse.stride() == (sequences * length, 1)


def test_how_lengths_are_cut():
    lengths = torch.tensor([20, 21, 22, 400, 23, 400]).numpy()
    cut = [group.tolist() for group in attention_cpu._groups(lengths, lengths, 12)]
    assert cut == [[0, 1, 2, 4], [3, 5]]  # short ones share; to the long ones they would be surplus
    alone = [group.tolist() for group in attention_cpu._groups(lengths, lengths, 0)]
    assert alone == [[0], [1], [2], [4], [3, 5]]


@pytest.mark.parametrize("scale", [40.0, 1e4])
def test_logits_of_any_size(scale):
    """A common shift of 0 cannot hold them: 2 ** 60 is left behind."""
    with torch.no_grad():
        q, k, v = (packed(LENGTHS, H, E, dtype=torch.bfloat16, seed=s)[0] for s in (1, 2, 3))
        cu = offsets(LENGTHS)
        assert (scale * q.float().flatten(1) @ k.float().flatten(1).T).abs().max() > 100
        o = ops.attention(q, k, v, cu, scale=scale, lengths_q=LENGTHS)
        # logits are rounded to 16 bits, as eager PyTorch rounds them; the reference gets the same
        want = ops.attention(q, k, v, cu, scale=scale, impl="reference")
    assert o.isfinite().all()
    if scale == 40.0:
        assert relative_error(o, want) < 0.2


def test_one_sequence_with_nan_spoils_no_other():
    clean, spoilt = _run(torch.bfloat16), _run(torch.bfloat16, poison=7)  # a row of the sequence of rows 6 to 12
    for got, want in zip(spoilt, clean, strict=True):
        got, want = (x.movedim(0, 1) if x.shape[0] == H else x for x in (got, want))
        assert got[6:13].isnan().any()
        rest = torch.ones(len(want), dtype=torch.bool)
        rest[6:13] = False
        torch.testing.assert_close(got[rest], want[rest], rtol=2e-2, atol=2e-2)
