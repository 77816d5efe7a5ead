"""Video through PyAV, FFmpeg inside: always there, every codec, exact.

The packets of a clip are read once, which costs no decoding and tells how many frames there are and when each is shown;
only the groups of pictures that hold a wanted frame are then decoded, each from its key frame to its last wanted frame.
The groups are found among the packets, not by seeking in the file, so no container's idea of seeking can be wrong.

Everything here may be called from many threads at once; FFmpeg releases the GIL while it decodes and resizes.
"""

from __future__ import annotations

import io
import math
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from smaug.data.decode.contract import MAX_DECODED, MAX_PIXELS, MAX_SECONDS, DecodeError, Got, Want, too_large
from smaug.data.decode.images import read_image
from smaug.data.decode.threads import Threads
from smaug.data.frames import Crop, Pick
from smaug.data.media import Media, Member, media_reason

HELD_BYTES = 64 * 2**20  # packets of a clip up to this size stay in memory; a larger file is read twice
AROUND = 800  # bytes that a packet takes beside its data
MAX_FRAMES = 2**20  # of one clip: ten hours at 29 frames a second; their times take 100 MB
TOO_LONG = "takes too long to decode; stopped"
ASPECTS = (1 / 4, 4)  # pixels that are longer than this are a damaged header, not an anamorphic film

# Containers that are one file. FFmpeg also plays lists (HLS, concat, SDP, a numbered series of pictures), which would
# have us read other files or wait for the network, and shows any text as letters on a screen ("tty").
CONTAINERS = (
    "apng,asf,av1,avi,bmp_pipe,dirac,dv,flv,gif,gxf,h261,h263,h264,hevc,ivf,jpeg_pipe,live_flv,m4v,matroska,mjpeg,mov,"
    "mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,png_pipe,rm,swf,vc1,vvc,webp_pipe,wtv,yuv4mpegpipe"
)

UNSPECIFIED = 2  # matrix of a frame whose file does not say

# swscale without FULL_CHR_H_INT goes through a table that darkens limited-range video by 1.5 levels of 255.
FILTER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT

# 8 bits and a quarter of the chroma, as nearly all video has it, and the same with all of it
COMMON = {"yuv420p": "yuv444p", "yuvj420p": "yuvj444p"}


class PyavDecoder:
    """Clips in threads, one clip a thread. Frames are in host memory."""

    name = "pyav"

    def __init__(self, workers: int = 2, seconds: float = MAX_SECONDS):
        self.seconds = seconds
        self.threads = Threads(workers, 2 * seconds + 1)  # its own limit comes first wherever FFmpeg comes back

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        return self.threads.map(lambda want: self._one(want, size), wants, self._late)

    def _one(self, want: Want, size: int) -> Got:
        try:
            if want.kind == "image":
                frames = read_image(want.media, size, crop=want.crop, flip=want.flip)
            else:
                frames = read_frames(want.media, want.pick, size, crop=want.crop, flip=want.flip, seconds=self.seconds)
        except DecodeError as error:
            return Got(None, error.reason, self.name)
        return Got(torch.from_numpy(frames), "", self.name)

    def _late(self, want: Want) -> Got:
        return Got(None, f"does not come back from decoding; left alone after {self.threads.seconds:.0f} s", self.name)

    def close(self) -> None:
        self.threads.close()


