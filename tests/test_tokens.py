"""PackedTokens: conversions keep every token, and nothing on the way reads the device."""

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from smaug.testing import HostReads, offsets
from smaug.tokens import (
    HostLengths,
    PackedTokens,
    cat_tokens,
    packed_ragged,
    packed_uniform,
    regroup,
    split_tokens,
    take_rows,
    with_capacity,
)


def _ragged(lengths, d=3, tail=0, known=True):
    rows = sum(lengths)
    values = torch.arange(1.0, (rows + tail) * d + 1).view(-1, d)
    values[rows:] = 0
    return packed_ragged(values, offsets(lengths), lengths=lengths if known else None)


@pytest.mark.parametrize("tail", [0, 4])
def test_padded_and_back(tail):
    lengths = [2, 0, 5, 1]
    tokens = _ragged(lengths, tail=tail)
    with HostReads() as reads:
        padded, mask = tokens.to_padded(6)
    assert not reads.found
    assert mask.sum(1).tolist() == lengths and padded.shape == (4, 6, 3)
    assert torch.equal(padded[mask], tokens.values[:8]) and (padded[~mask] == 0).all()
    with HostReads() as reads:
        back = PackedTokens.from_padded(padded, mask, total=8 + tail)
    assert not reads.found
    for again in (
        back,
        PackedTokens.from_padded(padded, lengths=tuple(lengths)),
        PackedTokens.from_padded(padded, mask),
    ):
        assert torch.equal(again.values[:8], tokens.values[:8]) and (again.values[8:] == 0).all()
        assert torch.equal(again.cu_seqlens, tokens.cu_seqlens)
        assert torch.equal(again.ids[:8], tokens.ids[:8]) and (again.ids[8:] == -1).all()
        assert again.size.sum() == 8


def test_padding_may_stand_anywhere():
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    tokens = PackedTokens.from_padded(x, mask, total=4)
    assert tokens.values.flatten().tolist() == [1, 3, 6, 7] and tokens.ids.tolist() == [1, 3, 2, 3]


def test_uniform_is_a_view():
    x = torch.randn(3, 4, 5)
    tokens = PackedTokens.from_padded(x)
    assert tokens.values.data_ptr() == x.data_ptr() and tokens.lengths == 4
    padded, mask = tokens.to_padded()
    assert torch.equal(padded, x) and mask.all() and padded.data_ptr() == x.data_ptr()


def test_frames_into_clips_is_a_view():
    tokens = _ragged([2, 1, 4, 0, 3, 3])
    clips = tokens.group(3)
    assert clips.cu_seqlens.tolist() == [0, 7, 13] and clips.lengths == (7, 6) and clips.max_seqlen == 7
    assert clips.values is tokens.values and clips.cu_seqlens.data_ptr() == tokens.cu_seqlens.data_ptr()
    assert packed_uniform(torch.zeros(12, 2), 2).group(3).lengths == 6
    assert _ragged([2, 1], known=False).group(2).max_seqlen == 3
    with pytest.raises(ValueError, match="cannot be grouped"):
        tokens.group(4)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tail", [0, 2])
def test_cat(known, tail):
    parts = [_ragged([2, 3], tail=tail, known=known), _ragged([1], tail=0, known=known), _ragged([4, 0], tail=tail)]
    with HostReads() as reads:
        both = cat_tokens(parts)
    assert not reads.found
    assert both.cu_seqlens.tolist() == [0, 2, 5, 6, 10, 10] and both.rows == 10 + 2 * tail
    want = torch.cat([p.values[: p.cu_seqlens[-1]] for p in parts])
    assert torch.equal(both.values[:10], want) and (both.values[10:] == 0).all()
    assert both.ids[:10].tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2, 3] and (both.ids[10:] == -1).all()
    assert both.lengths == ((2, 3, 1, 4, 0) if known else None)
    assert both.size.sum() == 10
    videos, images = packed_uniform(torch.ones(6, 2), 3), packed_uniform(torch.ones(4, 2), 2)
    assert cat_tokens([videos, images]).lengths == (3, 3, 2, 2)
    assert cat_tokens([videos, videos]).lengths == 3


def test_split_is_the_inverse_of_cat():
    parts = [_ragged([2, 3]), packed_uniform(torch.ones(4, 3), 2), _ragged([1, 0])]
    both = cat_tokens(parts)
    for part, again in zip(parts, split_tokens(both.with_values(both.values * 2), parts), strict=True):
        assert torch.equal(again.values, part.values * 2) and again.lengths == part.lengths
        assert again.cu_seqlens is part.cu_seqlens and again.ids is part.ids


@pytest.mark.parametrize("known", [True, False])
def test_split_of_parts_with_tails(known):
    """cat moves the rows behind a tail up; split finds them again, and gives them their gradients alone."""
    parts = [_ragged([2, 3], tail=2, known=known), _ragged([1], tail=1, known=known), _ragged([4, 0], tail=3)]
    with HostReads() as reads:
        both = cat_tokens(parts)
        values = both.values.clone().requires_grad_()
        again = split_tokens(both.with_values(values * 2), parts)
        sum((part.values * (i + 1)).sum() for i, part in enumerate(again)).backward()
    assert not reads.found
    for part, back in zip(parts, again, strict=True):
        used = int(part.cu_seqlens[-1])
        assert torch.equal(back.values[:used], part.values[:used] * 2) and (back.values[used:] == 0).all()
        assert back.rows == part.rows and back.cu_seqlens is part.cu_seqlens and back.lengths == part.lengths
    assert values.grad[:, 0].tolist() == [2] * 5 + [4] + [6] * 4 + [0] * 6


