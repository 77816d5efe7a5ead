"""Which frames of a clip, and which part of them: samplers, random-resized crops and flips.

A sampler returns a `Pick`: a function from the times of a clip's frames, (n,) float64 seconds from the first one, to
the indices wanted. Nothing here reads a file: all of it is a function of the numbers drawn for (seed, epoch, sample).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Pick = Callable[[np.ndarray], Sequence[int]]  # times of the frames (n,), n > 0, seconds -> indices of the wanted ones


@dataclass(frozen=True)
class FrameSampler:
    """Which frames of a video are trained on; an evaluation takes the middle of whatever is random here."""

    kind: Literal["random", "middle", "head_tail", "clips", "fps", "multi_resolution"] = "random"
    fps: float = 2.0  # frames a second, of `fps`
    stride: int = 1  # frames from one to the next inside a clip, of `clips`
    clips: int = 2  # evenly spaced clips, of `clips`; it divides the number of frames
    share: float = 0.25  # of the clip's length that the short view sees, of `multi_resolution`

    def __post_init__(self) -> None:
        if not all(number > 0 for number in (self.fps, self.stride, self.clips)):
            raise ValueError("--data.sampler.fps, --data.sampler.stride and --data.sampler.clips must be above 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"--data.sampler.share {self.share:g} is no share of a clip; it is above 0 and at most 1")

    def pick(self, frames: int, view: int = 1, rng: np.random.Generator | None = None) -> Pick:
        """F = `frames` indices; with `rng` at random, else the middle ones; `view` of them together, see `in_views`.

        random: one frame of each of F equal intervals (TSN, Wang et al. 2016; Singularity); middle: always its middle.
        head_tail: half of the frames from the first half of the clip, half from the second, without repeats where there
        are enough (ALPRO, Li et al. 2022).
        clips: `clips` runs of frames `stride` apart, evenly spaced. fps: frames at `fps` from some moment on; a short
        clip repeats its last. multi_resolution: F / 2 frames from all of the clip, then F / 2 from a `share` of it, the
        long and the short view of HiTeA (Ye et al. 2023); our reading, since its code is not public.
        """
        if self.kind == "clips" and frames % self.clips:
            raise ValueError(f"{frames} frames cannot be shared among {self.clips} clips; change --data.sampler.clips")
        draws = rng.random(frames + 1) if rng is not None and self.kind != "middle" else None
        middle = np.full(frames + 1, 0.5) if draws is None else draws

        def pick(times: np.ndarray) -> list[int]:
            n = len(times)
            if self.kind in ("random", "middle"):
                chosen = middle_segments(n, frames) if draws is None else random_segments(n, frames, draws[:frames])
                return in_views(chosen, view)
            if self.kind == "head_tail":
                return in_views(head_tail(n, frames, None if draws is None else draws[:frames]), view)
            if self.kind == "clips":
                return uniform_clips(n, self.clips, frames // self.clips, self.stride, middle[: self.clips])
            if self.kind == "fps":
                return in_views(at_rate(times, self.fps, frames, middle[0]), view)
            whole, part = frames - frames // 2, frames // 2
            length = max(1, round(n * self.share))
            first = int(middle[frames] * (n - length + 1))
            if draws is None:
                return middle_segments(n, whole) + [first + i for i in middle_segments(length, part)]
            return random_segments(n, whole, draws[:whole]) + [
                first + i for i in random_segments(length, part, draws[whole:frames])
            ]

        return pick


def every_frame(times: np.ndarray) -> Sequence[int]:
    return range(len(times))


def random_segments(n: int, frames: int, offsets: Sequence[float] | np.ndarray) -> list[int]:
    """One frame from each of `frames` equal intervals of [0, n), at `offsets` (frames,) in [0, 1): ascending indices.

    With offsets from a uniform generator every frame of an interval is equally likely. A clip of fewer than `frames`
    frames gives all of them and then repeats its last.
    """
    lows, highs = _segments(n, frames)
    return [low + int(u * (high - low)) for low, high, u in zip(lows, highs, offsets, strict=True)]


def middle_segments(n: int, frames: int) -> list[int]:
    """The middle frame of each of `frames` equal intervals of [0, n), for evaluation: ascending indices.

    Of two middle frames the earlier. A clip of fewer than `frames` frames gives all of them and then repeats its last.
    """
    return [(low + high - 1) // 2 for low, high in zip(*_segments(n, frames), strict=True)]


def _segments(n: int, frames: int) -> tuple[list[int], list[int]]:
    """First index of each interval, and the one after its last."""
    if n < frames:
        lows = [min(i, n - 1) for i in range(frames)]
        return lows, [low + 1 for low in lows]
    edges = [n * i // frames for i in range(frames + 1)]
    return edges[:-1], edges[1:]


def head_tail(n: int, frames: int, offsets: np.ndarray | None) -> list[int]:
    """ceil(frames / 2) indices below n / 2 and the rest above, each half ascending; without `offsets` (frames,) evenly.

    Any set of that many frames of a half is equally likely: the indices are those of the smallest random keys.
    """
    head, tail = frames - frames // 2, frames // 2
    halves = [(0, max(1, n // 2), head), (min(n // 2, n - 1), n - min(n // 2, n - 1), tail)]
    chosen: list[int] = []
    at = 0
    for first, length, count in halves:
        if offsets is None or length <= count:
            chosen += [first + i for i in middle_segments(length, count)] if count else []
        else:
            # Floyd's sampling: `count` draws for a subset without repeats, whatever the length
            taken: set[int] = set()
            for top, u in zip(range(length - count, length), offsets[at : at + count], strict=True):
                i = int(u * (top + 1))
                taken.add(top if i in taken else i)
            chosen += sorted(first + i for i in taken)
        at += count
    return chosen


def uniform_clips(n: int, clips: int, frames: int, stride: int, offsets: Sequence[float] | np.ndarray) -> list[int]:
    """`clips` runs of `frames` indices `stride` apart, one run in each of `clips` equal intervals where it fits.

    `offsets` (clips,) in [0, 1) place each run in the room that its interval leaves; the last frame is repeated where a
    run would leave the clip.
    """
    span = (frames - 1) * stride + 1
    chosen: list[int] = []
    for low, high, u in zip(*_segments(n, clips), offsets, strict=True):
        start = min(low + int(u * max(1, high - low - span + 1)), max(0, n - span))
        chosen += [min(start + i * stride, n - 1) for i in range(frames)]
    return chosen


def at_rate(times: np.ndarray, fps: float, frames: int, offset: float) -> list[int]:
    """The frames shown at `frames` moments 1 / fps s apart; `offset` in [0, 1) places the window in the clip."""
    length = (frames - 1) / fps
    start = offset * max(0.0, float(times[-1]) - length)
    moments = start + np.arange(frames) / fps
    # 1 us: a moment that is a frame's own time must not fall before it by rounding
    return np.clip(np.searchsorted(times, moments + 1e-6, side="right") - 1, 0, len(times) - 1).tolist()


def in_views(indices: list[int], view: int) -> list[int]:
    """F in the order of time -> F / view views of the whole clip, one after the other, each in that order.

    With F = 8 and views of 4 frames: 0 2 4 6, 1 3 5 7. Views of one frame stay as they are.
    """
    if view == 1 or len(indices) == 1:
        return indices
    return np.asarray(indices).reshape(view, -1).T.reshape(-1).tolist()


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of the upright frame that becomes the whole square: random-resized crop (Szegedy et al. 2015)."""

    area: float  # share of the frame's area, in (0, 1]
    ratio: float  # width / height of the part
    y: float  # where it lies in the room that is left, 0 top to 1 bottom
    x: float  # 0 left to 1 right

    def shares(self, height: float, width: float) -> tuple[float, float]:
        """Height and width of the part as shares of the frame's; a part that is too long is cut to the frame."""
        area = self.area * height * width
        return min(1.0, math.sqrt(area / self.ratio) / height), min(1.0, math.sqrt(area * self.ratio) / width)


def draw_crop(rng: np.random.Generator, area: tuple[float, float]) -> Crop:
    """`area`: least and greatest share of the frame. The ratio is log-uniform in 3/4 .. 4/3, as in torchvision."""
    a, r, y, x = rng.random(4)
    return Crop(area[0] + a * (area[1] - area[0]), math.exp(math.log(4 / 3) * (2 * r - 1)), y, x)


SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def tells_sides(texts: Sequence[str]) -> bool:
    """Whether a caption or an answer says left or right, so that a flipped picture would make it untrue."""
    return any(SIDES.search(text) for text in texts)
