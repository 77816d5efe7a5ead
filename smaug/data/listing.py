"""Every file of a source, captioned or not: `check` and `reencode` work on these, while training needs captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from smaug.data.manifest import KINDS, ManifestError, Sample, Skip, near_file, read_manifest
from smaug.data.media import kind_of
from smaug.data.source import MANIFESTS, TARS, expand, read_source

# Beyond what training takes from a folder: a person means these too when asking whether a folder is sound.
VIDEOS = (
    "3g2 asf divx dv f4v m1v m2ts m2v mjpeg mjpg mts mxf nut ogg ogm qt rm rmvb ts vob y4m "
    "264 265 av1 h264 h265 hevc ivf obu"
)
IMAGES = "apng heic heif jfif jp2 jpe pgm pnm ppm tga"
SIDECARS = (".txt", ".json", *MANIFESTS, *TARS)


@dataclass
class Listing:
    samples: list[Sample] = field(default_factory=list)  # captions are () where there are none
    bad: list[Skip] = field(default_factory=list)  # rows that name no file, members that are refused
    missing: int = 0  # files without a caption
    ignored: list[str] = field(default_factory=list)  # files of folders that are no media by their names


def list_files(paths: Sequence[Path], root: Path | None, video: str, image: str, caption: str) -> Listing:
    """Files of folders, manifests, shards and of single media files, in their order; `video`, `image` and `caption` are
    the columns of a manifest. Raises ManifestError for a source that cannot be read at all."""
    if not paths:
        raise ManifestError(f"name a source: a folder, a manifest ({KINDS}) or shards.")
    found = Listing()
    samples: dict[object, Sample] = {}  # by where they are, so that a file named twice is one
    for path in dict.fromkeys(chain.from_iterable(map(expand, paths))):
        if not path.exists():
            raise ManifestError(f"{path} does not exist{near_file(path)}.")
        if path.is_dir():
            listed = _folder(path, found)
        elif kind := _kind(path):
            listed = [Sample(path, kind, (), path.name)]
        else:
            listed = _rows(path, found, root, (video, image, caption))
        for sample in listed:
            key = os.path.abspath(sample.path) if isinstance(sample.path, Path) else sample.path
            if key not in samples or not samples[key].captions:
                samples[key] = sample
    found.samples = list(samples.values())
    found.missing += sum(not sample.captions for sample in found.samples)
    return found


def _kind(path: Path) -> Literal["video", "image"] | None:
    suffix = path.suffix[1:].lower()
    return kind_of(suffix) or ("video" if suffix in VIDEOS.split() else "image" if suffix in IMAGES.split() else None)


def _captioned(path: Path, skips: list[Skip]) -> list[Sample]:
    try:
        return read_source([path], skipped=skips)
    except ManifestError:  # nothing with a caption, which here is no error; the reasons are in `skips`
        return []


def _folder(top: Path, found: Listing) -> list[Sample]:
    """Media files by name, and the members of the shards; hidden files and folders are not looked at."""
    skips: list[Skip] = []
    captioned = _captioned(top, skips)
    captions = {sample.path: sample.captions for sample in captioned}
    samples, names = [], set()
    entered: set[str] = set()
    for folder, inside, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        # a link to a folder may lead in a circle
        inside[:] = sorted(name for name in inside if not name.startswith(".") and real not in entered)
        if real in entered:
            continue
        entered.add(real)
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            if kind := _kind(path):
                samples.append(Sample(path, kind, captions.get(path, ()), str(path.relative_to(top))))
                names.add(os.fsencode(samples[-1].name).decode("utf-8", "backslashreplace"))  # as a Skip has it
            elif not name.lower().endswith((*SIDECARS, "_stats.json")):
                found.ignored.append(str(path.relative_to(top)))
    _keep([skip for skip in skips if skip.name not in names], found)
    return samples + [sample for sample in captioned if not isinstance(sample.path, Path)]


def _rows(path: Path, found: Listing, root: Path | None, columns: tuple[str, str, str]) -> list[Sample]:
    """Of a shard or a manifest. A row that lacks only its caption still names a file to look at."""
    skips: list[Skip] = []
    if path.name.lower().endswith(TARS):
        samples = _captioned(path, skips)
    else:
        samples = read_manifest([path], root, *columns, skipped=skips)
        others = []
        for skip in skips:
            if skip.reason.endswith(f": empty {columns[2]}"):
                file = (root or path.parent) / skip.name
                samples.append(Sample(file, _kind(file) or "video", (), skip.name))
            else:
                others.append(skip)
        skips = others
    _keep(skips, found)
    return samples


def _keep(skips: list[Skip], found: Listing) -> None:
    bad = [skip for skip in skips if "no caption" not in skip.reason]  # of which members of shards are no fault
    found.missing += len(skips) - len(bad)
    found.bad += bad
