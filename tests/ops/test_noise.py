"""noise: the numbers are Philox's, never 0 or 1, and the same for every shape."""

import pytest
import torch

from smaug.ops.noise import noise
from smaug.ops.random_mask import philox
from smaug.testing import HostReads


@pytest.mark.parametrize("seed", [0, 3 + 2**32, 2**64 - 1, -1])
def test_numbers(seed):
    """seed and draw beyond 32 bits; the words as the docstring says."""
    key, zero = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)), torch.tensor(0)
    word = philox((torch.arange(6), torch.tensor(2 | 7 << 8), zero, zero), key)[0]
    x = noise(torch.empty(2, 3), seed=seed, draw=7, stream=2)
    assert x.dtype == torch.float32 and x.shape == (2, 3)
    assert x.flatten().tolist() == [((w >> 9) + 0.5) / 2**23 for w in word.tolist()]
    assert torch.equal(noise(torch.empty(5, dtype=torch.int8), seed=seed, draw=7, stream=2), x.flatten()[:5])


@pytest.mark.parametrize("draw", [0, 7, 2**24 - 1, 2**31 + 5])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_draw_on_the_device_gives_the_same_numbers(draw, impl):
    def drawn(draw):
        return noise(torch.empty(5), seed=3 + 2**40, draw=draw, stream=2, impl=impl)

    there = torch.tensor([9, draw])
    assert torch.equal(drawn(there[1]), drawn(draw)) and not torch.equal(drawn(there[0]), drawn(draw))


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF, 0xFFFFFF00, 0x80000000])
def test_it_never_reaches_its_ends(monkeypatch, word):
    """Its double logarithm would be infinite there."""
    monkeypatch.setattr("smaug.ops.noise.philox", lambda counter, key: (torch.full_like(counter[0], word),))
    x = noise(torch.empty(3), seed=0)
    assert (x > 0).all() and (x < 1).all() and (-torch.log(-torch.log(x))).isfinite().all()


def test_no_host_read_meta_and_registration():
    there = torch.tensor(2)
    with HostReads() as reads:
        noise(torch.empty(9), seed=1)
        noise(torch.empty(9), seed=1, draw=there)
    assert not reads.found
    assert [name for name in reads.launched if name not in ("aten::empty", "aten::detach")] == ["smaug::noise"] * 2
    assert noise(torch.empty(2, 0, device="meta"), seed=1).shape == (2, 0)
    for draw in ((), (there,)):
        torch.library.opcheck(torch.ops.smaug.noise, (torch.empty(4), 3, 2, 1, *draw))
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        noise(torch.empty(3), seed=0, impl="triton")
