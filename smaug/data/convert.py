"""Any source to tar shards as video2dataset lays them out: whole files in a row, for disks and networks that dislike
many small ones.

    out/00000.tar         000000000.mp4, 000000000.txt, 000000000.json, 000000001.mp4, ...
    out/00000_stats.json  written after its shard: that one is finished
    out/source.json       what is converted, so that the same command, and no other, goes on where it stopped
    out/skipped.txt       what was left out and why, once all is finished

A shard is a function of its stretch of the source: the same input gives the same bytes, however often it was stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from smaug.data.decode import Decoder, Want, open_decoder
from smaug.data.journal import bar
from smaug.data.manifest import ManifestError, Sample, Skip, check_files
from smaug.data.media import kind_of, read_bytes, size_of
from smaug.data.source import read_source, source_name

VERSION = 1  # raise it whenever the same source would give other bytes
MAX_BYTES = 2**31  # of one file, which is in memory while it is written
AT_ONCE = 16  # files in memory together
SIZE = 32  # pixels of the frame that is decoded to see whether a file can be
# What some formats begin with, for files whose names do not tell (as those in shards have none).
BEGINNINGS = (
    (b"\x1aE\xdf\xa3", "webm"), (b"GIF8", "gif"), (b"RIFF", "avi"), (b"\x89PNG", "png"), (b"RIFF", "webp"),
)  # fmt: skip


@dataclass(frozen=True)
class ConvertOptions:
    """Writes the captioned files of a source, as they are, into tar shards; with Ctrl-C and again it goes on."""

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]  # manifests, folders or .tar shards; several are joined
    out: Path  # an empty or new folder; or one where the same command was stopped
    root: Path | None = None  # folder that the paths in a manifest start from; default: the manifest's own
    video_column: str = "video"
    image_column: str = "image"
    caption_column: str = "caption"
    per_shard: int = 1000  # samples a shard, before those that cannot be decoded are left out
    workers: int = 2  # threads that try to decode


def convert(options: ConvertOptions, console: Console) -> int:
    """Writes the shards that are not there yet. Exit code: 0, or 130 after Ctrl-C, which leaves whole shards.

    Raises ManifestError if the source cannot be read or the folder is not for it, OSError if it cannot be written.
    """
    if options.per_shard < 1:
        raise ManifestError(f"{options.per_shard} samples a shard; --per-shard is at least 1.")
    out = options.out.resolve()
    for path in options.source:
        if os.path.isdir(path) and out.is_relative_to(path.resolve()):
            raise ManifestError(f"{options.out} lies in {path}, which it is made of; choose a folder elsewhere.")
    skipped: list[Skip] = []
    columns = (options.video_column, options.image_column, options.caption_column)
    samples, missing = check_files(read_source(options.source, options.root, *columns, skipped=skipped))
    skipped += missing
    if not samples:
        raise ManifestError(
            f"none of {len(missing)} files can be read; the first, {missing[0].name}: {missing[0].reason}."
        )
    shards = [samples[first : first + options.per_shard] for first in range(0, len(samples), options.per_shard)]
    console.print(
        f"convert    {source_name(options.source)}: {len(samples)} samples to {len(shards)} shards in {options.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    finished = 0
    decoder = open_decoder("pyav", torch.device("cpu"), options.workers)
    try:
        with _claimed(options.out, _fingerprint(samples, options.per_shard)), bar(lambda: "") as bars:
            task = bars.add_task("samples", total=len(samples))
            for number, members in enumerate(shards):
                tar, stats = options.out / f"{number:05d}.tar", options.out / f"{number:05d}_stats.json"
                bad = _bad_of_finished(tar, stats)
                if bad is None:
                    keys = [f"{number:05d}{place:04d}" for place in range(len(members))]
                    bad = _write_shard(tar, members, keys, decoder, lambda n: bars.advance(task, n))
                    # named as video2dataset names them
                    counts = {"count": len(members), "successes": len(members) - len(bad), "bytes": tar.stat().st_size}
                    _write(stats, json.dumps(counts | {"skipped": [[skip.name, skip.reason] for skip in bad]}))
                skipped += bad
                finished += 1
                if not console.is_terminal and finished * 10 // len(shards) > (finished - 1) * 10 // len(shards):
                    # ten lines in a log
                    console.print(f"convert    {finished} of {len(shards)} shards", highlight=False)
                bars.update(task, completed=min((number + 1) * options.per_shard, len(samples)))
            _write(options.out / "skipped.txt", "".join(f"{skip.name}: {skip.reason}\n" for skip in skipped))
    except KeyboardInterrupt:
        console.print(
            f"stopped    {finished} of {len(shards)} shards are made; the same command goes on",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 130
    except OSError as error:
        raise OSError(
            f"{options.out} cannot be written: {error.strerror or error}; {finished} of {len(shards)} shards are made, "
            "and the same command goes on when that is mended"
        ) from None
    finally:
        decoder.close()
    note = f"; {len(skipped)} were left out, see {options.out / 'skipped.txt'}" if skipped else ""
    console.print(f"done       {len(shards)} shards{note}", highlight=False, soft_wrap=True)
    return 0


def _write_shard(
    tar: Path, samples: Sequence[Sample], keys: Sequence[str], decoder: Decoder, report: Callable[[int], None]
) -> list[Skip]:
    """One shard, aside and then renamed; the samples that are left out."""
    from webdataset import TarWriter  # here: it takes a second to import

    skipped: list[Skip] = []
    aside = tar.with_name(f".{tar.name}.aside")
    try:
        # Nothing of the machine or the hour goes into a shard.
        with aside.open("wb") as file, TarWriter(file, "", "", encoder=False, mtime=0) as writer:
            for first in range(0, len(samples), AT_ONCE):
                some = samples[first : first + AT_ONCE]
                read = []
                for sample, key in zip(some, keys[first:], strict=False):
                    data = _read(sample)
                    if isinstance(data, Skip):
                        skipped.append(data)
                    else:
                        read.append((sample, key, data))
                got = decoder.decode([Want(data, sample.kind, lambda times: [0]) for sample, _, data in read], SIZE)
                for (sample, key, data), one in zip(read, got, strict=True):
                    if one.frames is None:
                        skipped.append(Skip(sample.name, one.reason))
                        continue
                    said = {"caption": sample.captions[0], "captions": sample.captions, "name": sample.name, "key": key}
                    writer.write(
                        {
                            "__key__": key,
                            _ending(sample, data): data,
                            "txt": sample.captions[0].encode("utf-8", "replace"),
                            "json": json.dumps(said | {"status": "success"}).encode(),
                        }
                    )
                report(len(some))
        os.replace(aside, tar)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return skipped


def _read(sample: Sample) -> bytes | Skip:
    try:
        if (size := size_of(sample.path)) > MAX_BYTES:
            return Skip(sample.name, f"{size} bytes; cut it into clips")
        return read_bytes(sample.path)
    except OSError as error:
        return Skip(sample.name, f"cannot be read: {error.strerror or error}")


def _ending(sample: Sample, data: bytes) -> str:
    """Of a member's name: that of the file if it tells the kind, else by what the bytes begin with."""
    ending = Path(sample.name).suffix[1:].lower()
    if kind_of(ending) == sample.kind:
        return ending
    fits = [ending for start, ending in BEGINNINGS if data.startswith(start) and kind_of(ending) == sample.kind]
    return fits[0] if fits else {"video": "mp4", "image": "jpg"}[sample.kind]


