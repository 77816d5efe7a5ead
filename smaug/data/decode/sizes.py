"""The frame size in the headers of VP8, VP9 and MJPEG packets, for decoders that trust it never to change.

A stream may change it, and so may a flipped bit. DALI 2.4.0 then shows memory that it never wrote, or dies reading
beyond it, so one clip would end a run.
"""

from __future__ import annotations

from collections.abc import Iterator

Sizes = Iterator[tuple[int, int]]  # (width, height) of the frames of a packet that say it


def sizes(codec: str, data: bytes) -> Sizes:
    return {"vp8": _vp8, "vp9": _vp9, "mjpeg": _mjpeg}[codec](data)


def _vp8(data: bytes) -> Sizes:
    """RFC 6386, section 9.1. A key frame's tag is followed by a start code and two times 14 bits of size."""
    if len(data) >= 10 and not data[0] & 1:
        yield int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF


def _mjpeg(data: bytes) -> Sizes:
    """ITU-T T.81, annex B. Segments up to the scan; a frame header has precision, height and width."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if 0xC0 <= data[at + 1] <= 0xC3:
            yield int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _vp9(data: bytes) -> Sizes:
    """VP9 bitstream specification, annex B: a packet may hold several frames, with an index of their lengths behind."""
    mark = data[-1] if data else 0
    count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
    index = data[-2 - count * width :]
    if mark >> 5 != 6 or index[0] != mark:
        yield from _vp9_frame(data)
        return
    at = 0
    for i in range(count):
        yield from _vp9_frame(data[at:])
        at += int.from_bytes(index[1 + i * width : 1 + (i + 1) * width], "little")


def _vp9_frame(data: bytes) -> Sizes:
    """The same, section 6.2. A frame has a size of its own, or that of a frame it refers to, and says nothing."""
    bits = format(int.from_bytes(data[:24].ljust(24, b"\0"), "big"), "0192b")
    profile = int(bits[3] + bits[2], 2)
    at = 5 if profile == 3 else 4
    if bits[at] == "1":  # a frame shown before
        return
    inter, shown, resilient = (bit == "1" for bit in bits[at + 1 : at + 4])
    at += 4
    alone = not inter
    if inter:
        if not shown:
            alone = bits[at] == "1"
            at += 1
        at += 0 if resilient else 2
    if alone:
        at += 24  # the sync code
        if not inter or profile > 0:  # how colours are stored
            at += profile >= 2
            rgb = bits[at : at + 3] == "111"
            at += 3 + (profile % 2 if rgb else 1 + 3 * (profile % 2))
        at += 8 if inter else 0
    else:
        at += 8 + 12
        if "1" in bits[at : at + 3]:
            return
        at += 3
    yield int(bits[at : at + 16], 2) + 1, int(bits[at + 16 : at + 32], 2) + 1
