"""gather_tokens, scatter_tokens and the fill's gradient: the reference's numbers, moved by Triton."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smaug import ops  # noqa: F401  (registers the reference)
from smaug.kernels import gather_tokens as kernel
from smaug.testing import offsets, packed, surrounded

RAGGED = {"several": [3, 0, 1, 17, 0, 5], "empty at the ends": [0, 0, 20, 0], "one": [1], "none": []}


def _ids(lengths, n, tail=0, seed=0, odd=True):
    """Ascending and unique in each sequence, some of them -1 (anywhere) or beyond the grid."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randperm(n + 2, generator=generator)[:k].sort().values for k in lengths]
    ids = torch.cat([*parts, torch.full((tail,), 2)]).int()
    if odd:
        ids[torch.rand(len(ids), generator=generator) < 0.2] = -1
    return ids


def _equal(got, want):
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_packed(lengths, dtype):
    for n, d, tail in ((23, 6, 0), (37, 33, 5)):
        x, cu = packed(lengths, d, tail=tail, dtype=dtype)
        ids = _ids(lengths, n, tail)
        grid = surrounded(torch.randn(len(lengths), n, d).to(dtype))
        _equal(kernel.gather_tokens(grid, ids, cu), torch.ops.smaug.gather_tokens(grid, ids, cu))
        for fill in (None, torch.randn(d), torch.randn(d).half()):
            _equal(kernel.scatter_tokens(x, ids, n, fill, cu), torch.ops.smaug.scatter_tokens(x, ids, n, fill, cu))
        sum_, true = kernel.scatter_fill_grad(grid, ids, cu), torch.ops.smaug.scatter_fill_grad(grid, ids, cu)
        assert sum_.dtype == true.dtype
        torch.testing.assert_close(sum_, true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "n"), [((1, 1, 1), 1), ((3, 5, 7), 9), ((2, 33, 260), 70), ((2, 0, 4), 3), ((0, 2, 4), 3)]
)
def test_uniform(shape, n):
    s, k, d = shape
    x = surrounded(torch.randn(shape))
    ids = torch.stack([torch.randperm(n)[:k].sort().values for _ in range(s)]) if s else torch.zeros(0, k).long()
    grid = surrounded(torch.randn(s, n, d))
    for index in (ids, ids.int()):
        _equal(kernel.gather_tokens(grid, index, None), torch.ops.smaug.gather_tokens(grid, index, None))
    for fill in (None, torch.randn(d)):
        _equal(kernel.scatter_tokens(x, ids, n, fill, None), torch.ops.smaug.scatter_tokens(x, ids, n, fill, None))
    want = torch.ops.smaug.scatter_fill_grad(grid, ids, None)
    torch.testing.assert_close(kernel.scatter_fill_grad(grid, ids, None), want, atol=1e-5, rtol=1e-5)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=4),
    n=st.integers(20, 40),
    d=st.integers(1, 40),
    tail=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_lengths(lengths, n, d, tail, dtype):
    x, cu = packed(lengths, d, tail=tail, dtype=dtype)
    ids, grid, fill = _ids(lengths, n, tail), torch.randn(len(lengths), n, d).to(dtype), torch.randn(d)
    _equal(kernel.gather_tokens(grid, ids, cu), torch.ops.smaug.gather_tokens(grid, ids, cu))
    _equal(kernel.scatter_tokens(x, ids, n, fill, cu), torch.ops.smaug.scatter_tokens(x, ids, n, fill, cu))
    sum_, true = kernel.scatter_fill_grad(grid, ids, cu), torch.ops.smaug.scatter_fill_grad(grid, ids, cu)
    torch.testing.assert_close(sum_, true, atol=1e-5, rtol=1e-5)


def test_grids_of_no_slot():
    ids, cu = torch.zeros(4, dtype=torch.int32), offsets([1, 3])
    for cut, index in ((cu, ids), (None, ids.view(2, 2))):
        assert not kernel.gather_tokens(torch.zeros(2, 0, 3), index, cut).any()
        x = torch.randn(*index.shape, 3)
        assert kernel.scatter_tokens(x, index, 0, None, cut).shape == (2, 0, 3)
        assert kernel.scatter_fill_grad(torch.zeros(2, 0, 3), index, cut).tolist() == [0, 0, 0]


def test_views_are_read_in_place_and_others_copied():
    base = torch.randn(4, 9, 24)
    lengths = [3, 0, 4, 2]
    ids, cu = _ids(lengths, 5), offsets(lengths)
    frames = offsets([2, 1, 0, 0, 2, 2, 1, 1])[::2]  # as `PackedTokens.group` makes them
    assert frames.tolist() == cu.tolist()
    views = {
        "no [CLS]": base[:, 1:], "third": base[..., 8:16], "both": base[:, 2:, :8], "expanded":
            base[:1].expand(4, 9, 24),
        "sum's gradient": torch.ones(()).expand(4, 9, 24), "transposed": base.transpose(1, 2),
    }  # fmt: skip
    for name, view in views.items():
        _equal(kernel.gather_tokens(view, ids, frames), torch.ops.smaug.gather_tokens(view, ids, cu))
        sum_, true = (f(view, ids, cu) for f in (kernel.scatter_fill_grad, torch.ops.smaug.scatter_fill_grad))
        torch.testing.assert_close(sum_, true, msg=name)
        kept = name in ("no [CLS]", "third", "both", "expanded")
        assert (kernel.even_rows(view)[0].data_ptr() == view.data_ptr()) == kept, name
    x = torch.randn(9, 16)[:, ::2]
    for rows in (x, torch.randn(9, 16)[:, 8:], torch.ones(()).expand(9, 8)):
        _equal(
            kernel.scatter_tokens(rows, ids, 5, None, frames), torch.ops.smaug.scatter_tokens(rows, ids, 5, None, cu)
        )
    index = torch.arange(12).view(3, 4)[:, ::2].contiguous().t().contiguous().t() % 5
    x = torch.randn(3, 2, 4)
    _equal(kernel.scatter_tokens(x, index, 5, None, None), torch.ops.smaug.scatter_tokens(x, index, 5, None, None))


def test_more_ids_than_are_compared_at_once_and_more_tiles_than_splits(monkeypatch):
    monkeypatch.setattr(kernel, "SPLITS", 4)
    ids = torch.arange(0, 600, 2)[None]
    x, grid = torch.randn(1, 300, 3), torch.randn(1, 601, 3)
    _equal(kernel.scatter_tokens(x, ids, 601, None, None), torch.ops.smaug.scatter_tokens(x, ids, 601, None, None))
    want = torch.ops.smaug.scatter_fill_grad(grid, ids, None)
    torch.testing.assert_close(kernel.scatter_fill_grad(grid, ids, None), want, atol=1e-5, rtol=1e-5)


def test_kept_rows_do_not_touch_the_fills_gradient():
    grid = torch.full((2, 4, 3), torch.nan)
    grid[:, 1] = 1.0
    ids = torch.tensor([[0, 2, 3], [0, 2, 3]])
    assert kernel.scatter_fill_grad(grid, ids, None).tolist() == [2, 2, 2]


def test_program_order_changes_nothing(in_every_order):
    lengths = [3, 0, 1, 17, 5]
    x, cu = packed(lengths, 9, tail=3)
    ids, grid, fill = _ids(lengths, 37, 3), torch.randn(5, 37, 9), torch.randn(9)
    in_every_order(lambda: kernel.gather_tokens(grid, ids, cu))
    in_every_order(lambda: kernel.scatter_tokens(x, ids, 37, fill, cu))
    in_every_order(lambda: kernel.scatter_fill_grad(grid, ids, cu))