def _bad_of_finished(tar: Path, stats: Path) -> list[Skip] | None:
    """What was left out of a shard that is whole; None: it is not there, or not as it was written."""
    try:
        found = json.loads(stats.read_text())
        return [Skip(*skip) for skip in found["skipped"]] if tar.stat().st_size == found["bytes"] else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _fingerprint(samples: Sequence[Sample], per_shard: int) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.name, sample.kind, sample.captions, size_of(sample.path)]).encode())
    return json.dumps(
        {"version": VERSION, "per_shard": per_shard, "samples": len(samples), "sha256": digest.hexdigest()}
    )


@contextlib.contextmanager
def _claimed(out: Path, fingerprint: str) -> Iterator[None]:
    """The folder, for this source and this process alone."""
    out.mkdir(parents=True, exist_ok=True)
    source = out / "source.json"
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ManifestError(f"another process converts into {out}; wait for it or choose another folder.") from None
        except OSError:  # a file system without locks
            pass
        if not source.exists():
            if any(not path.name.startswith(".") for path in out.iterdir()):
                raise ManifestError(f"{out} is not empty, and not made by convert; choose an empty folder.")
            _write(source, fingerprint)
        elif source.read_text() != fingerprint:
            raise ManifestError(
                f"{out} holds shards of another source, or of the same one before it or --per-shard changed; "
                "choose an empty folder, or delete this one."
            )
        yield


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
