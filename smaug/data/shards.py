"""Tar shards, as video2dataset and webdataset write them, read where they lie: an index of a shard, kept for next time.

A sample is the run of members that share a key, the name up to the first dot of its last part: `000000000.mp4`,
`000000000.txt` and `000000000.json`. Only headers, captions and metadata are read; a clip is the place it has in the
shard. What cannot be used is a Skip that says why, and nothing in a shard can raise.

A header is parsed here and not by `tarfile`, which takes three times as long and reads into memory whatever size an
extended header claims.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smaug.data import shapes
from smaug.data.manifest import Sample, Skip, clean
from smaug.data.media import Member, file_reason, kind_of, printable

MAX_TEXT = 2**20  # bytes of a caption, of metadata or of an extended header; longer ones are not what they claim to be
VERSION = 1  # raise it whenever the same shard would be indexed differently
COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
BLOCK = 512
EXTENDED = b"xXLKg"  # types of headers that tell something of the next member
LEADS_OUT = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")
LINKS_AND_DEVICES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class _DamagedError(Exception):
    """From here on a shard cannot be read."""


class _Entry(NamedTuple):
    """What one header of a shard says."""

    name: str
    kind: bytes  # the type flag
    header: int  # byte of the shard where its header begins
    offset: int  # and where its data does
    size: int


def read_shard(tar: Path) -> tuple[list[Sample], list[Skip]]:
    """`index_shard`, from the cache folder if the shard was there before with the same size and time."""
    try:
        found = tar.stat()
    except (OSError, ValueError):
        return index_shard(tar)
    known = f"{VERSION} {os.path.abspath(tar)} {found.st_size} {found.st_mtime_ns}"
    digest = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()
    cached = shapes.cache_folder() / "index" / f"{digest[:32]}.json.gz"
    try:
        rows, skipped = json.loads(gzip.decompress(cached.read_bytes()))  # gzip's own checksum guards it
        samples = [
            Sample(Member(tar, offset, size), kind, tuple(captions), name)
            for name, kind, offset, size, captions in rows
        ]
        return samples, [Skip(*skip) for skip in skipped]
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        pass  # not there, or damaged: made anew
    samples, skips = index_shard(tar)
    rows = [[s.name, s.kind, s.path.offset, s.path.size, s.captions] for s in samples]  # type: ignore[union-attr]
    aside = cached.with_name(f".{cached.name}.aside-{socket.gethostname()}-{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(gzip.compress(json.dumps([rows, [[s.name, s.reason] for s in skips]]).encode(), 1))
        os.replace(aside, cached)
    except OSError:  # a full or read-only cache folder costs the time of the next start, not this run
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return samples, skips


def index_shard(tar: Path) -> tuple[list[Sample], list[Skip]]:
    """Samples in the order of the shard, and what is not used. Of a damaged shard, the samples before the damage.

    Captions are the list `captions` of the sample's .json, else its .txt, else `caption` of the .json. Bytes that are
    not UTF-8 become U+FFFD. Members that are links or devices, or whose names lead out of the shard, are refused.
    """
    shard = printable(tar.name)
    if reason := file_reason(tar):
        return [], [Skip(shard, reason)]
    samples: list[Sample] = []
    skipped: list[Skip] = []
    seen: set[str] = set()
    key, parts = "", dict[str, _Entry]()

    def close() -> None:
        """The group of members read so far becomes a sample, unless something is wrong with it."""
        if not parts:
            return
        name = f"{shard}:{key}"
        made: Sample | str
        if key in seen:
            made = "its key came before, and the first is used; members of one sample lie together: tar --sort=name"
        else:
            made = _sample(tar, file, name, parts)
        seen.add(key)
        if isinstance(made, str):
            skipped.append(Skip(name, made))
        else:
            samples.append(made)

    try:
        with tar.open("rb", buffering=0) as opened:
            file = opened.fileno()
            try:
                for entry in _entries(file):
                    folder, slash, last = entry.name.rpartition("/")
                    stem, _, suffix = last.partition(".")
                    if reason := _refusal(entry):
                        skipped.append(Skip(f"{shard}:{entry.name}", f"refused: {reason}"))
                    elif stem and suffix and entry.kind != b"5":  # without a stem: a hidden file
                        if key != folder + slash + stem:
                            close()
                            key, parts = folder + slash + stem, {}
                        if suffix.lower() in parts:
                            skipped.append(Skip(f"{shard}:{entry.name}", "comes a second time; the first is used"))
                        else:
                            parts[suffix.lower()] = entry
            except _DamagedError as error:
                skipped.append(Skip(shard, str(error)))
            close()
    except OSError as error:
        skipped.append(Skip(shard, f"cannot be read: {error.strerror or error}"))
    return samples, skipped


def _entries(file: int) -> Iterator[_Entry]:
    """Every member of a shard, whose data the file wholly holds. Each header lies after the one before, so it ends."""
    end = os.fstat(file).st_size
    at = 0
    extended: dict[str, bytes] = {}  # for the member that follows
    while True:
        block = os.pread(file, BLOCK, at)
        if len(block) < BLOCK:
            raise _DamagedError(f"truncated: ends at byte {end} without the mark that ends a tar")
        if not block.strip(b"\0"):
            return
        try:
            # The checksum counts itself as eight spaces.
            if sum(block) - sum(block[148:156]) + 256 != _number(block[148:156]):
                raise ValueError
            kind, header, offset = block[156:157], at, at + BLOCK
            own = kind in EXTENDED or "size" not in extended
            size = _number(block[124:136]) if own else int(extended["size"])
            # links, devices and folders have a size at times, and never data
            stored = 0 if kind == b"5" or kind in LINKS_AND_DEVICES else size
            if size < 0 or kind == b"S":  # S: sparse, in a form whose data does not lie in one piece
                raise ValueError
        except ValueError:
            for magic, command in COMPRESSED.items():
                if at == 0 and block.startswith(magic):
                    raise _DamagedError(f"compressed, so no clip can be read alone; unpack it: {command}") from None
            raise _DamagedError(f"damaged at byte {at}: no header of a plain tar") from None
        at = offset + -(-stored // BLOCK) * BLOCK
        if offset + stored > end:
            raise _DamagedError(f"truncated: a member at byte {header} needs {offset + stored} bytes, there are {end}")
        if kind in EXTENDED:
            if kind in b"xXL":  # the others name what a link leads to, or hold for a whole archive
                if size > MAX_TEXT:
                    raise _DamagedError(f"damaged at byte {header}: an extended header of {size} bytes")
                data = os.pread(file, size, offset)
                try:
                    extended |= {"path": data.rstrip(b"\0")} if kind == b"L" else _records(data)
                except ValueError:
                    raise _DamagedError(f"damaged at byte {header}: an extended header without sense") from None
            continue
        name = block[:100].split(b"\0")[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        name = extended.get("path", name)
        if "sparse" in extended:
            kind = b"S"
        elif kind == b"\0" and name.endswith(b"/"):
            kind = b"5"  # tars of the seventies have no type for a folder
        extended = {}
        # backslashreplace: names that differ stay different, and each can be printed
        yield _Entry(name.decode("utf-8", "backslashreplace").removeprefix("./"), kind, header, offset, stored)


def _number(field: bytes) -> int:
    """Octal digits, or from 8 GiB on a number of base 256. ValueError if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field, signed=True) if field[0] == 0xFF else int.from_bytes(field[1:])
    return int(field.strip(b" \0") or b"0", 8)