def read_frames(
    source: Media | str,
    pick: Pick,
    size: int,
    *,
    crop: Crop | None = None,
    flip: bool = False,
    out: np.ndarray | None = None,
    threads: int = 1,
    seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Wanted frames of a video: (F, size, size, 3) uint8, RGB with levels 0 to 255.

    `pick` gets the times of the frames (n,), n > 0, seconds from the first, in presentation order, and returns F
    indices in [0, n); any order, repeats allowed. It is called a second time, with the true n, if the packets had
    promised another number. Frames are turned upright and wide pixels shown wide; `crop` of them, or the middle square,
    is resized to `size` by an antialiased bicubic filter, and turned left to right with `flip`. The clip is the video
    stream that players show: the first by default, and no cover picture. `out`, if given, is filled and returned.
    `threads` of the decoder: one where many clips are decoded at once, since two cost a fifth more processor time for
    the same clips. Levels of HDR video come as they are coded: nothing maps its tones to those of a common screen.

    Raises DecodeError for everything that can be wrong with the file, and when decoding takes longer than `seconds`;
    ValueError for a wrong `pick` or `out`.
    """
    source = Path(source) if isinstance(source, str) else source
    until = time.monotonic() + seconds
    with open_media(source, until) as container:
        stream = video_stream(container)
        context = stream.codec_context
        context.thread_count = threads
        context.thread_type = "NONE" if threads == 1 else "AUTO"
        index = index_packets(container, stream, until)
        view = View(size, crop, flip, pixel_aspect(stream))
        wanted = picked(pick, index.times(stream))
        result = _result(out, len(wanted), size)
        if index.timed and _decode_groups(
            context, read_packets(source, index, until), index, wanted, _Painter(result, view, context.name), until
        ):
            return result
        # Times are missing or were wrong: count what really comes out, and decide again if that is another number.
        for expected in (len(index.shown), None):
            painter = _Painter(result, view, context.name)
            found = _decode_all(context, read_packets(source, index, until), index, wanted, painter, until)
            if found == 0:
                raise DecodeError("0 frames can be decoded")
            if found == expected or expected is None:
                break
            wanted = picked(pick, np.arange(found) / frame_rate(stream))
            result = _result(out, len(wanted), size)
    return result


def middle_squares(frames: Sequence[np.ndarray], size: int) -> np.ndarray:
    """F frames that are decoded already, (H, W, 3) uint8 RGB, as `read_frames` shows them: (F, size, size, 3).

    Raises DecodeError for frames that are too large.
    """
    result = np.empty((len(frames), size, size, 3), np.uint8)
    painter = _Painter(result, View(size, None, False, 1.0), "rawvideo")
    for number, frame in enumerate(frames):
        painter.paint(VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"), [number])
    return result


@dataclass(slots=True)
class Index:
    """What the packets of a stream say without being decoded. Positions count packets in the order of the file."""

    packets: list[Packet] | None  # None: too large to hold
    pts: list[int | None]  # of every packet
    keys: list[int]  # positions decoding can start from, ascending
    shown: list[int]  # position of each frame, in presentation order
    timed: bool  # every shown packet has a time of its own, so that a decoded frame can be recognised by it

    def times(self, stream: VideoStream) -> np.ndarray:
        """Of the shown frames (n,), seconds from the first; evenly spaced where the file has none."""
        if not self.timed or stream.time_base is None:
            return np.arange(len(self.shown)) / frame_rate(stream)
        pts = np.array([self.pts[position] for position in self.shown], np.float64)
        return (pts - pts[0]) * float(stream.time_base)


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of every frame of a clip."""

    size: int
    crop: Crop | None
    flip: bool
    aspect: float  # width / height of a pixel

    def place(self, height: int, width: int, turns: int, mirrored: bool) -> tuple[int, int, int, int]:
        """Of a stored frame that is then turned anticlockwise by `turns` quarters and perhaps mirrored left to right:
        the height and width to scale all of it to, and the top and left of the square to keep."""
        stored_width = width * self.aspect
        tall, wide = (stored_width, float(height)) if turns % 2 else (float(height), stored_width)
        if self.crop is None:
            side = min(tall, wide)
            shares, y, x = (side / tall, side / wide), 0.5, 0.5
        else:
            shares, y, x = self.crop.shares(tall, wide), self.crop.y, self.crop.x
        x = 1 - x if mirrored else x
        # from the upright frame back to the stored one
        if turns % 2:
            shares = (shares[1], shares[0])
        y, x = {0: (y, x), 1: (x, 1 - y), 2: (1 - y, 1 - x), 3: (1 - x, y)}[turns]
        high, long = max(self.size, round(self.size / shares[0])), max(self.size, round(self.size / shares[1]))
        top, left = (high - self.size) * y, (long - self.size) * x
        return high, long, math.ceil(top - 0.5), math.ceil(left - 0.5)  # the middle of an odd number: the lower


class _Painter:
    """Resizes frames into rows of `result` (F, size, size, 3). One a clip: it keeps swscale's tables between frames."""

    def __init__(self, result: np.ndarray, view: View, codec: str):
        self.result, self.codec = result, codec
        self.view = view
        self.resize, self.colour = VideoReformatter(), VideoReformatter()
        self.part: VideoFrame | None = None  # reused for every frame of the clip

    def paint(self, frame: VideoFrame, rows: Sequence[int]) -> None:
        if frame.width * frame.height > MAX_PIXELS:
            raise DecodeError(too_large(frame.width, frame.height))
        size, (turns, mirrored), matrix = self.view.size, orientation(frame, self.codec), colour_matrix(frame)
        height, width, top, left = self.view.place(frame.height, frame.width, turns, mirrored)
        # Interlaced frames are resized in one piece: swscale works on their fields.
        whole_chroma = None if frame.interlaced_frame else COMMON.get(frame.format.name)
        if whole_chroma:
            frame, height, width, top, left = self._near(frame, height, width, top, left)
        if width * height > MAX_PIXELS:
            raise DecodeError(f"a frame of {frame.width} x {frame.height} is too long and thin")
        try:
            how = {"width": width, "height": height, "interpolation": FILTER, "threads": 1}
            if whole_chroma:
                # In two passes: swscale has vector instructions to resize planes, but none to resize into RGB.
                planes = self.resize.reformat(frame, format=whole_chroma, **how)
                planes.colorspace, planes.color_range = frame.colorspace, frame.color_range
                frame = planes
            rgb = self.colour.reformat(frame, format="rgb24", src_colorspace=matrix, **how)
        except (av.FFmpegError, ValueError) as error:
            raise DecodeError(f"pixel format {frame.format.name} cannot be converted: {_strerror(error)}") from None
        plane = rgb.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
        square = lines[top : top + size, 3 * left : 3 * (left + size)].reshape(size, size, 3)
        square = np.rot90(square, turns) if turns else square
        if self.view.flip != mirrored:
            square = square[:, ::-1]
        for row in rows:
            self.result[row] = square

    def _near(
        self, frame: VideoFrame, height: int, width: int, top: int, left: int
    ) -> tuple[VideoFrame, int, int, int, int]:
        """Of a frame in a COMMON format the part that the square is made of, as a frame with places of its own; the
        frame if that is most of it. To scale the rest is half of the work for the middle square of a wide film."""
        whole = frame, height, width, top, left
        size = self.view.size
        rows, high, top = _span(top, size, height, frame.height)
        columns, long, left = _span(left, size, width, frame.width)
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if tall * wide > 0.8 * frame.height * frame.width:
            return whole
        if self.part is None or (self.part.height, self.part.width, self.part.format.name) != (
            tall, wide, frame.format.name,
        ):  # fmt: skip
            self.part = VideoFrame(wide, tall, frame.format.name)
        for number, (source, target) in enumerate(zip(frame.planes, self.part.planes, strict=True)):
            half = min(number, 1)
            lines = np.frombuffer(memoryview(source), np.uint8).reshape(-1, source.line_size)
            cut = lines[_halved(rows, half), _halved(columns, half)]
            into = np.frombuffer(memoryview(target), np.uint8).reshape(-1, target.line_size)
            into[: cut.shape[0], : cut.shape[1]] = cut
        self.part.colorspace, self.part.color_range = frame.colorspace, frame.color_range
        return self.part, high, long, top, left


def _span(start: int, size: int, scaled: int, stored: int) -> tuple[slice, int, int]:
    """Along one side of a frame of `stored` pixels, which is to be `scaled`: the stored pixels that make `size` scaled
    ones from `start` on, how many they are to be scaled to, and where among those the `size` begin.

    It begins at an even pixel, since chroma has half as many. Of a few such beginnings and ends the ones are taken that
    fall best on whole scaled pixels, or the picture would be shifted by up to half a pixel.
    """
    step = stored / scaled
    margin = 2 * max(1.0, step) + 1  # what the bicubic filter reads outside

    def off(pixels: int) -> float:
        return abs(pixels / step - round(pixels / step))

    low = max(0, math.floor(start * step - margin)) // 2 * 2
    high = math.ceil(((start + size) * step + margin) / 2) * 2
    first = min(range(low, max(-1, low - 20), -2), key=off)
    last = min((stored if e > stored else e for e in range(high, high + 20, 2)), key=lambda end: off(end - first))
    length = round((last - first) / step)
    return slice(first, last), length, min(start - round(first / step), length - size)


def _halved(pixels: slice, half: int) -> slice:
    return slice(pixels.start >> half, (pixels.stop + half) >> half)


def orientation(frame: VideoFrame, codec: str) -> tuple[int, bool]:
    """How it is turned upright: quarters anticlockwise, as FFmpeg and numpy count, then perhaps left to right."""
    turns = round(frame.rotation / 90) % 4
    # The decoder of PNG names a colour profile, and PyAV 18.1 frees such a name a second time: the process would die.
    if codec in ("png", "apng"):
        return turns, False
    sides: Any = frame.side_data  # PyAV's own types do not name this one
    if "DISPLAYMATRIX" not in sides:
        return turns, False
    a, b, _, c, d, *_ = np.frombuffer(sides["DISPLAYMATRIX"], np.int32).tolist()
    # A mirror image. FFmpeg tells the angle of the first column; that of the mirrored upright frame runs the other way.
    return ((2 - turns) % 4, True) if a * d < b * c else (turns, False)


def colour_matrix(frame: VideoFrame) -> int | None:
    """Unsaid, it is BT.709 above the sizes of old television, as players assume; FFmpeg would take BT.601 for all."""
    large = frame.height > 576 or frame.width >= 1280
    return Colorspace.ITU709 if frame.colorspace == UNSPECIFIED and large else None


def open_media(source: Media, until: float) -> InputContainer:
    """FFmpeg gives up opening, or looking for a packet, when it takes as long as remains `until` then."""
    if reason := media_reason(source):  # first, since a pipe would be waited for
        raise DecodeError(reason)
    file: str | io.BytesIO
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, Member):
        file = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:file:{source.tar}"
    else:
        file = f"file:{source}"  # so that a colon in a name is not taken for a protocol
    try:
        return av.open(
            file,
            "r",
            metadata_errors="ignore",
            container_options={"format_whitelist": CONTAINERS},
            timeout=max(until - time.monotonic(), 0.001),  # 0 would be no limit
        )
    except av.error.ExitError:
        raise DecodeError(TOO_LONG) from None
    except (av.FFmpegError, OSError) as error:
        unknown = isinstance(error, av.error.InvalidDataError | av.error.ArgumentError)  # the second: not in CONTAINERS
        raise DecodeError("not a media file" if unknown else f"cannot be opened: {_strerror(error)}") from None


