"""Batches. What a batch holds is a function of (seed, epoch, index) alone, so a run can stop and go on anywhere."""

from __future__ import annotations

import functools
import hashlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.clips import Clips, DataConfig, View, check_share
from smaug.data.frames import draw_crop, tells_sides
from smaug.data.manifest import ManifestError, Skip
from smaug.masks import MLM_STREAM, TextMask
from smaug.tokens import PackedTokens, with_capacity

AHEAD = 2  # batches made ahead of the step
IGNORED = -100  # the label of what does not count; cross_entropy's default
NO_ANSWERS = torch.empty(0, dtype=torch.int64)


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
    masked_counts: tuple[int, ...] | Tensor  # how many of them each caption has; with capacity on the device, (B,)
    video_keys: Tensor  # (B,) int64, equal for the same clip
    caption_keys: Tensor  # (B,) int64, equal for the same caption
    epoch: int
    step: int
    names: tuple[str, ...]
    first: int = 0  # place of this process' first pair in the batch of all
    places: Tensor | None = None  # (B,) int64, places of the pairs in that batch as they were drawn; None: in order
    options: PackedTokens | None = None  # of multiple choices: as many texts in a row for each clip
    answers: Tensor = NO_ANSWERS  # (B,) int64, number of the right option, or in the list of answers; -100: not in it
    # For a decoder of answers, see `text.beginnings`: n of them, the word after each, and whose each is, (n,) int64.
    begun: PackedTokens | None = None
    begun_labels: Tensor = NO_ANSWERS
    begun_of: Tensor = NO_ANSWERS
    counters: Tensor | None = None  # (2,) int64, epoch and step once more, where a captured graph can be given others

    def __len__(self) -> int:
        return len(self.names)

    @property
    def draws(self) -> tuple[int | Tensor, int | Tensor]:
        """Epoch and step as random draws count them; what the host decides by them (ratios, rates) it has as ints."""
        return (self.epoch, self.step) if self.counters is None else (self.counters[0], self.counters[1])

    def rounded(self, bucket: int) -> Batch:
        """The same pairs with capacity: all that differs by batch is rounded up to a multiple of `bucket`, so that the
        batches of a run have few sets of shapes, and no host number depends on the words, nor a draw on host numbers.

        Words get a tail, which is zero and ignored; labels of masked rows that are none are -100; `counters` has epoch
        and step. The loss and the gradients of a step stay what they were. ValueError for a batch whose masked words
        and answers are both read.
        """
        if self.masked is not None and self.begun is not None:
            raise ValueError("a batch with masked words and answers to spell cannot be rounded: both would have a tail")
        done: dict[int, PackedTokens | None] = {id(None): None}

        def up(n: int) -> int:
            return -(-n // bucket) * bucket

        def room(tokens: PackedTokens | None, sequences: int | None = None) -> Any:
            if id(tokens) not in done:
                assert tokens is not None
                done[id(tokens)] = with_capacity(tokens, up(tokens.rows), sequences)
            return done[id(tokens)]

        def pad(x: Tensor, value: int = 0) -> Tensor:
            return F.pad(x, (0, up(len(x)) - len(x)), value=value)

        return replace(
            self,
            words=room(self.words),
            contrast=room(self.contrast),
            masked=room(self.masked),
            masked_rows=pad(self.masked_rows),
            masked_labels=pad(self.masked_labels, IGNORED),
            masked_counts=torch.as_tensor(self.masked_counts, dtype=torch.int64),
            options=room(self.options),
            begun=room(self.begun, None if self.begun is None else up(self.begun.num_sequences)),
            begun_labels=pad(self.begun_labels, IGNORED),
            begun_of=pad(self.begun_of),
            counters=torch.tensor([self.epoch, self.step]),
        )

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with another tensor for each."""
        words = tree_map_only(Tensor, change, self.words)
        return replace(
            self,
            groups=tuple(VisualGroup(change(g.video), change(g.samples)) for g in self.groups),
            words=words,
            # one object stays one object: the step encodes each once
            contrast=words if self.contrast is self.words else tree_map_only(Tensor, change, self.contrast),
            masked=tree_map_only(Tensor, change, self.masked),
            masked_rows=change(self.masked_rows),
            masked_labels=change(self.masked_labels),
            masked_counts=change(self.masked_counts) if isinstance(self.masked_counts, Tensor) else self.masked_counts,
            options=tree_map_only(Tensor, change, self.options),
            answers=change(self.answers),
            begun=tree_map_only(Tensor, change, self.begun),
            begun_labels=change(self.begun_labels),
            begun_of=change(self.begun_of),
            video_keys=change(self.video_keys),
            caption_keys=change(self.caption_keys),
            places=None if self.places is None else change(self.places),
            counters=None if self.counters is None else change(self.counters),
        )


class Loader:
    """Training batches of a set of clips; of the `batch` pairs of a step, process `rank` of `ranks` makes its share.

    Every epoch is one permutation of all clips; what does not fill a batch at its end is left out. With
    `config.image_share` the images and the videos have permutations and epochs of their own, and that share of the
    steps is made of images. A clip that cannot be decoded is listed in `skipped` and another takes its place; above
    `config.max_bad` of all clips, ManifestError.

    Of questions, batches hold the options or, numbered by the list `answers`, the answer; with `spell` its words, too.
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
        sep: bool = False,
        text_mask: TextMask,
        mlm_ratio: float = 0.0,
        answers: Sequence[str] = (),
        spell: bool = False,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.clips, self.config, self.frames, self.view = clips, config, frames, view
        self.tokenizer, self.max_words = tokenizer, max_words
        self.text_mask, self.seed = text_mask, seed
        self.rank, self.ranks = rank, ranks
        self.kinds = self._kinds()
        self.size = min(config.batch, *(len(numbers) for numbers in self.kinds))
        if self.size % ranks:
            raise ValueError(f"a batch of {self.size} pairs cannot be shared equally by {ranks} processes")
        self.skipped: dict[int, Skip] = {}
        self.cls = text.number(tokenizer, text.CLS)
        self.mask = text.number(tokenizer, text.MASK)
        self.sep = text.number(tokenizer, text.SEP) if sep else None
        self.mlm_mask = TextMask(mlm_ratio, "mask")
        self.answers, self.spell = {answer: i for i, answer in enumerate(answers)}, spell
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    def _kinds(self) -> list[np.ndarray]:
        """Numbers of the clips that batches are drawn from: of all, or of the videos and of the images."""
        share = self.config.image_share
        if share is None:
            return [np.arange(len(self.clips))]
        image = np.array([sample.kind == "image" for sample in self.clips.samples])
        if not 0 < share < 1 or image.all() or not image.any():
            raise ManifestError(
                f"--data.image-share {share:g} needs images and videos in the data, and a number between 0 and 1; "
                f"there are {image.sum()} images and {(~image).sum()} videos."
            )
        return [np.flatnonzero(~image), np.flatnonzero(image)]

    def _permutation(self, kind: int, epoch: int) -> np.ndarray:
        key = [self.seed, epoch, kind] if kind else [self.seed, epoch]
        return np.random.default_rng(key).permutation(self.kinds[kind])

    def _draw(self, step: int) -> tuple[np.ndarray, int, int]:
        """The order that a step's batch is drawn from, its epoch, and the place of the batch's first clip."""
        kind, turn = 0, step
        if self.config.image_share is not None:
            images = math.floor(step * self.config.image_share)  # steps of images before this one
            kind = int(math.floor((step + 1) * self.config.image_share) > images)
            turn = images if kind else step - images
        epoch, index = divmod(turn, len(self.kinds[kind]) // self.size)
        return self._order(kind, epoch), epoch, index * self.size

    def batch(self, step: int) -> Batch:
        """The batch of a training step, counted from 0."""
        order, epoch, first = self._draw(step)
        own = self.size // self.ranks
        first += self.rank * own
        drawn_at = enumerate(self._read(order, range(first, first + own), epoch), self.rank * own)
        # stable: videos, then images
        ordered = sorted(drawn_at, key=lambda drawn: drawn[1][1].shape[0], reverse=True)
        read = [pair for _, pair in ordered]
        numbers = [number for number, _ in read]

        groups: list[VisualGroup] = []
        for count in dict.fromkeys(frames.shape[0] for _, frames in read):
            members = [(number, frames) for number, frames in read if frames.shape[0] == count]
            video = _stacked([frames for _, frames in members])
            groups.append(VisualGroup(video, torch.tensor([number for number, _ in members])))

        said = [self.clips.samples[n].captions for n in numbers]
        captions = [several[epoch % len(several)] for several in said]
        # One call for the batch, in the thread that makes it; the tokenizer releases the GIL.
        ends = self.sep is not None
        words = text.encode(self.tokenizer, captions, self.max_words - ends)
        whole = text.pack(words, self.cls, sep=self.sep)
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
            contrast = text.pack(words, self.cls, self.text_mask.draw(**drawn), mask, sep=self.sep)
        if self.mlm_mask.ratio > 0:
            kept = self.mlm_mask.draw(**drawn, stream=MLM_STREAM)
            masked = text.pack(words, self.cls, kept, self.mask, sep=self.sep)
            counts = tuple(len(w) - len(stay) for w, stay in zip(words, kept, strict=True))
            first = 1
            for w, stay in zip(words, kept, strict=True):
                gone = sorted(set(range(len(w))) - set(stay.tolist()))
                rows += [first + place for place in gone]
                labels += [w[place] for place in gone]
                first += 1 + len(w) + ends
        asked = [self.clips.samples[n] for n in numbers]
        options, right, begun, after, belongs = None, NO_ANSWERS, None, NO_ANSWERS, NO_ANSWERS
        if asked[0].options:
            every = [option for sample in asked for option in sample.options]
            options = text.pack(text.encode(self.tokenizer, every, self.max_words - ends), self.cls, sep=self.sep)
            right = torch.tensor([sample.options.index(sample.answers[0]) for sample in asked])
        elif asked[0].answers:
            right = torch.tensor([self.answers.get(sample.answers[0], IGNORED) for sample in asked])
            if self.spell:
                spelled = text.encode(self.tokenizer, [sample.answers[0] for sample in asked], self.max_words)
                parts, *numbered = text.beginnings(spelled, text.number(self.tokenizer, text.SEP))
                begun = text.pack(parts, self.cls)
                after, belongs = (torch.tensor(several) for several in numbered)
        return Batch(
            groups=tuple(groups),
            words=whole,
            contrast=contrast,
            masked=masked,
            masked_rows=torch.tensor(rows, dtype=torch.int64),
            masked_labels=torch.tensor(labels, dtype=torch.int64),
            masked_counts=counts,
            video_keys=torch.tensor(numbers),
            caption_keys=torch.tensor([caption_key(caption) for caption in captions]),
            epoch=epoch,
            step=step,
            names=tuple(self.clips.samples[n].name for n in numbers),
            first=self.rank * own,
            # In order where all clips are of one kind, which the step then need not ask about.
            places=None if len(groups) == 1 else torch.tensor([place for place, _ in ordered]),
            options=options,
            answers=right,
            begun=begun,
            begun_labels=after,
            begun_of=belongs,
        )

    def _read(self, order: np.ndarray, places: Sequence[int], epoch: int) -> list[tuple[int, Tensor]]:
        """Of each place the clip that the order has there, or the next one after half the order that can be decoded."""
        tries = dict.fromkeys(places, 0)  # how many clips of its row of candidates a place has given up
        found: dict[int, tuple[int, Tensor]] = {}
        while missing := [place for place in places if place not in found]:
            numbers = [self._candidate(order, place, tries) for place in missing]
            asked = list(dict.fromkeys(numbers))  # two places may fall back on one clip
            got = dict(zip(asked, self.clips.read(asked, [self._view(n, epoch) for n in asked]), strict=True))
            for place, number in zip(missing, numbers, strict=True):
                one = got[number]
                if one.frames is None:
                    tries[place] += 1
                    self.skipped[number] = Skip(self.clips.samples[number].name, one.reason)
                else:
                    found[place] = number, one.frames
            everything = [*self.clips.skipped, *self.skipped.values()]
            total = len(self.clips) + len(self.clips.skipped)
            check_share(everything, total, self.config.max_bad, self.config.decoder)
        return [found[place] for place in places]

    def _candidate(self, order: np.ndarray, place: int, tries: dict[int, int]) -> int:
        while tries[place] <= len(order):
            at = place if tries[place] == 0 else place + len(order) // 2 + tries[place] - 1
            number = int(order[at % len(order)])
            if number not in self.skipped:
                return number
            tries[place] += 1
        raise ManifestError(f"none of the {len(order)} files can be decoded")  # reached if --data.max-bad is 1

    def _view(self, number: int, epoch: int) -> View:
        """Drawn for (seed, epoch, sample); the draws that choose frames come first and do not depend on the others."""
        rng = np.random.default_rng([self.seed, epoch, number])
        pick = self.clips.sampler.pick(self.frames, self.view, rng)
        if not self.clips.augmented:
            return pick, None, False
        crop = draw_crop(rng, self.config.crop) if self.config.crop is not None else None
        asked = self.clips.samples[number]
        said = (*asked.captions, *asked.answers, *asked.options)
        flip = self.config.flip == "always" or (self.config.flip == "auto" and not tells_sides(said))
        return pick, crop, flip and rng.random() < 0.5

    def ahead(
        self, first: int, last: int, device: torch.device | None = None, bucket: int = 0
    ) -> Generator[Batch, None, None]:
        """Batches of steps first .. last - 1, made in a thread of their own while the step before them computes.

        device  where they are to be. To a CUDA device they travel from pinned memory on a stream of their own, beside
                what is computed there; the caller's stream waits for its batch, the host does not.
        bucket  what they are `rounded` to; 0: they are not.
        """
        device = torch.device("cpu") if device is None else device
        copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        ready: queue.Queue[tuple[Batch, torch.cuda.Event | None] | BaseException] = queue.Queue(AHEAD)
        stopped = threading.Event()

        def produce() -> None:
            for step in range(first, last):
                made: tuple[Batch, torch.cuda.Event | None] | BaseException
                try:
                    batch = self.batch(step).rounded(bucket) if bucket else self.batch(step)
                    made = (batch.to(device), None) if copies is None else _sent(batch, copies)
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
                batch, sent = made
                yield batch if sent is None else _received(batch, sent, torch.cuda.current_stream(device))
        finally:
            stopped.set()
            thread.join(timeout=5)  # it is a daemon: a clip that hangs must not keep Ctrl-C waiting


def _sent(batch: Batch, copies: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """The batch on its way to the device of `copies`, and the event of its arrival. What a decoder has left on a device
    stays as it is."""
    with torch.cuda.stream(copies):
        # The allocator of pinned memory keeps what a copy still reads.
        pinned = batch.map(lambda x: x.pin_memory() if x.device.type == "cpu" else x)
        return pinned.to(copies.device), copies.record_event()


def _received(batch: Batch, sent: torch.cuda.Event, stream: torch.cuda.Stream) -> Batch:
    """The batch for use on `stream`, which waits for it."""
    stream.wait_event(sent)

    def keep(x: Tensor) -> Tensor:
        x.record_stream(stream)  # its memory is that of the stream of copies, which must not reuse it too early
        return x

    return batch.map(keep)


def _stacked(clips: Sequence[Tensor]) -> Tensor:
    """By numpy in host memory: torch would start OpenMP threads for the thread that makes batches, and those keep
    spinning on the cores that the step computes on, which made it a fifth slower on two cores."""
    if clips[0].device.type == "cpu":
        return torch.from_numpy(np.stack([clip.numpy() for clip in clips]))
    return torch.stack([*clips])


def caption_key(caption: str) -> int:
    """63 bits that are equal for equal captions, in every process: of ten million captions two agree by chance once in
    180,000 such sets."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest()) >> 1


def middle_frames(
    clips: Clips, numbers: Sequence[int], frames: int, *, view: int = 1, shuffle: bool = False
) -> tuple[list[VisualGroup], list[Skip]]:
    """Clips for evaluation, the middle frame of each interval; with `shuffle`, each clip's frames in a random order.

    Their order is otherwise that of `in_views`.

    -> groups of one shape, in the order of `numbers` within each, and the clips that could not be decoded.
    """
    by_count: dict[int, list[tuple[int, Tensor]]] = {}
    skipped: list[Skip] = []
    pick = clips.sampler.pick(frames, view)
    for number, one in zip(numbers, clips.read(numbers, [(pick, None, False)] * len(numbers)), strict=True):
        if one.frames is None:
            skipped.append(Skip(clips.samples[number].name, one.reason))
            continue
        read = one.frames
        if shuffle:
            read = read[torch.from_numpy(np.random.default_rng([number]).permutation(len(read))).to(read.device)]
        by_count.setdefault(len(read), []).append((number, read))
    groups = [
        VisualGroup(_stacked([r for _, r in members]), torch.tensor([n for n, _ in members]))
        for members in by_count.values()
    ]
    return groups, skipped
