"""From uint8 frames to the tokens that stay, forward and backward.

    pytest benchmarks/bench_patch_embed.py --benchmark-only [--full]

The rivals: embed every patch and then choose (`conv_then_gather`, what most code does), and choose first, in plain
PyTorch (`gather_then_linear`). All give the same tokens, which is checked first.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.timing import compiled, pass_of
from smaug import ops
from smaug.testing import relative_error

MEAN, STD = (0.48, 0.45, 0.40), (0.22, 0.23, 0.25)
FRAMES, SIDE, PATCH, WIDTH = 8, 224, 16, 768
GRID = SIDE // PATCH


def smaug(video, ids, weight, bias):
    return ops.patch_embed(video, ids, weight, bias, patch=PATCH, mean=MEAN, std=STD).values.view(*ids.shape, -1)


def normalised(pixels, dtype, last):
    """(x / 255 - mean) / std; the channels are the last axis, or the third last."""
    mean, std = (torch.tensor(s, device=pixels.device) for s in (MEAN, STD))
    if not last:
        mean, std = mean[:, None, None], std[:, None, None]
    return ((pixels / 255 - mean) / std).to(dtype)


def conv_then_gather(video, ids, weight, bias):
    batch = len(video)
    pixels = normalised(video.permute(0, 1, 4, 2, 3).flatten(0, 1), weight.dtype, last=False)
    every = F.conv2d(pixels, weight.view(-1, 3, PATCH, PATCH), bias, stride=PATCH).flatten(2).transpose(1, 2)
    every = every.reshape(batch, -1, WIDTH)
    return every.gather(1, ids.long()[..., None].expand(-1, -1, WIDTH))


def gather_then_linear(video, ids, weight, bias):
    patches = (
        video.view(-1, FRAMES, GRID, PATCH, GRID, PATCH, 3).transpose(3, 4).reshape(len(video), -1, PATCH * PATCH * 3)
    )
    kept = patches.gather(1, ids.long()[..., None].expand(-1, -1, patches.shape[2]))
    pixels = normalised(kept.view(*ids.shape, PATCH, PATCH, 3), weight.dtype, last=True)
    return F.linear(pixels.movedim(-1, -3).flatten(2), weight, bias)


FUNCTIONS = {f.__name__: f for f in (smaug, conv_then_gather, gather_then_linear)}


@pytest.mark.parametrize("provider", ["smaug", "conv_then_gather", "conv_then_gather_compiled", "gather_then_linear"])
@pytest.mark.parametrize("passed", ["forward", "step"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("ratio", [0.6, 0.9])
@pytest.mark.parametrize("batch", [4, pytest.param(16, marks=pytest.mark.full)])
def test_patch_embed(timed, device, batch, ratio, dtype, passed, provider):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (batch, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).to(device)
    keep = ops.keep_count(FRAMES * GRID**2, ratio)
    ids, _ = ops.random_mask(torch.arange(batch, device=device), (FRAMES, GRID, GRID), keep, seed=0)
    weight = (torch.randn(WIDTH, 3 * PATCH**2, generator=generator) / 28).to(device, dtype).requires_grad_()
    bias = torch.zeros(WIDTH, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(*ids.shape, WIDTH, generator=generator).to(device, dtype)
    embed = FUNCTIONS.get(provider) or compiled(conv_then_gather)
    run = lambda: embed(video, ids, weight, bias)  # noqa: E731
    with torch.no_grad():
        truth = conv_then_gather(video, ids, weight.double(), bias.double())
        assert relative_error(run(), truth) < (1e-5 if dtype == torch.float32 else 1e-2)
    shape = f"{batch} clips, {FRAMES} frames of {SIDE}, patch {PATCH}, {keep} of {FRAMES * GRID**2} kept, width {WIDTH}"
    pixels, rows = ids.numel() * 3 * PATCH**2, (grad.numel() + weight.numel()) * dtype.itemsize
    timed(
        *(pass_of(passed, run, (weight, bias), grad), shape, dtype),
        least_bytes=(pixels + rows) * (2 if passed == "step" else 1),
        countable=provider != "conv_then_gather_compiled",
    )
