"""The groups of pictures that hold the wanted frames of a clip, as small files for decoders that only take files.

Frames have new, even times and new numbers there. So what containers do to times (edit lists, variable rates, hidden
packets) is settled by our own index, and such a decoder sees no file that PyAV cannot read.
"""

from __future__ import annotations

import io
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import torch
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from smaug.data.decode.contract import DecodeError, Got, Want
from smaug.data.decode.pyav import (
    View,
    colour_matrix,
    index_packets,
    open_media,
    orientation,
    picked,
    pixel_aspect,
    ranges,
    read_packets,
    video_stream,
)
from smaug.data.decode.sizes import sizes

SECONDS = 0.04  # from a frame of a small file to the next

# Written by a struct.pack, and one file for all groups: these codecs begin anew at a key frame, H.264 may look back.
IVF = {"vp8": b"VP80", "vp9": b"VP90", "mjpeg": b"MJPG"}

# Weights of red and blue in luma (ITU-T H.273, table 4).
BT601 = (0.299, 0.114)
WEIGHTS = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
SAME = (2, 5, 6)  # unspecified, and the two names of BT.601


@dataclass(frozen=True, slots=True)
class Piece:
    file: bytes
    frames: list[int]  # numbers of the wanted frames in the file, ascending, by their times
    shown: list[int]  # the same, not counting VP8's hidden packets
    packets: int  # of the file


@dataclass(frozen=True, slots=True)
class Trimmed:
    pieces: list[Piece]
    rows: list[int]  # of each wanted frame its place among the frames of all pieces
    place: tuple[int, int, int, int]  # `View.place` of the stored frame
    turns: int  # quarters to turn frames anticlockwise, after that
    flip: bool  # left to right, after that
    height: int
    width: int
    format: str  # of pixels, FFmpeg's name
    matrix: int  # of colours, numbered as in ITU-T H.273
    tagged: bool  # the stream says its matrix
    full: bool  # luma from 0 to 255

    def upright(self, parts: Sequence[Tensor]) -> Tensor:
        """Squares (F, size, size, 3) of the pieces -> the wanted frames, turned; `flip` is for the caller."""
        frames = parts[0] if len(parts) == 1 else torch.cat([*parts])
        if self.rows != list(range(len(frames))):
            frames = frames[self.rows]
        return torch.rot90(frames, self.turns, (1, 2)).contiguous() if self.turns else frames


def trim(want: Want, size: int, seconds: float, check: Callable[[str], None], name: str) -> Trimmed | Got:
    """Got if no frames are wanted. `check` raises DecodeError for a codec, FFmpeg's name, that `name` cannot decode."""
    until = time.monotonic() + seconds
    with open_media(want.media, until) as container:
        stream = video_stream(container)
        context = stream.codec_context
        context.thread_count, context.thread_type = 1, "NONE"
        codec = context.codec.canonical_name
        check(codec)
        index = index_packets(container, stream, until)
        if not index.timed:
            raise DecodeError(f"{name} cannot tell its frames apart: not every one has a time")
        pts = [moment or 0 for moment in index.pts]  # None: only of a packet that is not shown
        wanted = [index.shown[frame] for frame in picked(want.pick, index.times(stream))]
        if not wanted:
            return Got(torch.empty((0, size, size, 3), dtype=torch.uint8), "", name)
        # At the end of a file that begins with an open group, FFmpeg 5 loses frames of H.264 that it holds back. Four
        # more packets push them out; a decoder that does not need them does not come that far.
        more = 4 if codec == "h264" else 0
        # Frames that follow a key frame and are shown before it need the group before, which is not there.
        stretches = [
            [position for position in range(first, min(last + more + 1, len(pts))) if pts[position] >= pts[first]]
            for first, last in ranges(index, wanted)
        ]
        kept = {position for stretch in stretches for position in stretch}
        if not kept.issuperset(wanted):
            raise DecodeError("damaged: a wanted frame has no key frame before it")
        packets = {
            position: packet
            for position, packet in enumerate(read_packets(want.media, index, until))
            if position in kept
        }
        # For what such decoders do not tell: the turn, and how colours are stored; 1 of 45 ms a clip.
        looks = stretches[:1] if codec in IVF else stretches
        keys = [_key_frame(context, packets[stretch[0]], name) for stretch in looks]
        frame = keys[0]
        found = {(one.width, one.height) for one in keys}
        if codec in IVF:
            found.update(size for packet in packets.values() for size in sizes(codec, bytes(packet)))
        if len(found) > 1:
            raise DecodeError(f"its frames have several sizes, which {name} does not notice")
        if codec in IVF:
            stretches = [[position for stretch in stretches for position in stretch]]
        pieces: list[Piece] = []
        order: list[int] = []
        for stretch in stretches:
            number = {position: i for i, position in enumerate(sorted(stretch, key=pts.__getitem__))}
            hidden = [number[p] for p in stretch if codec == "vp8" and not bytes(packets[p])[0] & 0x10]
            these = sorted({*wanted}.intersection(stretch), key=pts.__getitem__)
            numbered = [(packets[position], number[position]) for position in stretch]
            file = _ivf(IVF[codec], context, numbered) if codec in IVF else _matroska(stream, numbered)
            frames = [number[position] for position in these]
            pieces.append(Piece(file, frames, [n - bisect_left(hidden, n) for n in frames], len(stretch)))
            order += these
        rows = {position: row for row, position in enumerate(order)}
        view = View(size, want.crop, want.flip, pixel_aspect(stream))
        turns, mirrored = orientation(frame, codec)
    return Trimmed(
        pieces,
        [rows[position] for position in wanted],
        view.place(frame.height, frame.width, turns, mirrored),
        turns,
        want.flip != mirrored,
        frame.height,
        frame.width,
        frame.format.name,
        int(colour_matrix(frame) or frame.colorspace),
        colour_matrix(frame) is None,
        frame.color_range == 2,
    )