def _records(data: bytes) -> dict[str, bytes]:
    """What matters of an extended header of POSIX.1-2001, lines of `length key=value`. ValueError if it is none."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 8].split(b" ")[0]
        length = int(digits)
        if not len(digits) < length <= len(data) - at:
            raise ValueError
        name, _, value = data[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = value
        elif name.startswith(b"GNU.sparse."):
            found["sparse"] = value
        at += length
    return found


def _refusal(entry: _Entry) -> str:
    """Why a member is not looked at, "" if it is. Nothing is unpacked, so this only keeps others from harm."""
    if LEADS_OUT.search(entry.name):
        return "its name leads out of the shard"
    if re.search(r"[\0-\x1f\x7f]", entry.name):
        return "its name has control characters"
    if entry.kind not in b"057\0":
        return LINKS_AND_DEVICES.get(entry.kind, "not a plain file; pack it anew without --sparse")
    return ""


def _sample(tar: Path, file: int, name: str, parts: dict[str, _Entry]) -> Sample | str:
    """What a group of members makes, or why it makes nothing."""
    kinds = {suffix: kind for suffix in parts if (kind := kind_of(suffix))}
    # a picture beside a video is its thumbnail
    media = next((s for kind in ("video", "image") for s, k in kinds.items() if k == kind), None)
    if media is None:
        return f"no video or image (has .{', .'.join(list(parts)[:5])})"
    if not parts[media].size:
        return "0 bytes"
    large = [s for s in ("txt", "json") if s in parts and parts[s].size > MAX_TEXT]
    text, record = (
        os.pread(file, parts[s].size, parts[s].offset) if s in parts and s not in large else b""
        for s in ("txt", "json")
    )
    several, one = json_captions(record)
    captions = several or clean([text.decode("utf-8-sig", "replace")]) or one
    if not captions:
        return f"its .{large[0]} has more than {MAX_TEXT >> 20} MiB" if large else "no caption in a .txt or .json"
    return Sample(Member(tar, parts[media].offset, parts[media].size), kinds[media], tuple(captions), name)


def json_captions(data: bytes) -> tuple[list[str], list[str]]:
    """What metadata has under `captions`, a list, and under `caption`, a text or a list. Empty if it is not so."""
    try:
        record: Any = json.loads(data.decode("utf-8-sig", "replace") or "{}")
    except (ValueError, RecursionError):
        return [], []
    if not isinstance(record, dict):
        return [], []
    several, one = record.get("captions"), record.get("caption")
    return clean(several if isinstance(several, list) else []), clean(one if isinstance(one, list) else [one])
