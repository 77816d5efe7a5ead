"""Your own data: a table of files and captions becomes a list of samples.

One row is one video or image with a caption; the columns are `video` or `image`, and `caption`, unless told otherwise.
CSV, TSV and Parquet have a header; JSONL has one object a line, whose caption may be a list. Several rows with the same
file become one sample with several captions. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smaug.data.media import Member, media_reason

KINDS = ".csv, .tsv, .jsonl or .parquet"


class ManifestError(ValueError):
    """A manifest that cannot be read: one sentence that says what, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One file and what is said of it, or what is asked about it."""

    path: Path | Member
    kind: Literal["video", "image"]
    captions: tuple[str, ...]  # at least one, none empty, in the order of the manifest; of a question: its words
    name: str  # as the manifest has it
    answers: tuple[str, ...] = ()  # of a question: what counts as right, the first is trained on
    options: tuple[str, ...] = ()  # of a multiple choice: the texts of which one tells of the file
    type: str = ""  # of a question, "" if it has none


@dataclass(frozen=True, slots=True)
class Skip:
    """A row or a file that is not trained on, and why."""

    name: str  # a file as the manifest has it, or "manifest.csv:12" for a row that names none
    reason: str


def read_manifest(
    paths: Sequence[Path],
    root: Path | None,
    video_column: str = "video",
    image_column: str = "image",
    caption_column: str = "caption",
    *,
    skipped: list[Skip] | None = None,
) -> list[Sample]:
    """Samples of all manifests, in order of first mention; files are not looked at (`check_files` does that).

    File names are relative to `root`, by default to the folder of their manifest. A manifest needs a caption column and
    one of the video and image columns; with both, each row fills one of them. Rows that cannot be used (no file, no
    caption, a comma that was not quoted) are appended to `skipped`.

    Raises ManifestError if a manifest is missing, unreadable, of an unknown kind, lacks a column or has no usable row.
    """
    if root is not None and not root.is_dir():
        raise ManifestError(f"{root} is not a folder; --data.root is the folder that the manifest's names start from.")
    skips: list[Skip] = []
    captions: dict[tuple[str, str], list[str]] = {}  # (kind, path) -> captions
    names: dict[tuple[str, str], str] = {}
    columns = (video_column, image_column, caption_column)
    for manifest in paths:
        folder = str(manifest.parent if root is None else root)
        rows = used = 0
        first_skip = len(skips)
        for where, row in _rows(manifest, columns):
            rows += 1
            sample = _sample(where, row, columns)
            if isinstance(sample, Skip):
                skips.append(sample)
                continue
            used += 1
            kind, name, texts = sample
            key = (kind, os.path.normpath(os.path.join(folder, name)))
            names.setdefault(key, name)
            captions.setdefault(key, []).extend(texts)
        if not rows:
            raise ManifestError(f"{manifest} has no rows: give one row a video or image, with its caption.")
        if not used:
            first = skips[first_skip]
            raise ManifestError(f"{manifest} has no usable row among {rows}; the first, {first.name}: {first.reason}.")
    if skipped is not None:
        skipped += skips
    return [
        Sample(Path(key[1]), "video" if key[0] == "video" else "image", tuple(texts), names[key])
        for key, texts in captions.items()
    ]


def check_files(samples: Sequence[Sample]) -> tuple[list[Sample], list[Skip]]:
    """Samples whose file is there, not empty and readable, and the others with the reason. One stat a file."""
    present: list[Sample] = []
    skipped: list[Skip] = []
    for sample in samples:
        if reason := media_reason(sample.path):
            skipped.append(Skip(sample.name, reason))
        else:
            present.append(sample)
    return present, skipped


def clean(said: Sequence[Any]) -> list[str]:
    """Texts that say something; halves of surrogate pairs, which JSON may hold and UTF-8 may not, become U+FFFD."""
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in said if type(text) is str]
    return [text.strip() for text in texts if text.strip()]


def _sample(where: str, row: dict[str, Any] | str, columns: tuple[str, str, str]) -> tuple[str, str, list[str]] | Skip:
    """(kind, file name, captions) of a row, or why it has none. `row` is a string if it could not be split."""
    if isinstance(row, str):
        return Skip(where, row)
    video_column, image_column, caption_column = columns
    video, image, caption = (row.get(column) for column in columns)
    files = [
        (kind, file.strip())
        for kind, file in (("video", video), ("image", image))
        if isinstance(file, str) and file.strip()
    ]
    if not files:
        wrong = [value for value in (video, image) if value is not None and not isinstance(value, str)]
        return Skip(where, f"a file name must be text, not {wrong[0]!r}" if wrong else "no file name")
    if len(files) == 2:
        return Skip(where, f"names a file under {video_column!r} and under {image_column!r}; use two rows")
    kind, name = files[0]
    said = caption if isinstance(caption, list) else [caption]
    if wrong := [value for value in said if value is not None and not isinstance(value, str)]:
        return Skip(name, f"{where}: a caption must be text, not {wrong[0]!r}")
    texts = clean(said)
    return (kind, name, texts) if texts else Skip(name, f"{where}: empty {caption_column}")


def _rows(manifest: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, row) of a manifest; a row that cannot be split into columns is a string that says why."""
    readers = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(manifest.suffix.lower())
    if reader is None:
        hint = ", one object a line" if manifest.suffix.lower() == ".json" else ""
        raise ManifestError(
            f"{manifest}: a manifest ends in {KINDS}, not {manifest.suffix or 'nothing'!r}; "
            f"convert or rename it (.jsonl for JSON{hint})."
        )
    try:
        yield from reader(manifest, columns)
    except FileNotFoundError:
        raise ManifestError(f"{manifest} does not exist; check --data.manifest{near_file(manifest)}.") from None
    except IsADirectoryError:
        raise ManifestError(f"{manifest} is a folder; --data.manifest takes a file ({KINDS}).") from None
    except PermissionError:
        raise ManifestError(f"{manifest} may not be read by this user; change its permissions.") from None
    except OSError as error:
        raise ManifestError(f"{manifest} cannot be read: {error.strerror or error}; write or copy it again.") from None
    except UnicodeDecodeError:
        raise ManifestError(
            f"{manifest}, line {line_not_utf8(manifest)}, is not UTF-8; save the file as UTF-8, "
            f"for example: iconv -f latin1 -t utf-8 {manifest.name} > utf8{manifest.suffix}"
        ) from None


