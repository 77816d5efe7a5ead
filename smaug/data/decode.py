"""Files to frames: the wanted frames of a video, or a picture as a video of one frame, as square uint8 RGB.

Video goes through PyAV, FFmpeg inside. The packets of a clip are read once, which costs no decoding and tells how many
frames there are and when each is shown; only the groups of pictures that hold a wanted frame are then decoded, each
from its key frame to its last wanted frame. The groups are found among the packets, not by seeking in the file, so no
container's idea of seeking can be wrong.
Pictures go through Pillow: unlike FFmpeg it knows CMYK and transparency, and it decodes a large JPEG at reduced size
(1411 x 1411 to 224 x 224 on one core: 5 ms, FFmpeg 8 ms). Both resize by an antialiased bicubic filter.

Everything here may be called from many threads at once; FFmpeg and Pillow release the GIL while they decode and resize.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from smaug.data.manifest import file_reason

MAX_PIXELS = 64 * 2**20  # of one frame, decoded or resized; a damaged or hostile header can ask for gigabytes
HELD_BYTES = 64 * 2**20  # packets of a clip up to this size stay in memory; a larger file is read twice

# swscale without FULL_CHR_H_INT goes through a table that darkens limited-range video by 1.5 levels of 255.
FILTER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT

Pick = Callable[[int], Sequence[int]]  # number of frames of the clip -> indices of the wanted ones


class DecodeError(Exception):
    """What is wrong with a file, in a few words for a report of skipped files: `reason`. It does not name the file."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def random_segments(n: int, frames: int, offsets: Sequence[float] | np.ndarray) -> list[int]:
    """One frame from each of `frames` equal intervals of [0, n), at `offsets` (frames,) in [0, 1): ascending indices.

    With offsets from a uniform generator every frame of an interval is equally likely. A clip of fewer than `frames`
    frames gives all of them and then repeats its last.
    """
    lows, highs = _segments(n, frames)
    return [low + int(u * (high - low)) for low, high, u in zip(lows, highs, offsets, strict=True)]