def video_stream(container: InputContainer) -> VideoStream:
    flags = av.stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & flags.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise DecodeError(f"no video stream (has {', '.join(kinds)})" if kinds else "no video stream")
    stream = next((stream for stream in streams if stream.disposition & flags.default), streams[0])
    if stream.codec_context is None:
        raise DecodeError("no decoder for its codec")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise DecodeError(too_large(stream.codec_context.width, stream.codec_context.height))
    return stream


def pixel_aspect(stream: VideoStream) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if ASPECTS[0] <= aspect <= ASPECTS[1] else 1.0


def frame_rate(stream: VideoStream) -> float:
    rate = float(stream.guessed_rate or stream.average_rate or 0)  # in AVI the average may count fields
    return rate if rate > 0 else 25.0


def index_packets(container: InputContainer, stream: VideoStream, until: float) -> Index:
    vp8, mpeg4 = (stream.codec_context.name == name for name in ("vp8", "mpeg4"))
    packed = False  # DivX: two frames in a packet, an empty one after it; each then comes with the other's time
    packets: list[Packet] = []
    pts: list[int | None] = []
    keys: list[int] = []
    shown: list[int] = []
    held = whole = 0
    for packet in _demux(container, stream):
        position = len(pts)
        if position == MAX_FRAMES:
            raise DecodeError(f"more than {MAX_FRAMES} frames; cut it into clips")
        if position % 256 == 0:
            check_time(until)
        pts.append(packet.pts)
        if packet.is_keyframe:
            keys.append(position)
        # Not shown: what an edit list cuts off, and VP8's hidden reference frames (bit 4 of byte 0 is show_frame).
        if not (packet.is_discard or (vp8 and not bytes(packet)[0] & 0x10)):
            shown.append(position)
        packed = packed or (mpeg4 and bytes(packet).count(b"\0\0\1\xb6") > 1)
        whole += not packet.is_corrupt
        held += packet.size + AROUND
        if held <= HELD_BYTES:
            packets.append(packet)
        else:
            packets.clear()
    # Only this container lists its frames ahead of them. Refused even if the wanted ones are there: half a clip under
    # a caption for all of it, on some visits, is worse than a file that is named in a report.
    if "mp4" in container.format.name.split(",") and whole < len(stream.index_entries):
        announced = sum(entry.size > 0 for entry in stream.index_entries)  # some writers leave an empty sample
        if whole < announced:
            raise DecodeError(f"truncated: {whole} of {announced} frames are in the file")
    times = [pts[position] for position in shown]
    # AVI stores no times; for these two codecs FFmpeg then gives the order of the file, which is not that of showing.
    ordered = container.format.name != "avi" or stream.codec_context.name not in {"h264", "hevc"}
    timed = ordered and not packed and None not in times and len(set(times)) == len(times)
    if timed:
        # A recording may begin within a group, or with the rest of an open one: nothing there can be decoded.
        first = pts[keys[0]] if keys and keys[0] > 0 else None
        shown = sorted(
            (position for position in shown if first is None or pts[position] >= first),  # type: ignore[operator]
            key=lambda position: pts[position],  # type: ignore[arg-type, return-value]  # None is excluded
        )
    if not shown:
        raise DecodeError("0 frames")
    if stream.codec_context.pix_fmt == "pal8":
        keys = keys[:1]  # AVI has the palette in the first packet, and key frames do not repeat it
    return Index(packets if held <= HELD_BYTES else None, pts, keys, shown, timed)