def _csv_rows(manifest: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    yield from _split(manifest, columns, csv.excel)


def _tsv_rows(manifest: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Quoted where every quote pairs up, as pandas writes it; else every quote is itself, as web data sets have it."""
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        try:
            for _ in csv.reader(file, csv.excel_tab, strict=True):
                pass
            dialect: type[csv.Dialect] = csv.excel_tab
        except csv.Error:
            dialect = _PlainTab
    yield from _split(manifest, columns, dialect)


class _PlainTab(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _split(
    manifest: Path, columns: tuple[str, str, str], dialect: type[csv.Dialect]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        # strict: a quote that is never closed would swallow the rest of the file as one caption
        reader = csv.reader(file, dialect, strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
            if not header:
                return
            _check_columns(manifest, header, columns, "its first line has")
            for fields in reader:
                where = f"{manifest.name}:{reader.line_num}"
                if not any(field.strip() for field in fields):
                    continue  # a blank line is no row
                if len(fields) > len(header):
                    yield (
                        where,
                        f"{len(fields)} fields in {len(header)} columns; quote a caption with commas",
                    )
                else:
                    yield where, dict(zip(header, fields, strict=False))
        except csv.Error as error:
            raise ManifestError(
                f"{manifest}:{reader.line_num}: {error}; close every quote, and double it inside a quoted caption."
            ) from None


def _jsonl_rows(manifest: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    seen: dict[str, None] = {}  # columns, in order of appearance
    rows = 0
    with manifest.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # a JSONDecodeError, or a number of thousands of digits
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ManifestError(f"{manifest}:{number}: not JSON ({reason}); write one object a line.") from None
            except RecursionError:
                raise ManifestError(f"{manifest}:{number}: nested too deeply; write one flat object a line.") from None
            if not isinstance(row, dict):
                raise ManifestError(
                    f"{manifest}:{number}: a {type(row).__name__} where an object is needed, "
                    f'such as {{"{columns[0]}": "a.mp4", "{columns[2]}": "A dog runs."}}.'
                )
            seen.update(dict.fromkeys(row))
            rows += 1
            yield f"{manifest.name}:{number}", row
    if rows:  # an object may lack a key, but one that all lack is a wrong name
        _check_columns(manifest, list(seen), columns, "its objects have")


def _parquet_rows(manifest: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ManifestError(f"{manifest}: reading Parquet needs pyarrow; install it: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(manifest) as file:
            _check_columns(manifest, file.schema_arrow.names, columns, "its schema has")
            needed = [column for column in columns if column in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(columns=needed):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{manifest.name}, row {number}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ManifestError(f"{manifest} is not a whole Parquet file ({reason}); write or copy it again.") from None


def _check_columns(manifest: Path, found: list[str], columns: tuple[str, str, str], who_has: str) -> None:
    video, image, caption = columns
    if caption not in found:
        problem = f"no column {caption!r}"
        flags: dict[str, tuple[str, ...]] = {"--data.caption-column": (caption, "caption", "text", "sentence", "name")}
    elif video not in found and image not in found:
        problem = f"no column {video!r} or {image!r}"
        flags = {
            "--data.video-column": (video, "video", "path", "file", "clip"),
            "--data.image-column": (image, "image", "picture"),
        }
    else:
        return
    free = {column.lower(): column for column in found if column not in columns}
    hints = []
    for flag, names in flags.items():
        near = [hit for name in names for hit in difflib.get_close_matches(name.lower(), free, n=1)]
        hints += [f"{flag} {free[near[0]]}"] if near else []
    advice = f"perhaps {' or '.join(hints)}" if hints else f"say which one it is with {' or '.join(flags)}"
    raise ManifestError(f"{manifest}: {problem}; {who_has} {', '.join(map(repr, found)) or 'nothing'}; {advice}.")


def near_file(manifest: Path) -> str:
    """'; did you mean x.csv' if its folder has something like it."""
    try:
        beside = [path.name for path in manifest.parent.iterdir()]
    except OSError:
        return f"; there is no folder {manifest.parent} either"
    near = difflib.get_close_matches(manifest.name, beside, n=1)
    return f"; did you mean {near[0]}" if near else ""


def line_not_utf8(manifest: Path) -> int:
    with manifest.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