def middle_segments(n: int, frames: int) -> list[int]:
    """The middle frame of each of `frames` equal intervals of [0, n), for evaluation: ascending indices.

    Of two middle frames the earlier. A clip of fewer than `frames` frames gives all of them and then repeats its last.
    """
    return [(low + high - 1) // 2 for low, high in zip(*_segments(n, frames), strict=True)]


def _segments(n: int, frames: int) -> tuple[list[int], list[int]]:
    """First index of each interval, and the one after its last."""
    if n < frames:
        lows = [min(i, n - 1) for i in range(frames)]
        return lows, [low + 1 for low in lows]
    edges = [n * i // frames for i in range(frames + 1)]
    return edges[:-1], edges[1:]


def read_frames(
    source: str | Path | bytes, pick: Pick, size: int, *, out: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """Wanted frames of a video file, or of its bytes: (F, size, size, 3) uint8, RGB with levels 0 to 255.

    `pick` gets the number of frames n > 0 and returns F indices in [0, n), counted in presentation order; any order,
    repeats allowed. It is called a second time, with the true n, if the packets had promised another number.
    Frames are turned upright, the short side is resized to `size` and the middle of the long side kept. The clip is the
    first video stream that is not a cover picture. `out`, if given, is filled and returned. `threads` of the decoder:
    one where many clips are decoded at once, since two cost a fifth more processor time for the same clips.

    Raises DecodeError for everything that can be wrong with the file, and ValueError for a wrong `pick` or `out`.
    """
    with _open(source) as container:
        stream = _video_stream(container)
        context = stream.codec_context
        context.thread_count = threads
        context.thread_type = "NONE" if threads == 1 else "AUTO"
        index = _index_packets(container, stream)
        if not index.shown:
            raise DecodeError("0 frames")
        wanted = _picked(pick, len(index.shown))
        result = _result(out, len(wanted), size)
        if index.timed and _decode_groups(context, _packets(source, index), index, wanted, _Painter(result, size)):
            return result
        # Times are missing or were wrong: count what really comes out, and decide again if that is another number.
        for expected in (len(index.shown), None):
            painter = _Painter(result, size)
            found = _decode_all(context, _packets(source, index), index, wanted, painter)
            if found == 0:
                raise DecodeError("0 frames can be decoded")
            if found == expected or expected is None:
                break
            wanted = _picked(pick, found)
            result = _result(out, len(wanted), size)
    return result


def read_image(source: str | Path | bytes, size: int) -> np.ndarray:
    """A picture as a video of one frame: (1, size, size, 3) uint8, RGB with levels 0 to 255.

    Turned upright by its EXIF tag, laid on white where it is transparent, the short side resized to `size` and the
    middle of the long side kept. Of an animation, the first frame. Raises DecodeError for everything that can be wrong
    with the file.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(_too_large(image.width, image.height))
            image.draft(None, (size, size))  # JPEG: decoded at 1/2, 1/4 or 1/8 while the sides stay above size
            upright = _rgb(ImageOps.exif_transpose(image))
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return np.asarray(square)[None].copy()  # Pillow's own memory is read-only
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise what a damaged file leads them to: SyntaxError, struct.error
        raise DecodeError(_unreadable(source) or _pillow_reason(error)) from None


@dataclass(slots=True)
class _Index:
    """What the packets of a stream say without being decoded. Positions count packets in the order of the file."""

    packets: list[Packet] | None  # None: too large to hold
    pts: list[int | None]  # of every packet
    keys: list[int]  # positions decoding can start from, ascending
    shown: list[int]  # position of each frame, in presentation order
    timed: bool  # every shown packet has a time of its own, so that a decoded frame can be recognised by it


class _Painter:
    """Resizes frames into rows of `result` (F, size, size, 3). One a clip: it keeps swscale's tables between frames."""

    def __init__(self, result: np.ndarray, size: int):
        self.result = result
        self.size = size
        self.reformatter = VideoReformatter()

    def paint(self, frame: VideoFrame, rows: Sequence[int]) -> None:
        width, height = frame.width, frame.height
        if width * height > MAX_PIXELS:
            raise DecodeError(_too_large(width, height))
        scale = self.size / min(width, height)
        width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        if width * height > MAX_PIXELS:
            raise DecodeError(f"a frame of {frame.width} x {frame.height} is too long and thin")
        try:
            rgb = self.reformatter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation=FILTER, threads=1
            )
        except (av.FFmpegError, ValueError) as error:
            raise DecodeError(f"pixel format {frame.format.name} cannot be converted: {_strerror(error)}") from None
        plane = rgb.planes[0]
        top, left = (height - self.size) // 2, (width - self.size) // 2
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
        square = lines[top : top + self.size, 3 * left : 3 * (left + self.size)].reshape(self.size, self.size, 3)
        if turns := round(frame.rotation / 90) % 4:  # FFmpeg and numpy both count anticlockwise
            square = np.rot90(square, turns)
        for row in rows:
            self.result[row] = square


def _open(source: str | Path | bytes) -> InputContainer:
    # "file:" so that a colon in a name is not taken for a protocol
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    try:
        return av.open(file, "r", metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        unknown = isinstance(error, av.error.InvalidDataError)
        reason = "not a media file" if unknown else f"cannot be opened: {_strerror(error)}"
        raise DecodeError(_unreadable(source) or reason) from None


def _video_stream(container: InputContainer) -> VideoStream:
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise DecodeError(f"no video stream (has {', '.join(kinds)})" if kinds else "no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise DecodeError("no decoder for its codec")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise DecodeError(_too_large(stream.codec_context.width, stream.codec_context.height))
    return stream


def _index_packets(container: InputContainer, stream: VideoStream) -> _Index:
    vp8 = stream.codec_context.name == "vp8"
    packets: list[Packet] = []
    pts: list[int | None] = []
    keys: list[int] = []
    shown: list[int] = []
    held = whole = 0
    try:
        for packet in _demux(container, stream):
            position = len(pts)
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(position)
            # Not shown: what an edit list cuts off, and VP8's hidden reference frames (bit 4 of byte 0 is show_frame).
            if not (packet.is_discard or (vp8 and not bytes(packet)[0] & 0x10)):
                shown.append(position)
            whole += not packet.is_corrupt
            held += packet.size
            if held <= HELD_BYTES:
                packets.append(packet)
            else:
                packets.clear()
    except av.FFmpegError as error:
        raise DecodeError(f"damaged: cannot be read after frame {len(shown)}: {_strerror(error)}") from None
    # Only this container lists its frames ahead of them. Refused even if the wanted ones are there: half a clip under
    # a caption for all of it, on some visits, is worse than a file that is named in a report.
    if "mp4" in container.format.name.split(",") and whole < len(stream.index_entries):
        announced = sum(entry.size > 0 for entry in stream.index_entries)  # some writers leave an empty sample
        if whole < announced:
            raise DecodeError(f"truncated: {whole} of {announced} frames are in the file")
    times = [pts[position] for position in shown]
    # AVI stores no times; for these two codecs FFmpeg then gives the order of the file, which is not that of showing.
    ordered = container.format.name != "avi" or stream.codec_context.name not in {"h264", "hevc"}
    timed = ordered and None not in times and len(set(times)) == len(times)
    if timed:
        shown.sort(key=lambda position: pts[position])  # type: ignore[arg-type, return-value]  # None is excluded
    return _Index(packets if held <= HELD_BYTES else None, pts, keys, shown, timed)


def _packets(source: str | Path | bytes, index: _Index) -> Iterator[Packet]:
    if index.packets is not None:
        yield from index.packets
        return
    with _open(source) as container:
        yield from _demux(container, _video_stream(container))


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    try:
        for packet in container.demux(stream):
            if packet.size:  # 0: PyAV's end mark
                yield packet
    except IndexError:
        # In MPEG files a stream may appear while reading; PyAV stumbles over its end mark, when all packets have come.
        return


def _picked(pick: Pick, n: int) -> list[int]:
    wanted = [int(i) for i in pick(n)]
    if wrong := [i for i in wanted if not 0 <= i < n]:
        raise ValueError(f"pick({n}) returned {wrong[0]}, which is not a frame of a clip of {n}")
    return wanted


def _result(out: np.ndarray | None, frames: int, size: int) -> np.ndarray:
    if out is None:
        return np.empty((frames, size, size, 3), np.uint8)
    if out.shape != (frames, size, size, 3) or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype} {out.shape}, needed is uint8 {(frames, size, size, 3)}")
    return out


def _ranges(index: _Index, positions: Iterable[int]) -> list[tuple[int, int]]:
    """First and last packet of each stretch to decode for the frames at `positions`, ascending and apart."""
    ranges: list[tuple[int, int]] = []
    for start, end in sorted((_start(index, position), position) for position in positions):
        if ranges and start <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))
    return ranges


def _start(index: _Index, position: int) -> int:
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
    context: VideoCodecContext, packets: Iterable[Packet], index: _Index, wanted: Sequence[int], painter: _Painter
) -> bool:
    """Decodes the groups of pictures that hold wanted frames, recognised by their time. False: one did not come out."""
    rows = {index.pts[index.shown[frame]]: rows for frame, rows in _rows(wanted).items()}
    ranges = iter(_ranges(index, {index.shown[frame] for frame in wanted}))
    # An unwanted frame of H.264 that no other refers to need not be decoded: half the work where B-frames are many.
    # Only H.264 marks them exactly; in HEVC the mark holds within one temporal layer.
    skips = context.name == "h264"
    start, end = next(ranges, (0, -1))
    for position, packet in enumerate(packets):
        if not rows:
            break
        if position < start:
            continue
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts in rows else "NONREF"
        # At the end of a stretch the decoder is drained: what it holds back for reordering is complete by then.
        for data in (packet, None) if position == end else (packet,):
            try:
                frames = context.decode(data)
            except av.FFmpegError:
                continue  # a bad packet matters if a wanted frame is missing, and that is seen at the end
            for frame in frames:
                if (found := rows.pop(frame.pts, None)) is not None:
                    painter.paint(frame, found)
        if position == end:
            context.flush_buffers()
            start, end = next(ranges, (len(index.pts), -1))
    return not rows


def _decode_all(
    context: VideoCodecContext, packets: Iterable[Packet], index: _Index, wanted: Sequence[int], painter: _Painter
) -> int:
    """Decodes the whole clip and counts; frames are recognised by their number. Number of frames found."""
    rows = _rows(wanted)
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    count = 0

    def paint(frames: Sequence[VideoFrame]) -> int:
        for number, frame in enumerate(frames, count):
            if found := rows.get(number):
                painter.paint(frame, found)
        return count + len(frames)

    for position, packet in enumerate(packets):
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


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparent parts white, 16-bit gray by its upper byte (Pillow's own conversion clips it)."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _unreadable(source: str | Path | bytes) -> str:
    """Why there is nothing to decode; "" if there is something."""
    if isinstance(source, bytes):
        return "" if source else "0 bytes"
    return file_reason(Path(source))


def _too_large(width: int, height: int) -> str:
    return f"a frame of {width} x {height} exceeds {MAX_PIXELS // 2**20} megapixels"


def _pillow_reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"exceeds {MAX_PIXELS // 2**20} megapixels"
    return f"damaged picture: {error}"


def _strerror(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