def recoloured(frames: Tensor, matrix: int) -> Tensor:
    """What BT.601 made of a stream, as its own matrix would have shown it: RGB -> luma and chroma -> RGB.

    Exact but for colours that BT.601 cannot show, very saturated greens and magentas, which were cut at 0 and 255.
    """
    back = torch.linalg.inv(_luma_and_chroma(*WEIGHTS[matrix])) @ _luma_and_chroma(*BT601)
    return (frames.float() @ back.T.to(frames.device)).round_().clamp_(0, 255).byte()


def _luma_and_chroma(red: float, blue: float) -> Tensor:
    luma = torch.tensor([red, 1 - red - blue, blue])
    r, _, b = torch.eye(3)
    return torch.stack([luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)])


def _key_frame(context: VideoCodecContext, packet: Packet, name: str) -> VideoFrame:
    # Where pictures are refreshed bit by bit, what H.264 marks as a key frame is not whole.
    context.flush_buffers()
    try:
        frames = context.decode(packet) + context.decode(None)
    except av.FFmpegError:
        frames = []
    if not frames:
        raise DecodeError(f"its key frames are damaged or not whole, and {name} would not notice")
    return frames[0]


def _ivf(codec: bytes, context: VideoCodecContext, packets: Sequence[tuple[Packet, int]]) -> bytes:
    sides = (context.width, context.height)
    parts = [struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, codec, *sides, 25, 1, len(packets), 0)]
    for packet, number in packets:
        parts += (struct.pack("<IQ", packet.size, number), bytes(packet))
    return b"".join(parts)


def _matroska(stream: VideoStream, packets: Sequence[tuple[Packet, int]]) -> bytes:
    out = io.BytesIO()
    try:
        with av.open(out, "w", format="matroska") as file:
            copy = file.add_stream_from_template(stream, opaque=True)
            copy.set_display_rotation(0)  # or some would turn the frames, and some not
            for position, (packet, number) in enumerate(packets):
                packet.stream, packet.time_base = copy, Fraction(1, 1000)
                packet.pts, packet.duration = 40 * number, 40
                packet.is_keyframe = position == 0  # none other, so that nobody seeks inside
                packet.dts = 40 * (position - 32)  # before every pts: no codec reorders by more than 16 frames
                file.mux(packet)
    except (av.FFmpegError, ValueError):
        raise DecodeError("its packets cannot be written to a Matroska file") from None
    return out.getvalue()
