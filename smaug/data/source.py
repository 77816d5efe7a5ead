"""What may be trained on: manifests, folders of media files with captions beside them, and tar shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from smaug.data.manifest import KINDS, ManifestError, Sample, Skip, clean, near_file, read_manifest
from smaug.data.media import Member, kind_of, printable
from smaug.data.shards import MAX_TEXT, json_captions, read_shard

MANIFESTS = (".csv", ".tsv", ".jsonl", ".parquet")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # all but the first are refused by read_shard
MAX_PATHS = 10**6  # that one pattern may stand for


def read_source(
    paths: Sequence[Path],
    root: Path | None = None,
    video_column: str = "video",
    image_column: str = "image",
    caption_column: str = "caption",
    *,
    skipped: list[Skip] | None = None,
) -> list[Sample]:
    """Samples of all `paths`, in their order; a file that comes more than once is one sample with all its captions.

    A path is a manifest (`read_manifest`, which `root` and the columns are for); a shard `00000.tar`; a pattern of
    several paths, `shards/{00000..00041}.tar`; or a folder, all the way down: its shards, and its media files, each
    with `a.txt` (one caption a line) or `a.json` ({"caption": a text or a list of them}) beside `a.mp4`.
    What cannot be used is appended to `skipped`. Raises ManifestError if a path is wrong or nothing at all can be used.
    """
    skips: list[Skip] = []
    samples: list[Sample] = []
    places: dict[tuple[str, str], int] = {}  # (kind, file) -> its number in `samples`
    shards: set[str] = set()
    for path in dict.fromkeys(one for given in paths for one in expand(given)):
        found: Iterable[Sample]
        if os.path.isdir(path):
            found = _folder(path, shards, skips)
        elif not os.path.exists(path):
            raise ManifestError(f"{path} does not exist; check --data.manifest{near_file(path)}.")
        elif path.name.lower().endswith(TARS):
            found = _shard(path, shards, skips)
        elif path.suffix.lower() in MANIFESTS:
            found = read_manifest([path], root, video_column, image_column, caption_column, skipped=skips)
        else:
            raise ManifestError(f"{path} is no manifest ({KINDS}), no .tar and no folder; --data.manifest takes these.")
        for sample in found:
            if isinstance(sample.path, Member):  # once, since its shard is read once
                samples.append(sample)
                continue
            number = places.setdefault((sample.kind, os.path.abspath(sample.path)), len(samples))
            if number == len(samples):
                samples.append(sample)
            else:
                samples[number] = replace(samples[number], captions=samples[number].captions + sample.captions)
    if skipped is not None:
        skipped += skips
    if not samples:
        what = f"; of {len(skips)} that were skipped the first, {skips[0].name}: {skips[0].reason}" if skips else ""
        tables = [one for path in paths for one in sorted(path.glob("*")) if one.suffix in MANIFESTS]
        hint = f" Perhaps {tables[0]} is meant." if tables else ""
        raise ManifestError(f"no video or image with a caption in {', '.join(map(str, paths[:3]))}{what}.{hint}")
    return samples


def expand(path: Path) -> list[Path]:
    """What the braces of a pattern stand for, as in a shell and in webdataset: {00000..00041}, or {train,val}."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", str(path))
    if braces is None or os.path.lexists(path):
        return [path]
    first, last, several = braces.groups()
    if several is not None:
        choices = several.split(",")
    elif int(last) - int(first) < MAX_PATHS:
        padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        raise ManifestError(f"{path} stands for more than {MAX_PATHS} paths; name the folder instead.")
    if not choices:
        raise ManifestError(f"{path} counts down; write the smaller number first.")
    start, end = str(path)[: braces.start()], str(path)[braces.end() :]
    return [one for choice in choices for one in expand(Path(start + choice + end))]


def source_name(paths: Sequence[Path]) -> str:
    """For a person, and short: `clips.csv + images.csv`, or `41 shards of laion`."""
    several = list(dict.fromkeys(one for path in paths for one in expand(path)))
    names = [path.name or path.resolve().name for path in several]
    if len(several) <= 3:
        return " + ".join(names)
    folders = list(dict.fromkeys(path.parent.resolve().name for path in several))
    kind = "shards" if all(name.lower().endswith(TARS) for name in names) else "sources"
    return f"{len(several)} {kind} of {' + '.join(folders[:3])}{' ...' * (len(folders) > 3)}"


def _shard(tar: Path, shards: set[str], skips: list[Skip]) -> list[Sample]:
    """Of a shard that was not read before."""
    real = os.path.realpath(tar)
    if real in shards:
        return []
    shards.add(real)
    samples, bad = read_shard(tar)
    skips += bad
    return samples


def _folder(top: Path, shards: set[str], skips: list[Skip]) -> Iterator[Sample]:
    """By name: the files of a folder, then the folders in it. Hidden ones are not looked at, none is entered twice."""
    entered: set[tuple[int, int]] = set()
    ahead = [top]
    while ahead:
        folder = ahead.pop()
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in entered:  # a link to a folder may lead in a circle
                continue
            entered.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                # os.path: a link that leads to itself is no folder, and an exception for DirEntry
                is_folder = {
                    entry.name: os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                    for entry in entries
                    if not entry.name.startswith(".")
                }
        except OSError as error:
            skips.append(Skip(_shown(folder, top.parent), f"cannot be read: {error.strerror or error}"))
            continue
        for name in sorted(is_folder):
            path = folder / name
            kind = kind_of(path.suffix[1:])
            if is_folder[name]:
                continue
            if name.lower().endswith(TARS):
                yield from _shard(path, shards, skips)
            elif kind is not None:
                captions = _beside(path, is_folder)
                if isinstance(captions, list):
                    yield Sample(path, kind, tuple(captions), _shown(path, top))
                else:
                    skips.append(Skip(_shown(path, top), captions))
        ahead += [folder / name for name in sorted(is_folder, reverse=True) if is_folder[name]]


def _beside(media: Path, is_folder: dict[str, bool]) -> list[str] | str:
    """Captions of a media file from the files beside it, or why there are none. `is_folder`: all that is there."""
    names = [name for name in (f"{media.stem}.txt", f"{media.stem}.json") if is_folder.get(name) is False]
    for name in names:
        path = media.with_name(name)
        try:
            if not path.is_file():  # a pipe would wait for ever
                continue
            with path.open("rb") as file:
                data = file.read(MAX_TEXT + 1)
        except OSError as error:
            return f"{printable(name)} cannot be read: {error.strerror or error}"
        if len(data) > MAX_TEXT:
            return f"{printable(name)} has more than {MAX_TEXT >> 20} MiB"
        if name.endswith(".json"):
            several, one = json_captions(data)
            captions = several or one
        else:
            captions = clean(data.decode("utf-8-sig", "replace").split("\n"))
        if captions:
            return captions
    if names:
        return f"no caption in {printable(' or '.join(names))}"
    return printable(f"no caption: neither {media.stem}.txt nor {media.stem}.json beside it")


def _shown(path: Path, top: Path) -> str:
    """A path for a person, from the folder that was named."""
    return printable(str(path.relative_to(top)))
