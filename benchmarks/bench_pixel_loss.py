"""The loss of a pixel decoder over removed patches only.

    pytest benchmarks/bench_pixel_loss.py --benchmark-only [--full]

`eager` is MAE's: patchify all pixels, normalise every patch, then take those that were removed. MAE predicts every
patch and weighs by the mask; here both read the same prediction, of the removed patches alone.
"""

import pytest
import torch

from benchmarks.timing import PASSES, compiled, pass_of
from smaug import ops
from smaug.testing import relative_error

FRAMES, SIDE, PATCH = 8, 224, 16
GRID = SIDE // PATCH
N = FRAMES * GRID**2
PIXELS = 3 * PATCH**2


def smaug(pred, video, removed):
    return ops.pixel_loss(pred, video, removed, patch=PATCH)


def eager(pred, video, removed):
    patches = video.view(-1, FRAMES, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 2, 4, 6, 3, 5).reshape(-1, N, PIXELS)
    target = patches.float() / 255
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    target = target.gather(1, removed.long()[..., None].expand(-1, -1, PIXELS))
    return ((pred - target) ** 2).mean(-1).mean()


@pytest.mark.parametrize("provider", ["smaug", "eager", "eager_compiled"])
@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("ratio", [0.6, pytest.param(0.9, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [4, pytest.param(16, marks=pytest.mark.full)])
def test_pixel_loss(timed, device, batch, ratio, dtype, passed, provider):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (batch, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).to(device)
    _, removed = ops.random_mask(
        torch.arange(batch, device=device), (FRAMES, GRID**2), ops.keep_count(N, ratio), seed=0
    )
    pred = torch.randn(*removed.shape, PIXELS, generator=generator).to(device, dtype).requires_grad_()
    function = {"smaug": smaug, "eager": eager}.get(provider) or compiled(eager)
    run = lambda: function(pred, video, removed)  # noqa: E731
    with torch.no_grad():
        assert relative_error(run(), eager(pred.double(), video, removed)) < 1e-4
    size = removed.numel() * PIXELS
    least = {"forward": 1 + dtype.itemsize, "backward": 1 + 2 * dtype.itemsize, "step": 1 + 2 * dtype.itemsize}[passed]
    timed(
        *(
            pass_of(passed, run, [pred], torch.ones((), device=device)),
            f"{batch} clips, {removed.shape[1]} of {N} removed",
        ),
        dtype,
        least_bytes=least * size,
        countable=provider != "eager_compiled",
    )