def read_packets(source: Media, index: Index, until: float) -> Iterator[Packet]:
    if index.packets is not None:
        yield from index.packets
        return
    with open_media(source, until) as container:
        yield from _demux(container, video_stream(container))


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    count = 0
    try:
        for packet in container.demux(stream):
            if packet.size:  # 0: PyAV's end mark
                count += 1
                yield packet
    except av.error.ExitError:
        raise DecodeError(TOO_LONG) from None
    except av.FFmpegError as error:
        raise DecodeError(f"damaged: cannot be read after frame {count}: {_strerror(error)}") from None
    except IndexError:
        # In MPEG files a stream may appear while reading; PyAV stumbles over its end mark, when all packets have come.
        return


def picked(pick: Pick, times: np.ndarray) -> list[int]:
    """Indices of the wanted frames; ValueError if one is not a frame of the clip."""
    wanted = [int(i) for i in pick(times)]
    if wrong := [i for i in wanted if not 0 <= i < len(times)]:
        raise ValueError(f"pick returned {wrong[0]}, which is not a frame of a clip of {len(times)}")
    return wanted


def check_time(until: float) -> None:
    if time.monotonic() > until:
        raise DecodeError(TOO_LONG)


def _bound(context: VideoCodecContext, frames: int) -> None:
    """Refuses at once, and alike on every machine, what the time limit would end."""
    if frames * context.width * context.height > MAX_DECODED:
        raise DecodeError(f"{frames} frames of {context.width} x {context.height} to decode; cut it into clips")


