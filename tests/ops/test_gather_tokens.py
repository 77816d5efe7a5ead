"""gather_tokens and scatter_tokens: plain indexing, and each the other's backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smaug import ops
from smaug.testing import HostReads, offsets, packed

IDS = torch.tensor([0, 3, 4, 1, 2, 0, 4])  # sequences of 3, 0, 1, 3 in grids of 5
LENGTHS = [3, 0, 1, 3]


def _loop_scatter(x, fill, ids=IDS, lengths=LENGTHS, length=5):
    out = fill.expand(len(lengths), length, -1).clone()
    row = 0
    for s, n in enumerate(lengths):
        for _ in range(n):
            if 0 <= ids[row] < length:
                out[s, ids[row]] = x[row]
            row += 1
    return out


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_scatter_and_gather(tail, dtype):
    x, cu = packed(LENGTHS, 6, tail=tail, dtype=dtype)
    ids = torch.cat([IDS, torch.full((tail,), 2)]).int()
    fill = torch.randn(6, dtype=dtype)
    x.requires_grad_(), fill.requires_grad_()
    out = ops.scatter_tokens(x, ids, 5, fill, cu)
    assert torch.equal(out, _loop_scatter(x, fill))
    g = torch.randn_like(out)
    dx, dfill = torch.autograd.grad(out, (x, fill), g)
    assert torch.equal(dx, ops.gather_tokens(g, ids, cu)) and (dx[7:] == 0).all()
    tx, tfill = torch.autograd.grad(_loop_scatter(x, fill), (x, fill), g)
    assert torch.equal(dx[:7], tx[:7])
    torch.testing.assert_close(dfill, tfill, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)
    grid = torch.randn(4, 5, 6, dtype=dtype, requires_grad=True)
    back = ops.gather_tokens(grid, ids, cu)
    assert (back[7:] == 0).all()
    (dgrid,) = torch.autograd.grad(back, grid, x.detach())
    assert torch.equal(dgrid, ops.scatter_tokens(x.detach(), ids, 5, 0, cu))


@given(st.data())
def test_any_lengths_and_ids(data):
    """Ids of -1, and of what is beyond the grid, anywhere; an empty grid; 16 bits."""
    length, dtype = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([torch.float64, torch.bfloat16]))
    each = data.draw(st.lists(st.lists(st.integers(0, length + 2), unique=True).map(sorted), min_size=1, max_size=5))
    ids = torch.tensor([i for row in each for i in row], dtype=torch.int32)
    ids[torch.rand(len(ids)) < 0.2] = -1
    lengths, tail, d = [len(row) for row in each], data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    x, cu = packed(lengths, d, tail=tail, dtype=dtype)
    x, fill = x.requires_grad_(), torch.randn(d, dtype=dtype, requires_grad=True)
    padded = torch.cat([ids, ids.new_full((tail,), 1)])
    out, want = ops.scatter_tokens(x, padded, length, fill, cu), _loop_scatter(x, fill, ids, lengths, length)
    assert torch.equal(out, want)
    g = torch.randn(out.shape, dtype=dtype)
    (dx, dfill), (tx, tfill) = (torch.autograd.grad(y, (x, fill), g, materialize_grads=True) for y in (out, want))
    assert torch.equal(dx, tx)
    torch.testing.assert_close(dfill, tfill, atol=5e-2 if dtype == torch.bfloat16 else 1e-12, rtol=2e-2)
    assert torch.equal(ops.gather_tokens(g, padded, cu), dx)


def test_uniform_is_indexing():
    x = torch.randn(3, 7, 4)
    ids = torch.stack([torch.randperm(7)[:5].sort().values for _ in range(3)]).int()
    want = x.gather(1, ids.long()[..., None].expand(-1, -1, 4))
    got = ops.gather_tokens(x, ids)
    assert torch.equal(got, want)
    back = ops.scatter_tokens(got, ids, 7, fill=2.5)
    kept = torch.zeros(3, 7, dtype=torch.bool).scatter_(1, ids.long(), True)
    assert torch.equal(back[kept], x[kept]) and (back[~kept] == 2.5).all()
    packed_form = ops.scatter_tokens(got.reshape(-1, 4), ids.reshape(-1), 7, 2.5, offsets([5, 5, 5]))
    assert torch.equal(packed_form, back)


def test_cls_and_fused_rows_have_no_place():
    x = torch.arange(1.0, 5.0)[:, None].requires_grad_()
    ids = torch.tensor([-1, 1, 2, -1], dtype=torch.int32)
    out = ops.scatter_tokens(x, ids, 3, 9.0, offsets([4]))
    assert out.flatten().tolist() == [9.0, 2.0, 3.0]
    assert torch.autograd.grad(out.sum(), x)[0].flatten().tolist() == [0, 1, 1, 0]
    assert ops.gather_tokens(out, ids, offsets([4])).flatten().tolist() == [0, 2, 3, 0]


def test_all_kept_and_none_kept():
    x = torch.randn(2, 3, 4)
    ids = torch.arange(3).repeat(2, 1)
    fill = torch.randn(4, requires_grad=True)
    out = ops.scatter_tokens(x, ids, 3, fill)
    assert torch.equal(out, x) and (torch.autograd.grad(out.sum(), fill)[0] == 0).all()
    nothing = ops.scatter_tokens(x[:, :0], ids[:, :0], 3, fill)
    assert torch.equal(nothing, fill.expand(2, 3, 4))
    assert ops.gather_tokens(x, ids[:, :0]).shape == (2, 0, 4)


def test_gradcheck():
    x, cu = packed(LENGTHS, 2, dtype=torch.double)
    x.requires_grad_()
    fill = torch.randn(2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, fill: ops.scatter_tokens(x, IDS, 5, fill, cu), (x, fill))
    grid = torch.randn(4, 5, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda grid: ops.gather_tokens(grid, IDS, cu), (grid,))


def test_refusals():
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        ops.gather_tokens(torch.randn(2, 3, 4), IDS)
    with pytest.raises(ValueError, match="one row for each"):
        ops.scatter_tokens(torch.randn(5, 4), IDS, 5, 0, offsets(LENGTHS))
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        ops.scatter_tokens(torch.randn(7, 4), IDS, 5, 0, offsets(LENGTHS), impl="triton")


def test_no_host_read_and_meta():
    x, cu = packed(LENGTHS, 6, tail=0)
    x.requires_grad_()
    fill = torch.randn(6, requires_grad=True)

    def f(x, ids, cu):
        return ops.scatter_tokens(x, ids, 5, fill, cu) * 2

    with HostReads() as reads:
        f(x, IDS, cu).sum().backward()
    assert not reads.found
    mx, mfill = (torch.empty(s, device="meta", requires_grad=True) for s in ((8 * 157, 768), (768,)))
    ids, mcu = torch.empty(8 * 157, dtype=torch.int32, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    out = ops.scatter_tokens(mx, ids, 1568, mfill, mcu)
    assert out.shape == (8, 1568, 768)
    ops.gather_tokens(out, ids, mcu).sum().backward()
    assert mx.grad.shape == mx.shape and mfill.grad.shape == mfill.shape
