"""Where an encoded clip or picture lies: a file, a member of a tar archive, or bytes in memory."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar archive, read without unpacking."""

    tar: Path
    offset: int  # bytes from the start of the archive to the first byte of the file
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.tar}, bytes {self.offset} to {self.offset + self.size}"


Media = Path | Member | bytes

# What a name's ending says of a file in a folder or in a shard; a manifest says it by its columns instead.
VIDEOS = {"3gp", "avi", "flv", "gif", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm", "wmv"}
IMAGES = {"avif", "bmp", "jpeg", "jpg", "png", "tif", "tiff", "webp"}


def kind_of(suffix: str) -> Literal["video", "image"] | None:
    """`suffix` without its dot, in any case; None: neither."""
    ending = suffix.lower()
    return "video" if ending in VIDEOS else "image" if ending in IMAGES else None


def printable(name: str) -> str:
    """A file's name for a person; bytes that are not UTF-8, which no terminal or JSON takes, as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_bytes(media: Media) -> bytes:
    """All of it, in memory. Raises OSError; a member that the archive does not wholly hold is an OSError too."""
    if isinstance(media, bytes):
        return media
    if isinstance(media, Path):
        return media.read_bytes()
    with media.tar.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), media.size, media.offset)
    if len(data) < media.size:
        raise OSError(f"{media.tar.name} ends before its member does")
    return data


def size_of(media: Media) -> int:
    """Bytes. Raises OSError."""
    if isinstance(media, bytes):
        return len(media)
    return media.size if isinstance(media, Member) else media.stat().st_size


def media_reason(media: Media) -> str:
    """Why there is nothing to decode; "" if it seems that there is. One stat for a file or an archive."""
    if isinstance(media, bytes):
        return "" if media else "0 bytes"
    if isinstance(media, Member):
        return file_reason(media.tar) or ("" if media.size else "0 bytes")
    return file_reason(media)


def file_reason(path: Path) -> str:
    """Why a file cannot be read; "" if it seems that it can."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "file not found"
    except PermissionError:
        return "no permission to read"
    except (OSError, ValueError) as error:  # a name too long, a loop of links; ValueError: a null character in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISDIR(found.st_mode):
        return "is a directory"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"  # opening a pipe would wait for ever
    if found.st_size == 0:
        return "0 bytes"
    if not os.access(path, os.R_OK):
        return "no permission to read"
    return ""