def _result(out: np.ndarray | None, frames: int, size: int) -> np.ndarray:
    if out is None:
        return np.empty((frames, size, size, 3), np.uint8)
    if out.shape != (frames, size, size, 3) or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype} {out.shape}, needed is uint8 {(frames, size, size, 3)}")
    return out


def ranges(index: Index, positions: Iterable[int]) -> list[tuple[int, int]]:
    """First and last packet of each stretch to decode for the frames at `positions`, ascending and apart."""
    found: list[tuple[int, int]] = []
    for start, end in sorted((_start(index, position), position) for position in positions):
        if found and start <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _start(index: Index, position: int) -> int:
    """The key frame at or before a frame, in file order and in time.

    In time too: in an open group of pictures, frames shown before the key frame follow it in the file and refer to the
    group before.
    """
    which = bisect_right(index.keys, position) - 1
    while which >= 0 and (index.pts[index.keys[which]] or 0) > (index.pts[position] or 0):
        which -= 1
    return index.keys[which] if which >= 0 else 0


def _rows(wanted: Sequence[int]) -> dict[int, list[int]]:
    """Frame number -> rows of the result that show it."""
    rows: dict[int, list[int]] = {}
    for row, frame in enumerate(wanted):
        rows.setdefault(frame, []).append(row)
    return rows


