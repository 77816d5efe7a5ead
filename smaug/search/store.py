"""An index on disk: what is known of each file, and the vectors of its windows. Both files are only appended to.

    INDEX/index.json      what it was made with; `generation` names the two files that count
    INDEX/files-G.jsonl   a line for windows of a file that were embedded, for a file that is bad, for one that is gone
    INDEX/vectors-G.f32   (rows, embed_dim) fp32 unit vectors
    INDEX/ivf-G.faiss     above APPROXIMATE rows: the same vectors in cells
    INDEX/bad.txt         what could not be embedded, and why

A line is written after its vectors are on the disk and holds their checksum, so whatever a crash cuts is as good as not
written. Not data/journal.py: that one takes a file's stamp after the work, forgives a full disk, and forgets no file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from smaug import checkpoint

VERSION = 1  # raise it whenever the same video would give other vectors or another layout
# Rows above which cells are searched, not all vectors: docs/search.md has the times.
APPROXIMATE = 500_000
SEARCHED = 8  # one of so many cells is searched for a query
WASTE = 0.2  # share of rows that belong to no file, or are in no cell, above which all is written or sorted anew

OWN = re.compile(r"index\.json|bad\.txt|files-\d+\.jsonl|vectors-\d+\.f32|ivf-\d+\.faiss")  # names in an index

Window = tuple[float, float]  # seconds from the first frame


@dataclass(frozen=True)
class Made:
    """What an index was made of and with."""

    folder: str
    run: str
    step: int  # of the checkpoint
    weights: int  # CRC-32 of the checkpoint's model.safetensors
    tokenizer: int  # CRC-32 of tokenizer.json
    embed_dim: int
    window: float  # seconds
    version: int = VERSION
    generation: int = 0


@dataclass(slots=True)
class Entry:
    """What is known of a file as it was when it had this size and time."""

    name: str  # path below the folder
    size: int  # bytes
    mtime_ns: int
    kind: str  # "video" or "image"
    of: int = 0  # windows that it has
    windows: list[Window] = field(default_factory=list)  # those that are embedded, from the first on
    rows: list[int] = field(default_factory=list)  # of vectors, one a window
    reason: str = ""  # why there are none
    real: str = ""  # the file's own path, if a link leads to it

    @property
    def whole(self) -> bool:
        return bool(self.reason) or 0 < self.of == len(self.windows)

    def is_of(self, found: os.stat_result) -> bool:
        return (self.size, self.mtime_ns) == (found.st_size, found.st_mtime_ns)


def weights_of(run: Path, step: int) -> tuple[int, int]:
    """What tells two models apart: CRC-32 of a checkpoint's weights, and of the tokenizer."""
    return checkpoint.weights_crc32(run / "checkpoints", step), zlib.crc32((run / "tokenizer.json").read_bytes())


def read_made(index: Path) -> Made:
    """Raises ValueError for a folder that holds no index."""
    path = index / "index.json"
    if not path.exists():
        raise ValueError(f"{index} holds no index: there is no {path}. `python -m smaug.search index` makes one.")
    try:
        row = json.loads(path.read_text())
        if row.get("version") == VERSION:
            return Made(**row)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); make the index anew with --fresh") from None
    raise ValueError(f"{index} was written by another version of smaug; make it anew with --fresh")


def vectors_path(index: Path, generation: int) -> Path:
    return index / f"vectors-{generation}.f32"


def lines_path(index: Path, generation: int) -> Path:
    return index / f"files-{generation}.jsonl"


def cells_path(index: Path, generation: int) -> Path:
    return index / f"ivf-{generation}.faiss"


def read_entries(index: Path, made: Made) -> tuple[dict[str, Entry], np.ndarray]:
    """Entries by name, and the vectors (rows, embed_dim) fp32, read-only; a line that does not hold is left out."""
    path, width = vectors_path(index, made.generation), 4 * made.embed_dim
    rows = path.stat().st_size // width if path.exists() else 0
    vectors = (
        np.memmap(path, np.float32, "r", shape=(rows, made.embed_dim))
        if rows
        else np.empty((0, made.embed_dim), np.float32)
    )
    raw: Any = memoryview(vectors).cast("B") if rows else b""  # type: ignore[arg-type]  # numpy's types forget it
    entries: dict[str, Entry] = {}
    lines = lines_path(index, made.generation)
    for line in lines.read_bytes().splitlines() if lines.exists() else []:
        try:
            row = json.loads(line)
            name: str = row["file"]
            if row.get("gone"):
                entries.pop(name, None)
                continue
            entry = Entry(
                name, row["size"], row["mtime_ns"], row["kind"], row.get("of", 0),
                reason=row.get("reason", ""), real=row.get("real", ""),
            )  # fmt: skip
            if not entry.reason:
                times, first = [(float(a), float(b)) for a, b in row["times"]], int(row["row"])
                block = raw[first * width : (first + len(times)) * width]
                if len(block) != len(times) * width or zlib.crc32(block) != row["crc32"]:
                    continue
                known = entries.get(name)
                if row["at"]:
                    if known is None or (known.size, known.mtime_ns) != (entry.size, entry.mtime_ns):
                        continue
                    if len(known.windows) != row["at"]:
                        continue
                    entry = known
                entry.windows += times
                entry.rows += range(first, first + len(times))
            entries[name] = entry
        except (ValueError, TypeError, KeyError, AttributeError):  # a line that a crash cut
            continue
    return entries, vectors


