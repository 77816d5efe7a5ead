"""Batches. What a batch holds is a function of (seed, epoch, index) alone, so a run can stop and go on anywhere."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.clips import Clips, DataConfig, check_share
from smaug.data.decode import DecodeError, middle_segments, random_segments
from smaug.data.manifest import ManifestError, Skip
from smaug.masks import MLM_STREAM, TextMask
from smaug.tokens import PackedTokens

AHEAD = 2  # batches made ahead of the step


@dataclass(frozen=True)
class VisualGroup:
    """Clips of one shape: videos of F frames, or images, which are videos of one."""

    video: Tensor  # (B, F, H, W, 3) uint8
    samples: Tensor  # (B,) int64, numbers of the clips in their data set


@dataclass(frozen=True)
class Batch:
    """B pairs. Clips stand in the order of the groups; captions, keys and names in the same order."""

    groups: tuple[VisualGroup, ...]
    words: PackedTokens  # whole captions: values (T,) int64 word numbers, ids (T,) int32 places, see `text.pack`
    contrast: PackedTokens  # what the contrast sees of them; the same object where nothing is masked
    masked: PackedTokens | None  # with [MASK] for the words that mlm asks for
    masked_rows: Tensor  # (n,) int64, their rows in `masked`
    masked_labels: Tensor  # (n,) int64, which words they were
    masked_counts: tuple[int, ...]  # how many of them each caption has
    video_keys: Tensor  # (B,) int64, equal for the same clip
    caption_keys: Tensor  # (B,) int64, equal for the same caption
    epoch: int
    step: int
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Batch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        words = tree_map_only(Tensor, move, self.words)
        return replace(
            self,
            groups=tuple(VisualGroup(move(g.video), move(g.samples)) for g in self.groups),
            words=words,
            # one object stays one object: the step encodes each once
            contrast=words if self.contrast is self.words else tree_map_only(Tensor, move, self.contrast),
            masked=tree_map_only(Tensor, move, self.masked),
            masked_rows=move(self.masked_rows),
            masked_labels=move(self.masked_labels),
            video_keys=move(self.video_keys),
            caption_keys=move(self.caption_keys),
        )


class Loader:
    """Training batches of a set of clips.

    Every epoch is one permutation of all clips; what does not fill a batch at its end is left out. A clip that cannot
    be decoded is listed in `skipped` and another takes its place; above `config.max_bad` of all clips, ManifestError.
    """

    def __init__(
        self,
        clips: Clips,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        frames: int,
        view: int = 1,
        max_words: int,
        text_mask: TextMask,
        mlm_ratio: float = 0.0,
        seed: int,
    ) -> None:
        self.clips, self.config, self.frames, self.view = clips, config, frames, view
        self.text_mask, self.seed = text_mask, seed
        self.size = min(config.batch, len(clips))
        self.batches_per_epoch = len(clips) // self.size
        self.skipped: dict[int, Skip] = {}
        self.cls = text.number(tokenizer, text.CLS)
        self.mask = text.number(tokenizer, text.MASK)
        self.mlm_mask = TextMask(mlm_ratio, "mask")
        numbers: dict[str, int] = {}
        # All captions are tokenised once, in one parallel call, before the first step.
        self.captions = [[numbers.setdefault(c, len(numbers)) for c in s.captions] for s in clips.samples]
        self.words = text.encode(tokenizer, list(numbers), max_words)
        self.pool = ThreadPoolExecutor(config.workers)

    def batch(self, step: int) -> Batch:
        """The batch of a training step, counted from 0."""
        epoch, index = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.clips))
        places = range(index * self.size, (index + 1) * self.size)
        if self.clips.frames is None:
            read = list(self.pool.map(lambda place: self._read(order, place, epoch), places))
        else:
            read = [self._read(order, place, epoch) for place in places]
        read.sort(key=lambda pair: pair[1].shape[0], reverse=True)  # stable: videos, then images
        numbers = [number for number, _ in read]

        groups: list[VisualGroup] = []
        for count in dict.fromkeys(frames.shape[0] for _, frames in read):
            members = [(number, frames) for number, frames in read if frames.shape[0] == count]
            video = torch.from_numpy(np.stack([frames for _, frames in members]))
            groups.append(VisualGroup(video, torch.tensor([number for number, _ in members])))

        captions = [self.captions[n][epoch % len(self.captions[n])] for n in numbers]
        words = [self.words[c] for c in captions]
        whole = text.pack(words, self.cls)
        contrast, masked, rows, labels = whole, None, [], []
        counts: tuple[int, ...] = ()
        drawn: dict[str, Any] = {
            "lengths": [len(w) for w in words],
            "samples": numbers,
            "seed": self.seed,
            "epoch": epoch,
        }
        if self.text_mask.ratio > 0:
            mask = self.mask if self.text_mask.kind == "mask" else None
            contrast = text.pack(words, self.cls, self.text_mask.draw(**drawn), mask)
        if self.mlm_mask.ratio > 0:
            kept = self.mlm_mask.draw(**drawn, stream=MLM_STREAM)
            masked = text.pack(words, self.cls, kept, self.mask)
            counts = tuple(len(w) - len(stay) for w, stay in zip(words, kept, strict=True))
            first = 1
            for w, stay in zip(words, kept, strict=True):
                gone = sorted(set(range(len(w))) - set(stay.tolist()))
                rows += [first + place for place in gone]
                labels += [w[place] for place in gone]
                first += 1 + len(w)
        return Batch(
            groups=tuple(groups),
            words=whole,
            contrast=contrast,
            masked=masked,
            masked_rows=torch.tensor(rows, dtype=torch.int64),
            masked_labels=torch.tensor(labels, dtype=torch.int64),
            masked_counts=counts,
            video_keys=torch.tensor(numbers),
            caption_keys=torch.tensor(captions),
            epoch=epoch,
            step=step,
            names=tuple(self.clips.samples[n].name for n in numbers),
        )

    def _read(self, order: np.ndarray, place: int, epoch: int) -> tuple[int, np.ndarray]:
        """The clip at a place of the epoch's order, or the next one after half the order that can be decoded."""
        half = len(order) // 2
        for at in (place, *range(place + half, place + half + len(order))):
            number = int(order[at % len(order)])
            if number in self.skipped:
                continue
            offsets = np.random.default_rng([self.seed, epoch, number]).random(self.frames)
            pick = functools.partial(random_segments, frames=self.frames, offsets=offsets)
            try:
                return number, in_views(self.clips.read(number, pick), self.view)
            except DecodeError as error:
                self.skipped[number] = Skip(self.clips.samples[number].name, error.reason)
                everything = [*self.clips.skipped, *self.skipped.values()]
                check_share(everything, len(self.clips) + len(self.clips.skipped), self.config.max_bad)
        raise ManifestError(f"none of the {len(order)} files can be decoded")  # reached if --data.max-bad is 1

    def ahead(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Batches of steps first .. last - 1, made in a thread of their own while the step before them computes."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        stopped = threading.Event()

        def produce() -> None:
            for step in range(first, last):
                try:
                    made: Batch | BaseException = self.batch(step)
                except BaseException as error:  # it belongs to the thread that asked for the batch
                    made = error
                while not stopped.is_set():
                    try:
                        ready.put(made, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set() or isinstance(made, BaseException):
                    return

        thread = threading.Thread(target=produce, name="smaug-loader", daemon=True)
        thread.start()
        try:
            for _ in range(first, last):
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                yield made
        finally:
            stopped.set()
            thread.join()


def in_views(frames: np.ndarray, view: int) -> np.ndarray:
    """(F, ...) in the order of time -> F / view views of the whole clip, one after the other, each in that order.

    With F = 8 and views of 4 frames: 0 2 4 6, 1 3 5 7. An image, and views of one frame, stay as they are.
    """
    if view == 1 or len(frames) == 1:
        return frames
    return frames[np.arange(len(frames)).reshape(view, -1).T.reshape(-1)]


def middle_frames(
    clips: Clips, numbers: Sequence[int], frames: int, *, view: int = 1, shuffle: bool = False
) -> tuple[list[VisualGroup], list[Skip]]:
    """Clips for evaluation, the middle frame of each interval; with `shuffle`, each clip's frames in a random order.

    Their order is otherwise that of `in_views`.

    -> groups of one shape, in the order of `numbers` within each, and the clips that could not be decoded.
    """
    by_count: dict[int, list[tuple[int, np.ndarray]]] = {}
    skipped: list[Skip] = []
    for number in numbers:
        try:
            read = clips.read(number, lambda n: middle_segments(n, frames))
        except DecodeError as error:
            skipped.append(Skip(clips.samples[number].name, error.reason))
            continue
        read = in_views(read, view)
        if shuffle:
            read = read[np.random.default_rng([number]).permutation(len(read))]
        by_count.setdefault(len(read), []).append((number, read))
    groups = [
        VisualGroup(torch.from_numpy(np.stack([r for _, r in members])), torch.tensor([n for n, _ in members]))
        for members in by_count.values()
    ]
    return groups, skipped