def test_capacity():
    tokens = _ragged([2, 3])
    roomy = with_capacity(tokens, 8, 4)
    assert (
        roomy.cu_seqlens.tolist() == [0, 2, 5, 5, 5] and roomy.lengths is None and roomy.max_seqlen == roomy.rows == 8
    )
    assert torch.equal(roomy.values[:5], tokens.values) and (roomy.values[5:] == 0).all()
    assert roomy.ids.tolist() == [0, 1, 0, 1, 2, -1, -1, -1] and roomy.size.tolist() == [1] * 5 + [0] * 3
    assert roomy.places.tolist() == [0, 1, 0, 1, 2, 0, 0, 0] and tokens.places is tokens.ids
    for rows, sequences in ((4, 2), (5, 1)):
        with pytest.raises(ValueError, match="5 rows of 2 sequences do not fit"):
            with_capacity(tokens, rows, sequences)


def test_take_rows():
    tokens = _ragged([3, 0, 4, 2])
    with HostReads() as reads:
        some = take_rows(tokens, torch.tensor([0, 2, 5, 7, 8]), (2, 0, 1, 2))
    assert not reads.found
    assert some.cu_seqlens.tolist() == [0, 2, 2, 3, 5] and some.cu_seqlens.dtype == torch.int32
    assert torch.equal(some.values, tokens.values[[0, 2, 5, 7, 8]]) and some.ids.tolist() == [0, 2, 2, 0, 1]
    assert some.lengths == (2, 0, 1, 2) and some.max_seqlen == 2
    with HostReads() as reads:  # counts on the device: the last two rows are a tail
        roomy = take_rows(tokens, torch.tensor([0, 2, 5, 7, 8, 0, 3]), torch.tensor([2, 0, 1, 2]))
    assert not reads.found
    assert torch.equal(roomy.cu_seqlens, some.cu_seqlens) and roomy.lengths is None and roomy.max_seqlen == 7
    assert torch.equal(roomy.values[:5], some.values) and (roomy.values[5:] == 0).all()
    assert roomy.ids.tolist() == [0, 2, 2, 0, 1, -1, -1] and roomy.size.tolist() == [1] * 5 + [0] * 2


def test_nested():
    tokens = _ragged([2, 5, 1])
    nested = tokens.to_nested()
    assert [x.shape[0] for x in nested.unbind()] == [2, 5, 1]
    again = PackedTokens.from_nested(nested, max_seqlen=5)
    assert torch.equal(again.values, tokens.values) and torch.equal(again.cu_seqlens, tokens.cu_seqlens)


def test_pytree_and_keyword_names():
    tokens = _ragged([2, 5, 1])
    twice = pytree.tree_map(lambda x: x * 2, tokens)
    assert torch.equal(twice.values, tokens.values * 2) and twice.lengths == tokens.lengths
    assert tokens.flash_kwargs()["max_seqlen_q"] == 5 and tokens.hf_kwargs()["cu_seq_lens_k"] is tokens.cu_seqlens
    assert tokens.with_values(tokens.values[:, :1]).values.shape == (8, 1)


def test_host_lengths_are_a_tuple_to_whoever_reads_them():
    tokens = _ragged([2, 5, 1])
    assert isinstance(tokens.lengths, HostLengths) and tokens.lengths == (2, 5, 1) != tokens.group(3).lengths
    assert repr(tokens.lengths) == "(2, 5, 1)" and hash(tokens.lengths) == hash((2, 5, 1))
    assert pickle.loads(pickle.dumps(tokens)).lengths == [2, 5, 1] and tokens.lengths[1:] == (5, 1)
    assert (
        tokens.used == 8 and packed_uniform(torch.zeros(6, 2), 3).used == 6 and _ragged([2], known=False).used is None
    )


def test_gradients_through_conversions():
    x = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)

    def f(x):
        tokens = PackedTokens.from_padded(x, mask, total=5)
        return cat_tokens([tokens, tokens]).to_padded(4)[0]

    assert torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize("lengths", [[2, 0, 5, 1], [3, 3, 3, 3]])
def test_regroup_joins_neighbours(lengths):
    tokens = _ragged(lengths)
    joined = regroup(tokens, (1, 3))
    assert joined.values is tokens.values and joined.lengths == (lengths[0], sum(lengths[1:]))
    assert joined.cu_seqlens.tolist() == [0, lengths[0], sum(lengths)] and joined.max_seqlen == max(joined.lengths)
    for bad in (tokens, _ragged(lengths, known=False)):
        with pytest.raises(ValueError, match="counts must sum up"):
            regroup(bad, (1, 2) if bad is tokens else (1, 3))


def test_meta_and_compile():
    x, mask = torch.empty(2, 4, 3, device="meta"), torch.empty(2, 4, dtype=torch.bool, device="meta")
    tokens = PackedTokens.from_padded(x, mask, total=6)
    assert cat_tokens([tokens, tokens]).to_padded()[0].shape == (4, 4, 3)

    def f(values, cu):
        tokens = packed_ragged(values, cu)
        return tokens.with_values(tokens.values + 1)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([2, 3], [1, 5, 2]):
        tokens = _ragged(lengths)
        out = compiled(tokens.values, tokens.cu_seqlens)
        assert isinstance(out, PackedTokens) and torch.equal(out.ids, tokens.ids)
