"""random_mask: the generator is Philox, counts are exact, and a row depends on nothing but its counter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smaug import ops
from smaug.ops.random_mask import philox
from smaug.testing import HostReads


def _words(counter, key):
    as_tensors = [torch.tensor([x]) for x in counter], [torch.tensor([x]) for x in key]
    return [f"{w.item():08x}" for w in philox(*as_tensors)]


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors."""
    ones = 0xFFFFFFFF
    assert _words([0] * 4, [0] * 2) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert _words([ones] * 4, [ones] * 2) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert _words(*pi) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_random_is_the_lowest_words():
    samples, n, keep = torch.tensor([3, 2**40 + 5]), 50, 13
    kept, _ = ops.random_mask(samples, (5, 10), keep, seed=2**63 + 9, draw=7, stream=1)
    for row, sample in zip(kept, samples.tolist(), strict=True):
        seed = 2**63 + 9
        word = [
            int(_words([i, 1 | 7 << 8, sample & 0xFFFFFFFF, sample >> 32], [seed & 0xFFFFFFFF, seed >> 32])[0], 16)
            for i in range(n)
        ]
        assert row.tolist() == sorted(sorted(range(n), key=lambda i: (word[i], i))[:keep])


@given(st.data())
def test_any_mask_is_the_docstrings(data):
    """Units sorted in Python by (word 0 of Philox, unit)."""
    f, rows, columns = (data.draw(st.integers(1, most)) for most in (4, 9, 9))
    kind, n = data.draw(st.sampled_from(["random", "tube", "block", "frame"])), rows * columns
    unit = {"tube": f, "frame": n}.get(kind, 1)
    keep = unit * data.draw(st.integers(1, f * n // unit))
    sample, seed = (data.draw(st.integers(0, 2**63 - 1)) for _ in range(2))
    draw, stream = data.draw(st.integers(0, 2**24 - 1)), data.draw(st.integers(0, 2))
    kept, removed = ops.random_mask(
        torch.tensor([sample]), (f, rows, columns), keep, kind=kind, seed=seed, draw=draw, stream=stream
    )

    def words(ids):
        low, high = ([torch.tensor(x & 0xFFFFFFFF), torch.tensor(x >> 32)] for x in (sample, seed))
        return [w.tolist() for w in philox((torch.tensor(ids), torch.tensor(stream | draw << 8), *low), tuple(high))]

    def lowest(ids, count):
        word = words(ids)[0]
        return [i for _, i in sorted((w, i) for i, w in enumerate(word))[:count]]

    if kind == "tube":
        want = [t * n + i for t in range(f) for i in lowest(range(n), keep // f)]
    elif kind == "frame":
        want = [t * n + i for t in lowest(range(f), keep // n) for i in range(n)]
    else:
        units = list(range(f * n))
        if kind == "block":
            b = max(1, min(rows, columns) // 4)
            w0, w1 = (w[0] for w in words([2**32 - 1])[:2])
            units = [(i % n // columns + w0 % b) // b * (columns // b + 2) + (i % columns + w1 % b) // b for i in units]
        want = lowest(units, keep)
    assert kept[0].tolist() == sorted(want)
    assert sorted(kept[0].tolist() + removed[0].tolist()) == list(range(f * n))


@pytest.mark.parametrize("kind", ["random", "tube", "block", "frame"])
@pytest.mark.parametrize("grid", [(1, 8, 8), (4, 3, 5), (3, 14, 14)])
def test_counts_order_and_independence(kind, grid):
    f, n = grid[0], grid[1] * grid[2]
    unit = {"tube": f, "frame": n}.get(kind, 1)
    for keep in {unit, f * n, f * n // 2 // unit * unit or unit}:
        samples = torch.arange(6) * 1000
        kept, removed = ops.random_mask(samples, grid, keep, kind=kind, seed=5)
        assert kept.dtype == removed.dtype == torch.int32
        assert kept.shape == (6, keep) and removed.shape == (6, f * n - keep)
        assert (kept.diff(dim=1) > 0).all() and (removed.diff(dim=1) > 0).all()
        assert (torch.cat([kept, removed], 1).sort(dim=1).values == torch.arange(f * n)).all()
        for split in (slice(0, 1), slice(2, 5)):
            assert torch.equal(ops.random_mask(samples[split], grid, keep, kind=kind, seed=5)[0], kept[split])


def test_kinds_look_as_they_should():
    samples = torch.arange(4)
    tube = ops.random_mask(samples, (4, 9), 12, kind="tube", seed=0)[0].view(4, 4, 3)
    assert (tube - torch.arange(4)[:, None] * 9 == tube[:, :1]).all()
    frame = ops.random_mask(samples, (4, 9), 18, kind="frame", seed=0)[0].view(4, 2, 9)
    assert (frame % 9 == torch.arange(9)).all()
    _, removed = ops.random_mask(samples, (2, 16, 16), 256, kind="block", seed=0)
    hole = torch.zeros(4, 512).scatter_(1, removed.long(), 1.0).view(4, 2, 16, 16)
    neighbours = (hole[..., 1:] == hole[..., :-1]).float().mean()
    assert neighbours > 0.75  # a random mask of half the patches gives 0.5
    assert (hole[:, 0] == hole[:, 1]).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["random", "tube", "block"])
def test_draw_seed_and_stream_change_the_mask(kind):
    make = lambda **kw: ops.random_mask(torch.arange(3), (2, 8, 8), 32, kind=kind, **{"seed": 1, **kw})[0]  # noqa: E731
    first = make()
    assert torch.equal(first, make(seed=torch.tensor(1), draw=torch.tensor(0)))
    for other in (make(draw=1), make(seed=2), make(seed=1 + 2**32), make(stream=2)):
        assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_every_patch_is_as_likely():
    kept, _ = ops.random_mask(torch.arange(4000), (1, 16), 4, seed=0)
    share = torch.bincount(kept.flatten().long(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 0.03  # four standard deviations


def test_keep_count():
    assert ops.keep_count(10, 0.9) == 1
    assert ops.keep_count(1568, 0.9) == 156
    assert ops.keep_count(64, 0.6) == 25
    assert ops.keep_count(5, 1.0) == 1
    assert ops.keep_count(5, 0.0) == 5


def test_refusals():
    samples = torch.arange(2)
    with pytest.raises(ValueError, match="multiple"):
        ops.random_mask(samples, (4, 9), 13, kind="tube", seed=0)
    with pytest.raises(ValueError, match="rows and columns"):
        ops.random_mask(samples, (4, 9), 12, kind="block", seed=0)
    with pytest.raises(ValueError, match="keep=0"):
        ops.random_mask(samples, (4, 9), 0, seed=0)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        ops.random_mask(samples, (4, 9), 12, seed=0, impl="triton")


def test_no_host_read_and_meta():
    with HostReads() as reads:
        ops.random_mask(torch.arange(3), (2, 8, 8), 32, kind="block", seed=1)
    assert not reads.found
    kept, removed = ops.random_mask(torch.empty(3, dtype=torch.int64, device="meta"), (2, 8, 8), 32, seed=1)
    assert kept.shape == (3, 32) and removed.shape == (3, 96)
