"""Other tile sizes than a launcher's own, from a file, give the same results: grids and workspaces follow them."""

import json

import pytest
import torch

from smaug import ops
from smaug.kernels import launch
from smaug.ops.warmup import OnKernels
from smaug.testing import offsets
from smaug.tokens import packed_ragged

LENGTHS = (3, 40, 0, 37)
SMALLER = {name: [dict.fromkeys(settings, 16)] for name, settings in launch.SETTINGS.items()}
SMALLER["attention_backward_queries"] = [
    {"BLOCK_M": 32, "BLOCK_N": 16}
]  # unlike dk's: the sums of biases are laid out by it


def leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def attention():
    q, k, v = (leaf(sum(LENGTHS), 2, 16, seed=i) for i in range(3))
    segment, key = leaf(4, 2, seed=3), leaf(sum(LENGTHS), seed=4)
    ids, cu = torch.tensor([[1, 3], [0, 1], [2, -1], [3, 3]], dtype=torch.int32), offsets(LENGTHS)
    o, scores = ops.attention(q, k, v, cu, kv_ids=ids, segment_bias=segment, key_bias=key, key_scores="mean")
    return o, scores, *torch.autograd.grad((o * leaf(*o.shape, seed=5).detach()).sum(), (q, k, v, segment, key))


def patch_embed():
    video = torch.randint(256, (3, 4, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video = (video / 255).requires_grad_()
    ids, removed = ops.random_mask(torch.arange(3), (4, 2, 2), 9, seed=0)
    weight, bias, position, prefix = leaf(40, 192), leaf(40), leaf(16, 40), leaf(1, 40)
    image = dict(patch=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    tokens = ops.patch_embed(video, ids, weight, bias, **image, position=position, prefix=prefix)
    out = (tokens.values * leaf(*tokens.values.shape, seed=1).detach()).sum()
    pred = leaf(3, 7, 192)
    loss = ops.pixel_loss(pred, video.detach(), removed, patch=8)
    grads = torch.autograd.grad(out, (weight, bias, position, prefix, video))
    return tokens.values, loss, *grads, *torch.autograd.grad(loss, pred)


def tokens():
    x, scores, fill = leaf(sum(LENGTHS), 40), leaf(sum(LENGTHS), seed=1), leaf(40, seed=2)
    packed = packed_ragged(x, offsets(LENGTHS), lengths=LENGTHS)
    by_ratio, _, _ = ops.select_tokens(packed, scores.abs(), keep=0.3, prefix=1)
    by_mass = ops.select_tokens(packed, scores.abs(), mass=0.5, prefix=1, fuse="sum", capacity=50)[0]
    grid = ops.scatter_tokens(x, torch.arange(40).repeat(2), 50, fill, offsets((40, 40)))
    back = ops.gather_tokens(grid, torch.arange(33).repeat(2, 1))
    out = sum((y * leaf(*y.shape, seed=3).detach()).sum() for y in (by_ratio.values, by_mass.values, back))
    return by_ratio.values, by_mass.values, back, *torch.autograd.grad(out, (x, scores, fill))


@pytest.mark.parametrize("call", [attention, patch_embed, tokens], ids=lambda call: call.__name__)
def test_other_tiles_same_results(call, monkeypatch, tmp_path):
    with OnKernels():
        wanted = call()
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(SMALLER))
    monkeypatch.setenv(launch.VARIABLE, str(path))
    with OnKernels():
        got = call()
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
