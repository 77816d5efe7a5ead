"""Which frames, and which part of them, as functions of drawn numbers alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smaug.data.frames import (
    Crop,
    FrameSampler,
    at_rate,
    draw_crop,
    head_tail,
    in_views,
    tells_sides,
    uniform_clips,
)

KINDS = ("random", "middle", "head_tail", "clips", "fps", "multi_resolution")


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300),
    frames=st.sampled_from([2, 4, 8, 12]),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_every_sampler_gives_frames_of_the_clip(kind, n, frames, seed):
    sampler = FrameSampler(kind)
    rng = None if seed is None else np.random.default_rng(seed)
    pick = sampler.pick(frames, 1, rng)
    chosen = pick(np.arange(n) / 25)
    assert len(chosen) == frames and all(0 <= i < n for i in chosen)
    assert chosen == pick(np.arange(n) / 25)  # asked again, as when a file had promised another number of frames
    if kind in ("random", "middle", "head_tail", "fps"):
        assert chosen == sorted(chosen)


def test_middle_is_not_drawn():
    assert FrameSampler("middle").pick(4, rng=np.random.default_rng(3))(np.arange(12)) == [1, 4, 7, 10]


def test_head_tail():
    assert head_tail(12, 4, None) == [1, 4, 7, 10]
    seen = Counter()
    for seed in range(2000):
        chosen = head_tail(9, 4, np.random.default_rng(seed).random(4))
        assert len(set(chosen)) == 4 and [i < 4 for i in chosen] == [True, True, False, False]
        seen[tuple(chosen[:2])] += 1
    assert len(seen) == 6 and min(seen.values()) > 270  # any two of the first four are equally likely
    assert head_tail(1, 3, np.array([0.9, 0.9, 0.9])) == [0, 0, 0]


def test_uniform_clips():
    assert uniform_clips(40, 2, 4, 2, [0.0, 0.0]) == [0, 2, 4, 6, 20, 22, 24, 26]
    assert uniform_clips(40, 2, 4, 2, [0.999, 0.999]) == [13, 15, 17, 19, 33, 35, 37, 39]
    assert uniform_clips(5, 1, 4, 2, [0.5]) == [0, 2, 4, 4]
    with pytest.raises(ValueError, match=r"8 frames cannot be shared among 3 clips; change --data\.sampler\.clips"):
        FrameSampler("clips", clips=3).pick(8)


def test_frames_at_a_rate_are_those_shown_then():
    uneven = np.array([0.0, 0.4, 0.5, 1.1, 2.0, 3.9])  # a frame is shown until the next one
    assert at_rate(uneven, 2.0, 4, 0.0) == [0, 2, 2, 3]
    assert at_rate(uneven, 1.0, 8, 0.7) == [0, 2, 4, 4, 5, 5, 5, 5]  # longer than the clip: its last is repeated
    assert at_rate(np.arange(50) / 25, 5.0, 4, 1.0) == [34, 39, 44, 49]
    assert at_rate(np.arange(1000) * 1001 / 30000, 30000 / 1001, 5, 0.0) == [0, 1, 2, 3, 4]


def test_multi_resolution_is_a_long_and_a_short_view():
    sampler = FrameSampler("multi_resolution", share=0.25)
    assert sampler.pick(8)(np.arange(64)) == [7, 23, 39, 55, 25, 29, 33, 37]
    starts = set()
    for seed in range(50):
        chosen = sampler.pick(8, rng=np.random.default_rng(seed))(np.arange(64))
        assert [i // 16 for i in chosen[:4]] == [0, 1, 2, 3] and chosen[7] - chosen[4] < 16
        starts.add(chosen[4])
    assert len(starts) > 20


@given(st.floats(0.05, 1.0), st.floats(0.5, 2.0), st.integers(2, 4000), st.integers(2, 4000))
def test_a_crop_lies_in_the_frame(area, ratio, height, width):
    tall, wide = Crop(area, ratio, 0.3, 0.9).shares(height, width)
    assert 0 < tall <= 1 and 0 < wide <= 1
    if tall < 1 and wide < 1:
        assert tall * wide == pytest.approx(area) and wide * width / (tall * height) == pytest.approx(ratio)


def test_drawn_crops_fill_their_range():
    crops = [draw_crop(np.random.default_rng(seed), (0.5, 1.0)) for seed in range(500)]
    for values, low, high in (
        ([c.area for c in crops], 0.5, 1.0),
        ([c.ratio for c in crops], 0.75, 4 / 3),
        ([c.y for c in crops], 0.0, 1.0),
    ):
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high


def test_captions_that_tell_sides():
    assert tells_sides(["a dog", "It runs to the LEFT."]) and tells_sides(["rightmost car"]) and tells_sides(["left"])
    assert not tells_sides(["a bright light", "cleft", "a dog"])


@pytest.mark.parametrize(
    "frames, view, order",
    [
        (8, 4, [0, 2, 4, 6, 1, 3, 5, 7]),
        (8, 2, [0, 4, 1, 5, 2, 6, 3, 7]),
        (12, 4, [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]),
        (4, 4, [0, 1, 2, 3]),
        (8, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 4, [0]),
    ],
)
def test_in_views(frames, view, order):
    assert in_views(list(range(frames)), view) == order