def _decode_groups(
    context: VideoCodecContext,
    packets: Iterable[Packet],
    index: Index,
    wanted: Sequence[int],
    painter: _Painter,
    until: float,
) -> bool:
    """Decodes the groups of pictures that hold wanted frames, recognised by their time. False: one did not come out."""
    rows = {index.pts[index.shown[frame]]: rows for frame, rows in _rows(wanted).items()}
    found = ranges(index, {index.shown[frame] for frame in wanted})
    _bound(context, sum(end - start + 1 for start, end in found))
    stretches = iter(found)
    # An unwanted frame of H.264 that no other refers to need not be decoded: half the work where B-frames are many.
    # Only H.264 marks them exactly; in HEVC the mark holds within one temporal layer.
    skips, skipping = context.name == "h264", False
    start, end = next(stretches, (0, -1))
    for position, packet in enumerate(packets):
        if not rows:
            break
        if position < start:
            continue
        check_time(until)
        if skips and (needed := packet.pts in rows) == skipping:
            context.skip_frame, skipping = ("DEFAULT", False) if needed else ("NONREF", True)
        # At the end of a stretch the decoder is drained: what it holds back for reordering is complete by then.
        for data in (packet, None) if position == end else (packet,):
            try:
                frames = context.decode(data)
            except av.FFmpegError:
                continue  # a bad packet matters if a wanted frame is missing, and that is seen at the end
            for frame in frames:
                if (shows := rows.pop(frame.pts, None)) is not None:
                    painter.paint(frame, shows)
        if position == end:
            context.flush_buffers()
            start, end = next(stretches, (len(index.pts), -1))
    return not rows


def _decode_all(
    context: VideoCodecContext,
    packets: Iterable[Packet],
    index: Index,
    wanted: Sequence[int],
    painter: _Painter,
    until: float,
) -> int:
    """Decodes the whole clip and counts; frames are recognised by their number. Number of frames found."""
    rows = _rows(wanted)
    _bound(context, len(index.pts))
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    count = 0

    def paint(frames: Sequence[VideoFrame]) -> int:
        for number, frame in enumerate(frames, count):
            if found := rows.get(number):
                painter.paint(frame, found)
        return count + len(frames)

    for position, packet in enumerate(packets):
        check_time(until)
        try:
            count = paint(context.decode(packet))
        except av.FFmpegError:
            if count:  # before the first frame there may be rests of a group that the recording did not catch
                how = "truncated" if position + 1 == len(index.pts) else "damaged"
                raise DecodeError(f"{how}: frame {position + 1} of {len(index.pts)} cannot be decoded") from None
    try:
        count = paint(context.decode(None))
    except av.FFmpegError as error:
        raise DecodeError(f"damaged: the last frames cannot be decoded: {_strerror(error)}") from None
    context.flush_buffers()
    return count


def _strerror(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
