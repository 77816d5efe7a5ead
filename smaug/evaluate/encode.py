"""Clips and texts through their encoders, for evaluation: nothing is masked, memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from smaug.data import text
from smaug.data.clips import Clips, check_share
from smaug.data.frames import in_views
from smaug.data.loader import middle_frames
from smaug.data.manifest import Skip
from smaug.data.shapes import Report
from smaug.evaluate.ensemble import Ensemble
from smaug.model.model import Model
from smaug.model.text_encoder import TextEncoderConfig
from smaug.model.video_encoder import EncodedVideo, VideoEncoderConfig
from smaug.tokens import PackedTokens, cat_tokens

BATCH = 100  # clips or texts encoded at once; fixed, so that a score does not depend on the machine's memory
KEEP = 4 << 30  # bytes of clips' tokens that wait for the match head; what does not fit is encoded again


@dataclass(frozen=True)
class Block:
    """Clips of one shape as the match head reads them; their places in the evaluation in `numbers`."""

    numbers: list[int]  # of the clips in their set
    features: Tensor  # (B, D), the mean over their frames
    frames: PackedTokens  # S sequences
    summaries: Tensor  # (S, D)
    frame_ids: Tensor  # (B, M) int32, the sequences of each clip, -1 for none

    @property
    def bytes(self) -> int:
        return self.frames.values.numel() * self.frames.values.element_size()


@dataclass(frozen=True)
class Look:
    """How a clip is looked at."""

    frames: int
    parts: int = 1  # that it is encoded in, each of frames / parts frames over the whole clip
    shuffle: bool = False  # its frames in a random order
    sparse: bool = True  # with pruning at its trained rate


def look(config: VideoEncoderConfig, frames: int, how: Ensemble, *, shuffle: bool, sparse: bool) -> Look:
    """Refuses frames that do not fill the tubes, and a late ensemble that has only one thing to score."""
    config.times(frames)
    if how == "concat" or config.attend == "frame":
        return Look(frames, 1, shuffle, sparse)
    if frames % config.frames or frames == config.frames:
        raise ValueError(
            f"--ensemble {how} scores parts of a clip one by one, and this model (attend=clip) makes one sequence of "
            f"{config.frames} frames: --frames must be a multiple of that, such as {2 * config.frames}, not {frames}"
        )
    return Look(frames, frames // config.frames, shuffle, sparse)


def encode_clips(
    model: Model, clips: Clips, numbers: Sequence[int], how: Look, skipped: list[Skip], batch: int = BATCH
) -> Iterator[Block]:
    """Blocks of at most `batch` clips, in the order of `numbers` but for images, which come after a batch's videos.

    Clips that cannot be read are appended to `skipped`.
    """
    device, config = next(model.parameters()).device, model.video.config
    part = how.frames // how.parts
    for start in range(0, len(numbers), batch):
        groups, bad = middle_frames(
            clips,
            numbers[start : start + batch],
            how.frames,
            view=config.view if how.parts == 1 else part,
            shuffle=how.shuffle,
        )
        skipped += bad
        for group in groups:
            video, parts = group.video.to(device), 1
            if how.parts > 1 and video.shape[1] > 1:
                parts = how.parts
                video = video.flatten(0, 1).unflatten(0, (-1, part))[:, in_views(list(range(part)), config.view)]
            seen = model.video([(video, config.every_patch(video))], keep_rate=None if how.sparse else 1.0)
            yield _block(seen, group.samples.tolist(), parts)


def _block(seen: EncodedVideo, numbers: list[int], parts: int) -> Block:
    features = seen.features if parts == 1 else seen.features.view(len(numbers), parts, -1).mean(1)
    return Block(numbers, features, seen.frames, seen.summaries, seen.frame_ids.reshape(len(numbers), -1))


@dataclass(frozen=True)
class EncodedClips:
    """All clips of an evaluation: their vectors, and their tokens block by block, as far as these were kept."""

    model: Model
    clips: Clips
    how: Look
    numbers: list[int]  # of the clips in their set, in the order of features
    features: Tensor  # (videos, D)
    kept: list[Block | list[int]]  # numbers alone: to be encoded again
    skipped: list[Skip]

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(place of its first clip in `features`, block)"""
        first = 0
        for block in self.kept:
            if isinstance(block, list):
                again: list[Skip] = []
                found = list(encode_clips(self.model, self.clips, block, self.how, again, len(block)))
                if again:
                    raise ValueError(f"{again[0].name} could be read once, but not again: {again[0].reason}")
                (block,) = found
            yield first, block
            first += len(block.numbers)


def encode_set(
    model: Model,
    clips: Clips,
    how: Look,
    *,
    max_bad: float,
    tokens: bool,
    batch: int = BATCH,
    report: Report | None = None,
) -> EncodedClips:
    """Every clip of a set; with `tokens`, those of the first KEEP bytes stay, for the match head.

    Raises ManifestError when more than `max_bad` of the clips cannot be read.
    """
    skipped: list[Skip] = []
    numbers: list[int] = []
    features: list[Tensor] = []
    kept: list[Block | list[int]] = []
    room = KEEP if tokens else 0
    for block in encode_clips(model, clips, range(len(clips)), how, skipped, batch):
        check_share(skipped, len(clips), max_bad, clips.decoder.name)
        numbers += block.numbers
        features.append(block.features)
        room -= block.bytes
        kept.append(block if room >= 0 else block.numbers)
        if report is not None:
            report("clips encoded", len(numbers) + len(skipped), len(clips))
    check_share(skipped, len(clips), max_bad, clips.decoder.name)
    if not numbers:
        raise ValueError(f"none of the {len(clips)} clips of {clips.name} can be read; the first: {skipped[0].reason}")
    return EncodedClips(model, clips, how, numbers, torch.cat(features), kept, skipped)


@dataclass(frozen=True)
class EncodedTexts:
    features: Tensor  # (n, D)
    words: PackedTokens | None  # n sequences, for the match head
    cut: int  # how many were longer than the model reads


def encode_texts(
    model: Model, tokenizer: Tokenizer, captions: Sequence[str], *, tokens: bool = True, batch: int = BATCH
) -> EncodedTexts:
    device, config = next(model.parameters()).device, model.text.config
    features, encoded = [], []
    for start in range(0, len(captions), batch):
        packed = text.pack_captions(tokenizer, captions[start : start + batch], config.max_words, config.sep)
        some, read = model.text(packed.to(device))
        features.append(some)
        encoded += [read] if tokens else []
    cut = texts_cut(tokenizer, captions, config)
    return EncodedTexts(torch.cat(features), cat_tokens(encoded) if tokens else None, cut)


def texts_cut(tokenizer: Tokenizer, texts: Sequence[str], config: TextEncoderConfig) -> int:
    """How many are longer than the model reads."""
    return sum(n + config.sep > config.max_words for n in text.lengths(tokenizer, texts))
