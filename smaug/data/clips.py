"""A set of captioned clips that can be read by number: from media files or a decoded map of the embedded set."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from smaug.data import shapes
from smaug.data.annotations import Format, read_captions
from smaug.data.decode import Decoder, Got, Want, open_decoder
from smaug.data.decode.choose import Choice
from smaug.data.decode.contract import MAX_SECONDS
from smaug.data.frames import Crop, FrameSampler, Pick
from smaug.data.manifest import ManifestError, Sample, Skip, check_files
from smaug.data.questions import Task, ask_about_shapes, question_samples
from smaug.data.source import read_source, source_name

View = tuple[Pick, Crop | None, bool]  # which frames of a clip, which part of them, and whether left is right
CPU = torch.device("cpu")


@dataclass(frozen=True)
class DataConfig:
    """What to train on. With no manifest: the embedded data set `shapes`."""

    manifest: tuple[Path, ...] = ()  # CSV, TSV, JSONL or Parquet; folders; .tar shards, '{000..041}.tar'; or several
    format: Format | None = None  # the manifests are annotation files of this data set; none: as in README.md
    root: Path | None = None  # folder that the paths in a manifest start from; default: the manifest's own
    eval_manifest: tuple[Path, ...] = ()  # pairs to evaluate on; default: those trained on, and the result says so
    video_column: str = "video"
    image_column: str = "image"
    caption_column: str = "caption"
    answers: Path | None = None  # list of all answers to open questions; default: the most frequent ones of training
    shapes: tuple[int, int, int] = (6000, 500, 500)  # clips of the embedded set: train, val, test (the last two even)
    batch: int = 64  # pairs a step
    decoder: Choice = "auto"  # who reads videos; one that is named is used, or the run does not begin
    sampler: FrameSampler = FrameSampler()
    crop: tuple[float, float] | None = (0.5, 1.0)  # least and greatest share of a frame; none: the middle square
    flip: Literal["auto", "always", "never"] = "auto"  # half of the clips; auto: not where captions say left or right
    image_share: float | None = None  # share of the batches that are images alone; none: kinds come mixed
    cache: bool = True  # read the embedded set from its decoded map; without it every clip is decoded live
    max_bad: float = 0.05  # share of unusable files above which a run stops
    vocabulary: int = 8192  # word pieces at most
    workers: int = 0  # decoding threads of a process; 0: one a core, shared among the processes of a machine
    clip_seconds: float = MAX_SECONDS  # a clip that takes longer to decode is skipped

    def __post_init__(self) -> None:
        if not self.manifest and (self.format or self.root or self.eval_manifest):
            raise ValueError("--data.format, --data.root and --data.eval-manifest need a --data.manifest to train on")
        if not (self.batch > 0 and self.workers >= 0 and self.clip_seconds > 0):  # also of nan
            raise ValueError("--data.batch and --data.clip-seconds must be above 0, --data.workers 0 or more")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--data.max-bad {self.max_bad:g} is no share of the files; it is between 0 and 1")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError("--data.crop takes two shares of a frame, above 0, at most 1, the smaller first")


@dataclass
class Clips:
    """`name` of the set, its samples, and which of them belong to subsets that are reported apart."""

    name: str
    samples: list[Sample]
    size: int  # pixels of the square frames
    decoder: Decoder
    frames: np.ndarray | None = None  # (clips, frames, size, size, 3) uint8, if all is decoded already
    subsets: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (clips,) bool
    skipped: list[Skip] = field(default_factory=list)  # found unusable before any was decoded
    augmented: bool = False  # whether training may crop and flip
    sampler: FrameSampler = FrameSampler()
    places: np.ndarray | None = None  # (samples,) whose clip each sample is in `frames`; none: its own

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> int:
        """CRC32 of what the samples are called and say, in their order: batches are drawn by number."""
        crc = 0
        for s in self.samples:
            crc = zlib.crc32("\0".join((s.name, s.kind, *s.captions, *s.answers, *s.options)).encode(), crc)
        return crc

    def read(self, numbers: Sequence[int], views: Sequence[View]) -> list[Got]:
        """(F, size, size, 3) uint8 of each clip on the decoder's device, or why not; an image has one frame."""
        if self.frames is not None:
            times = np.arange(self.frames.shape[1]) / shapes.RATE
            places = numbers if self.places is None else self.places[list(numbers)]
            return [
                Got(torch.from_numpy(self.frames[place, list(pick(times))]), "", "map")
                for place, (pick, _, _) in zip(places, views, strict=True)
            ]
        wants = [
            Want(self.samples[number].path, self.samples[number].kind, *view)
            for number, view in zip(numbers, views, strict=True)
        ]
        return self.decoder.decode(wants, self.size)


def open_shapes(
    split: str,
    config: DataConfig,
    size: int,
    report: shapes.Report,
    device: torch.device = CPU,
    task: Task = "retrieval",
) -> Clips:
    """The embedded data set, built on first use: its clips with their captions, or the questions about them."""
    folder = shapes.build(config.shapes, report)
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
    samples = [Sample(folder / r["video"], "video", (r["caption"],), r["video"]) for r in rows]
    new = np.array([r["new_combination"] for r in rows])
    places = None
    if task != "retrieval":
        number = {sample.name: i for i, sample in enumerate(samples)}
        samples = ask_about_shapes([shapes.read_scene(r["scene"]) for r in rows], samples, split, task)
        places = np.array([number[sample.name] for sample in samples])
    return Clips(
        name=f"shapes {split}",
        samples=samples,
        size=size,
        decoder=_decoder(config, device),
        frames=shapes.decoded(folder, split, size, report) if config.cache else None,
        sampler=config.sampler,
        subsets={"new_combinations": new if places is None else new[places]} if split != "train" else {},
        places=places,
    )


def open_manifest(
    paths: Sequence[Path], config: DataConfig, size: int, device: torch.device = CPU, task: Task = "retrieval"
) -> Clips:
    """One's own data: all that `read_source` takes, or questions. Missing files are in `skipped`; too many end it."""
    skipped: list[Skip] = []
    columns = (config.video_column, config.image_column, config.caption_column)
    if task != "retrieval":
        samples = question_samples(config.format, paths, config.root, task, skipped=skipped)
    elif config.format is not None:
        samples = read_captions(config.format, paths, config.root, skipped=skipped)
    else:
        samples = read_source(paths, config.root, *columns, skipped=skipped)
    total = len(samples)
    samples, missing = check_files(samples)
    check_share([*skipped, *missing], total + len(skipped), config.max_bad)
    return Clips(
        source_name(paths),
        samples,
        size,
        _decoder(config, device),
        skipped=[*skipped, *missing],
        augmented=True,
        sampler=config.sampler,
    )


def _decoder(config: DataConfig, device: torch.device) -> Decoder:
    # torchrun says how many processes share this machine.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return open_decoder(config.decoder, device, config.workers or max(1, cores), config.clip_seconds)


def check_share(bad: Sequence[Skip], total: int, limit: float, decoder: str = "auto") -> None:
    """Raises ManifestError when more than `limit` of all files is unusable; `decoder` is the one that was asked for."""
    if len(bad) > limit * total:
        named = decoder in ("dali", "torchcodec")
        other = f"{decoder} does not read all kinds: try --data.decoder auto. " if named else ""
        examples = "; ".join(f"{skip.name}: {skip.reason}" for skip in bad[:3])
        raise ManifestError(
            f"{len(bad)} of {total} files cannot be used, more than the {limit:.0%} that --data.max-bad allows. "
            f"For example {examples}. {other}Mend or remove them, or raise --data.max-bad."
        )
