"""What a long job over many files has done, a line for each, so that it can go on where it was stopped."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smaug.data.media import Media, Member

R = TypeVar("R")


class Journal(Generic[R]):
    """Records of the dataclass `kind` about files, each good for as long as the file keeps its size and time.

    A line that cannot be read is as good as none, and so is a journal that cannot be written: `warn` is told once.
    """

    def __init__(self, path: Path, kind: Callable[..., R], warn: Callable[[str], None], fresh: bool = False):
        self.path, self.warn = path, warn
        self._known: dict[tuple[str, int, int], R] = {}
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in [] if fresh or not path.exists() else path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    row = json.loads(line)
                    self._known[(row["file"], row["size"], row["mtime_ns"])] = kind(**row["record"])
            self._file = path.open("wb" if fresh else "ab")
            self._write(b"\n")  # ends the line that a crash may have cut
        except OSError as error:
            self._lost(error)

    def get(self, media: Media) -> R | None:
        stamp = _stamp(media)
        return None if stamp is None else self._known.get(stamp)

    def add(self, media: Media, record: R) -> None:
        """From any thread."""
        if (stamp := _stamp(media)) is not None:
            row = {**dict(zip(("file", "size", "mtime_ns"), stamp, strict=True)), "record": asdict(record)}  # type: ignore[call-overload]
            self._write(json.dumps(row).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                self._lost(error)

    def _lost(self, error: OSError) -> None:
        self._file = None
        self.warn(f"{self.path} cannot be written ({error.strerror or error}); stopped now, the work starts anew.")


def _stamp(media: Media) -> tuple[str, int, int] | None:
    """Name, size and time of change; None for what is not there."""
    if isinstance(media, bytes):
        return None
    path, where = (media.tar, f"\0{media.offset}+{media.size}") if isinstance(media, Member) else (media, "")
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return os.path.abspath(path) + where, found.st_size, found.st_mtime_ns


def bar(note: Callable[[], str]) -> Progress:
    """On stderr, and only where a person looks at it. `note` is said at the end of the line."""

    class Note(TextColumn):
        def render(self, task: Any) -> Any:
            return super().render(task).append(note())

    console = Console(stderr=True, markup=False)
    return Progress(
        TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), Note(""),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


def one_line(name: str) -> str:
    """A file's name on one line of a terminal: control characters and bytes that are not UTF-8 are escaped."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
