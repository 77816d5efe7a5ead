"""Kept-only equals dense: leaving tokens out gives what a dense encoder gives when nobody attends to them."""

import pytest
import torch
from torch.nn import functional as F

from smaug.masks import VideoMask
from smaug.model.position import resample_time
from smaug.model.video_encoder import VideoEncoder, VideoEncoderConfig
from smaug.testing import relative_error

COLOURS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def encoder(impl="auto", tubelet=2):
    torch.manual_seed(0)
    config = VideoEncoderConfig(
        width=48, depth=2, heads=3, image_size=24, patch=4, tubelet=tubelet, frames=4, **COLOURS
    )
    made = VideoEncoder(config, impl)
    for name, p in made.named_parameters():  # what starts as zeros or ones or next to nothing would hide a lost one
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))
        elif name in ("position", "time", "cls"):
            p.data = torch.randn_like(p)
    return made


def clips(count, frames, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 24, 24, 3), dtype=torch.uint8, generator=generator)


def draw(made, mask, video):
    keep, _ = mask.draw(torch.arange(len(video)), made.config.grid(video.shape[1]), seed=5, epoch=2, impl="reference")
    return keep


def dense(made, video, keep):
    """(B, 1 + all tokens, D): the textbook video transformer over every tube, the removed ones hidden as keys."""
    config = made.config
    b, times = len(video), config.times(video.shape[1])
    if video.shape[1] == 1:  # an image stands still
        video = video.expand(-1, config.tubelet, -1, -1, -1)
    mean, std = (torch.tensor(s)[:, None, None, None] for s in (config.mean, config.std))
    pixels = (video.permute(0, 4, 1, 2, 3) / 255 - mean) / std
    tube = (config.tubelet, config.patch, config.patch)
    x = F.conv3d(pixels, made.patch_embed.weight.view(-1, 3, *tube), made.patch_embed.bias, stride=tube)
    x = x.flatten(3).permute(0, 2, 3, 1) + resample_time(made.time, times)[:, None] + made.position
    x = torch.cat([made.cls.expand(b, 1, -1), x.flatten(1, 2)], 1)
    seen = torch.zeros(b, times * config.patches, dtype=torch.bool).scatter(1, keep.long(), True)
    seen = torch.cat([torch.ones(b, 1, dtype=torch.bool), seen], 1)
    for block in made.blocks:
        qkv = block.attention.qkv(block.norm1(x)).view(b, x.shape[1], 3, config.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        x = x + block.attention.proj(o.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    return made.norm(x)


RANDOM = [VideoMask(ratio) for ratio in (0.0, 0.3, 0.6, 0.95)]
OTHERS = [VideoMask(0.5, kind) for kind in ("tube", "block", "frame")]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("frames", [1, 4, 8])  # 8: more than the table of times has
@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("mask", RANDOM + OTHERS, ids=lambda m: f"{m.kind}-{m.ratio}")
def test_kept_only_equals_dense(mask, tubelet, frames, impl):
    made, video = encoder(impl, tubelet), clips(2, frames)
    keep = draw(made, mask, video)
    assert keep.shape[1] == mask.keep(made.config.times(frames), 36)
    encoded = made([(video, keep)])
    features, tokens = encoded.features, encoded.frames
    truth = dense(made, video, keep)
    truth = torch.cat([truth[:, :1], truth[:, 1:].gather(1, keep.long()[..., None].expand(-1, -1, 48))], 1)
    assert tokens.rows == 2 * (1 + keep.shape[1])
    assert torch.equal(tokens.ids.view(2, -1)[:, 1:], keep)
    assert relative_error(tokens.values, truth.flatten(0, 1)) < 2e-6
    assert relative_error(features, truth[:, 0]) < 2e-6

    g = torch.randn_like(truth)
    parameters = dict(made.named_parameters())
    got = torch.autograd.grad(tokens.values, parameters.values(), g.flatten(0, 1))
    want = torch.autograd.grad(truth, parameters.values(), g)
    for name, a, b in zip(parameters, got, want, strict=True):
        assert relative_error(a, b) < 2e-5, name


def test_removed_pixels_change_nothing():
    made, video = encoder(), clips(2, 4)
    keep = draw(made, VideoMask(0.6), video)
    kept = torch.zeros(2, 2 * 36, dtype=torch.bool).scatter_(1, keep.long(), True).view(2, 2, 1, 6, 1, 6, 1, 1)
    pixels = kept.expand(-1, -1, 2, -1, 4, -1, 4, 3).reshape(video.shape)
    other = torch.where(pixels, video, 255 - video)
    assert torch.equal(made([(video, keep)]).features, made([(other, keep)]).features)
    assert not torch.equal(made([(video, keep)]).features, made([(255 - other, keep)]).features)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_videos_and_images_in_one_batch_equal_each_alone(impl):
    made = encoder(impl)
    groups = [(v, draw(made, VideoMask(0.5), v)) for v in (clips(2, 4), clips(4, 1, seed=2), clips(1, 8, seed=3))]
    encoded = made(groups)
    features, tokens = encoded.features, encoded.frames
    assert tokens.cu_seqlens.diff().tolist() == [37] * 2 + [19] * 4 + [73]
    one = [made([(v[i : i + 1], ids[i : i + 1])]) for v, ids in groups for i in range(len(v))]
    for alone in ([made([group]) for group in groups], one):
        torch.testing.assert_close(features, torch.cat([e.features for e in alone]), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(tokens.values, torch.cat([e.frames.values for e in alone]), atol=2e-6, rtol=1e-5)


def test_bf16_keeps_the_stream_in_bf16():
    made, video = encoder(), clips(2, 4)
    group = (video, draw(made, VideoMask(0.5), video))
    with torch.no_grad():
        truth = made([group]).features
        with torch.autocast("cpu", torch.bfloat16):
            assert made.embed(*group).values.dtype == torch.bfloat16
            assert relative_error(made([group]).features, truth) < 0.02


def test_refusals():
    with pytest.raises(ValueError, match="not a multiple of patch"):
        VideoEncoder(VideoEncoderConfig(image_size=60, patch=16))
    with pytest.raises(ValueError, match="not a multiple of 5 heads"):
        VideoEncoder(VideoEncoderConfig(width=48, heads=5))
    with pytest.raises(ValueError, match="3 frames do not fill tubelets of 2"):
        encoder().config.grid(3)