class Writer:
    """Appends to an index. Holds what is added until `save`, which the caller calls every few seconds."""

    def __init__(self, index: Path, made: Made):
        self.index, self.made = index, made
        self.entries, vectors = read_entries(index, made)
        self.rows = 1 + max((row for entry in self.entries.values() for row in entry.rows), default=-1)
        del vectors  # the file is cut below what was mapped
        self._vectors: IO[bytes] = vectors_path(index, made.generation).open("ab")
        self._vectors.truncate(4 * made.embed_dim * self.rows)  # what no line tells of
        self._lines: IO[bytes] = lines_path(index, made.generation).open("ab")
        self._lines.write(b"\n")  # ends the line that a crash may have cut
        self._ahead: tuple[list[bytes], list[dict[str, Any]]] = ([], [])

    def add(self, entry: Entry, at: int, times: Sequence[Window], vectors: np.ndarray) -> None:
        """Windows `at`, at + 1, ... of a file; `vectors` (len(times), embed_dim) fp32."""
        data = np.ascontiguousarray(vectors, np.float32).tobytes()
        known = self.entries.get(entry.name)
        if at:
            assert known is not None and len(known.windows) == at
            entry = known
        entry.windows += times
        entry.rows += range(self.rows, self.rows + len(times))
        self.entries[entry.name] = entry
        line = _stamp(entry) | {"of": entry.of, "at": at, "row": self.rows, "times": times, "crc32": zlib.crc32(data)}
        self.rows += len(times)
        self._ahead[0].append(data)
        self._ahead[1].append(line)

    def bad(self, entry: Entry) -> None:
        self.entries[entry.name] = entry
        self._ahead[1].append(_stamp(entry) | {"reason": entry.reason})

    def gone(self, name: str) -> None:
        del self.entries[name]
        self._ahead[1].append({"file": name, "gone": True})

    def save(self) -> None:
        """Raises OSError, and what was added since the last call is then not in the index."""
        (data, lines), self._ahead = self._ahead, ([], [])
        text = [json.dumps(line).encode() + b"\n" for line in lines]
        try:
            for file, parts in ((self._vectors, data), (self._lines, text)):  # in this order
                file.write(b"".join(parts))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.index} cannot be written: {error.strerror or error}; "
                "when that is mended the same command goes on"
            ) from None

    def close(self) -> None:
        for file in (self._vectors, self._lines):
            with contextlib.suppress(OSError):  # a full disk; `save` has said so
                file.close()


def _stamp(entry: Entry) -> dict[str, Any]:
    stamp = {"file": entry.name, "size": entry.size, "mtime_ns": entry.mtime_ns, "kind": entry.kind}
    return stamp | ({"real": entry.real} if entry.real else {})


def compact(index: Path, made: Made) -> Made:
    """Writes an index anew without the rows and lines that nothing needs, as the next generation."""
    old, vectors = read_entries(index, made)
    new = replace(made, generation=made.generation + 1)
    _remove(index, lambda generation: generation == new.generation)  # left by a crash
    writer = Writer(index, new)
    try:
        for number, entry in enumerate(old.values()):
            if entry.reason:
                writer.bad(entry)
            else:
                writer.add(replace(entry, windows=[], rows=[]), 0, entry.windows, vectors[entry.rows])
            if number % 1000 == 999:
                writer.save()
        writer.save()
    finally:
        writer.close()
    write_made(index, new)
    return new


def new(index: Path, made: Made) -> None:
    """An empty index of `made.generation`, in the place of what is there."""
    _remove(index, lambda generation: generation == made.generation)  # left by a crash, and perhaps of another model
    write_made(index, made)


def write_made(index: Path, made: Made) -> None:
    """From here on `made.generation` is the one that counts, and the others go."""
    write_whole(index / "index.json", json.dumps(asdict(made), indent=2))
    _remove(index, lambda generation: generation != made.generation)


def _remove(index: Path, which: Callable[[int], bool]) -> None:
    for pattern in ("vectors-*.f32", "files-*.jsonl", "ivf-*.faiss"):
        for path in index.glob(pattern):
            if OWN.fullmatch(path.name) and which(int(path.stem.rpartition("-")[2])):
                path.unlink()


def write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def claimed(index: Path) -> Iterator[None]:
    """The folder, for this process alone."""
    try:
        index.mkdir(parents=True, exist_ok=True)
        lock = (index / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"{index} cannot be written: {error.strerror}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes {index}; wait for it or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


def faiss() -> Any:
    """The module, or ValueError with the line that installs it."""
    try:
        import faiss as module
    except ImportError as error:
        raise ValueError(f"searching needs faiss ({error}): pip install 'smaug[search]'") from None
    return module


def build_cells(index: Path, made: Made) -> None:
    """The approximate index over all rows of the current generation: 4 sqrt(rows) cells (faiss IVFFlat)."""
    module = faiss()
    _, vectors = read_entries(index, made)
    rows, width = vectors.shape
    cells = max(1, min(int(4 * rows**0.5), rows // 40))  # faiss wants 39 vectors a cell to train on
    ivf = module.IndexIVFFlat(module.IndexFlatIP(width), width, cells, module.METRIC_INNER_PRODUCT)
    ivf.cp.niter = 10
    ivf.train(vectors[np.sort(np.random.default_rng(0).permutation(rows)[: 40 * cells])])
    for first in range(0, rows, 65536):
        ivf.add(np.ascontiguousarray(vectors[first : first + 65536]))
    ivf.nprobe = max(1, cells // SEARCHED)
    path = cells_path(index, made.generation)
    aside = path.with_name(f".{path.name}.aside")
    module.write_index(ivf, str(aside))
    os.replace(aside, path)


def read_cells(index: Path, made: Made) -> Any:
    """faiss's index, or None."""
    path = cells_path(index, made.generation)
    return faiss().read_index(str(path)) if path.exists() else None
