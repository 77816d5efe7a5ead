"""Masks leave out what they say, and a clip's mask depends on (seed, epoch, clip) alone."""

import pytest
import torch

from smaug import masks
from smaug.masks import TextMask, VideoMask

GRID = (4, 6, 6)
SAMPLES = torch.tensor([5, 0, 1_000_000_007, 7, 2**40 + 5])


def draw(mask, samples=SAMPLES, seed=3, epoch=0):
    return mask.draw(samples, GRID, seed=seed, epoch=epoch, impl="auto")


@pytest.mark.parametrize(
    ("kind", "ratio", "keep"),
    [
        ("random", 0.6, 57),  # of 144: 57.6
        ("block", 0.6, 57),
        ("tube", 0.6, 4 * 14),  # of 36: 14.4
        ("even", 0.6, 4 * 14),
        ("frame", 0.6, 36),  # of 4 frames: 1.6
        ("random", 0.0, 144),
        ("tube", 0.0, 144),
        ("even", 0.0, 144),
        ("random", 0.999, 1),
        ("tube", 0.999, 4),
        ("even", 0.999, 4),
        ("frame", 0.999, 36),
        ("frame", 0.5, 72),
    ],
)
def test_keep_counts(kind, ratio, keep):
    mask = VideoMask(ratio, kind)
    assert mask.keep(4, 36) == keep
    kept, removed = draw(mask)
    assert kept.shape == (5, keep) and removed.shape == (5, 144 - keep)
    assert kept.dtype == removed.dtype == torch.int32
    assert torch.equal(torch.cat([kept, removed], 1).sort(1).values, torch.arange(144, dtype=torch.int32).expand(5, -1))
    assert (kept.diff(dim=1) > 0).all() and (removed.diff(dim=1) > 0).all()


def test_ten_patches_at_nine_tenths_keep_one():
    assert VideoMask(0.9).keep(1, 10) == 1  # 10 * (1 - .9) is a little below 1


def test_tubes_are_the_same_places_and_frames_are_whole():
    kept, _ = draw(VideoMask(0.6, "tube"))
    places = kept.view(5, 4, 14) - 36 * torch.arange(4)[:, None]
    assert (places == places[:, :1]).all() and places.min() >= 0 and places.max() < 36
    kept, _ = draw(VideoMask(0.5, "frame"))
    frames = (kept // 36).view(5, 2, 36)
    assert (frames == frames[..., :1]).all()


def test_even_is_as_many_at_each_moment_in_other_places():
    samples = torch.arange(30)
    kept, removed = draw(VideoMask(0.6, "even"), samples)
    for ids, count in ((kept, 14), (removed, 22)):
        moments = (ids // 36).view(30, 4, count)
        assert (moments == torch.arange(4)[:, None]).all()
    places = (kept % 36).view(30 * 4, 14)
    assert len({tuple(row) for row in places.tolist()}) == 120  # no two moments of any clip alike
    hits = places.flatten().bincount(minlength=36)
    assert hits.min() > 25 and hits.max() < 70  # 46.7 expected of each place


@pytest.mark.parametrize("kind", ["random", "even", "tube", "frame", "block"])
def test_a_video_s_mask_is_its_own(kind):
    mask = VideoMask(0.5, kind)
    many = torch.arange(40)
    whole, _ = draw(mask, many)
    for split in ([7, 33], [1] * 40):
        assert torch.equal(torch.cat([draw(mask, part)[0] for part in many.split(split)]), whole)
    assert torch.equal(draw(mask, many.flip(0))[0], whole.flip(0))
    assert (whole != draw(mask, many, epoch=1)[0]).any() and (whole != draw(mask, many, seed=4)[0]).any()
    few = 6 if kind == "frame" else 20  # 2 of 4 frames: six ways
    assert len({tuple(row) for row in whole.tolist()}) >= few


def text(lengths, samples=None, ratio=0.5, seed=3, epoch=0):
    samples = list(range(len(lengths))) if samples is None else samples
    return [k.tolist() for k in TextMask(ratio).draw(lengths, samples, seed=seed, epoch=epoch)]


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.9, 1.0])
def test_words_that_stay(ratio):
    lengths = [1, 2, 3, 4, 5, 7, 10, 31, 7, 1]
    drawn = TextMask(ratio).draw(lengths, range(10), seed=0, epoch=0)
    for words, kept in zip(lengths, drawn, strict=True):
        assert kept.dtype == torch.int32 and len(kept) == max(1, words - round(ratio * words))
        assert (kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < words


def test_every_word_is_masked_at_times():
    hidden = [set(range(8)) - set(k) for k in text([8] * 400, ratio=0.25)]
    counts = [sum(word in h for h in hidden) for word in range(8)]
    assert min(counts) > 60 and max(counts) < 140  # 100 expected, of 400


def test_a_caption_s_mask_is_its_own():
    lengths = [6, 9, 6, 12, 9, 6, 30, 1] * 4
    samples = [7 * i + 2**35 for i in range(32)]
    whole = text(lengths, samples)
    assert [text([n], [s])[0] for n, s in zip(lengths, samples, strict=True)] == whole
    assert text(lengths[::-1], samples[::-1]) == whole[::-1]
    assert text(lengths[:5], samples[:5]) + text(lengths[5:], samples[5:]) == whole
    assert text(lengths, samples, epoch=1) != whole != text(lengths, samples, seed=4)
    assert len({tuple(k) for k in text([30] * 20)}) == 20
    assert text([], []) == []


def test_noise_is_uniform_and_repeats():
    def of(seed=3, step=7, stream=masks.PAIR_STREAM, count=20_000):
        return masks.noise(count, seed=seed, step=step, stream=stream, device=torch.device("cpu"))

    x = of()
    assert x.dtype == torch.float32 and x.min() > 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.var() - 1 / 12) < 0.003
    assert x.mul(20).long().bincount(minlength=20).sub(1000).abs().max() < 160  # five standard deviations
    assert torch.equal(of(), x) and torch.equal(of(count=5), x[:5])
    for other in (of(seed=4), of(seed=3 + 2**32), of(step=8), of(step=7 + 2**20), of(stream=masks.FRAME_STREAM)):
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 0.04


def test_video_and_words_do_not_share_numbers():
    assert masks.VIDEO_STREAM != masks.TEXT_STREAM
    samples = torch.arange(50)
    video, _ = VideoMask(0.5).draw(samples, (1, 1, 20), seed=0, epoch=0, impl="auto")
    same = [a == b for a, b in zip(video.tolist(), text([20] * 50, seed=0), strict=True)]
    assert not any(same)
