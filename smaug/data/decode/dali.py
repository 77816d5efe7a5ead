"""Video through NVIDIA DALI: on a GPU by its video engine (NVDEC), on a CPU by the FFmpeg inside DALI.

DALI decodes a file from its start to the last wanted frame. So PyAV reads the packets first, as for its own decoding,
and DALI gets a small file of the groups of pictures that hold wanted frames, with new times and new numbers. What
containers do to times (edit lists, variable rates, hidden packets) stays ours, and DALI sees no file PyAV cannot read.
"""

from __future__ import annotations

import importlib
import io
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from smaug.data.decode.contract import MAX_SECONDS, DecodeError, Got, Want
from smaug.data.decode.images import read_image
from smaug.data.decode.pyav import _open, _packets, _pixel_aspect, _View, index_packets, picked, ranges, video_stream
from smaug.data.decode.threads import Threads

# FFmpeg's names. Of a stretch after a stretch, these begin anew at a key frame; H.264's and HEVC's may look back.
IVF = {"vp8": b"VP80", "vp9": b"VP90", "mjpeg": b"MJPG"}  # decoded on a CPU too, and written by a struct.pack
GPU_ONLY = ("h264", "hevc", "av1", "mpeg4")
NVDEC_FORMATS = ("yuv420p", "yuvj420p")  # DALI maps NVDEC's surfaces as 8-bit 4:2:0

# Of one run: decoded frames are held in RGB before they are resized, and a run that never ends is given up by time.
MOST_PIECES, MOST_SHOWN, MOST_DECODED = 64, 2**28, 2**31  # the last two in pixels

# DALI takes every stream for BT.601. Red and blue weights of the other matrices (ITU-T H.273, table 4).
BT601 = (0.299, 0.114)
WEIGHTS = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
SAME = (2, 5, 6)  # unspecified, and the two names of BT.601


class DaliDecoder:
    """Clips together, in one DALI pipeline a frame size. Frames are on `device`, in DALI's own memory: not copied.

    On a GPU they are ready on the CUDA stream that is current in the thread that asks. A decoder is for one thread.
    """

    name = "dali"

    def __init__(self, device: torch.device, workers: int = 2, seconds: float = MAX_SECONDS):
        try:
            self.dali: Any = importlib.import_module("nvidia.dali")
        except ImportError:
            raise ValueError("dali is not installed; run: pip install -c constraints.txt -e '.[dali]'") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("dali is asked for frames on a GPU, but PyTorch sees none here")
        self.device, self.workers, self.seconds = device, workers, seconds
        self.cuda = device.type == "cuda"
        self.threads = Threads(workers, 2 * seconds + 1)
        self.runner = Threads(1, 2 * seconds + 1)  # DALI cannot be interrupted, only left behind
        self.pipelines: dict[int, Any] = {}  # by frame size

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        clips = self.threads.map(lambda want: self._prepare(want, size), wants, self._late)
        pieces = [piece for clip in clips if isinstance(clip, _Clip) for piece in clip.pieces]
        decoded = iter([part for chunk in _chunks(pieces) for part in self._run(chunk, size, self._stream())])
        return [
            self._finish(clip, [next(decoded) for _ in clip.pieces])
            if isinstance(clip, _Clip)
            else Got(None if clip.frames is None else clip.frames.to(self.device), clip.reason, self.name)
            for clip in clips
        ]

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.cuda else None

    def _late(self, want: Want) -> Got:
        return Got(None, f"does not come back from reading; left alone after {self.threads.seconds:.0f} s", self.name)

    def _prepare(self, want: Want, size: int) -> _Clip | Got:
        try:
            if want.kind == "image":
                frames = read_image(want.media, size, crop=want.crop, flip=want.flip)
                return Got(torch.from_numpy(frames), "", self.name)
            return self._trim(want, size)
        except DecodeError as error:
            return Got(None, error.reason, self.name)
        except av.FFmpegError as error:
            return Got(None, f"damaged: {error.strerror}", self.name)

    def _trim(self, want: Want, size: int) -> _Clip | Got:
        with _open(want.media) as container:
            stream = video_stream(container)
            context = stream.codec_context
            context.thread_count, context.thread_type = 1, "NONE"
            codec = context.codec.canonical_name
            if codec not in IVF and not (self.cuda and codec in GPU_ONLY):
                where = "decodes {} on a GPU only" if codec in GPU_ONLY else "does not decode {}"
                raise DecodeError(f"dali {where.format(codec)}")
            index = index_packets(container, stream, time.monotonic() + self.seconds)
            if not index.timed:
                raise DecodeError("dali cannot tell its frames apart: not every one has a time")
            wanted = [index.shown[frame] for frame in picked(want.pick, index.times(stream))]
            # Frames that follow a key frame and are shown before it need the group before, which is not there.
            stretches = [
                [p for p in range(first, last + 1) if (index.pts[p] or 0) >= (index.pts[first] or 0)]
                for first, last in ranges(index, wanted)
            ]
            kept = {position for stretch in stretches for position in stretch}
            packets = {p: packet for p, packet in enumerate(_packets(want.media, index)) if p in kept}
            if not wanted:
                return Got(torch.empty((0, size, size, 3), dtype=torch.uint8), "", self.name)
            # Of H.264 each: where a picture is refreshed bit by bit, what is marked as a key frame is not whole.
            firsts = stretches if codec == "h264" else stretches[:1]
            frame = [_first_frame(context, packets[stretch[0]]) for stretch in firsts][0]
            if self.cuda and frame.format.name not in NVDEC_FORMATS:
                raise DecodeError(f"dali does not decode {frame.format.name} on a GPU")
            if frame.colorspace not in (*SAME, *WEIGHTS):
                raise DecodeError(f"dali does not know its colours (matrix {int(frame.colorspace)})")
            turns = round(frame.rotation / 90) % 4
            if codec in IVF:
                stretches = [sum(stretches, [])]
            pieces, order = [], []
            for stretch in stretches:
                shown = sorted(stretch, key=lambda p: index.pts[p] or 0)
                rank = {position: number for number, position in enumerate(shown)}
                these = sorted(set(stretch).intersection(wanted), key=rank.__getitem__)
                parts = [(packets[position], rank[position]) for position in stretch]
                file = _ivf(IVF[codec], context, parts) if codec in IVF else _matroska(stream, parts)
                pieces.append(
                    _Piece(
                        np.frombuffer(file, np.uint8),
                        np.array([rank[position] for position in these], np.int32),
                        _part(_View(size, want.crop, want.flip, _pixel_aspect(stream)), frame, turns),
                        frame.width * frame.height,
                        len(stretch),
                    )
                )
                order += these
        return _Clip(pieces, [order.index(position) for position in wanted], turns, int(frame.colorspace))

    def _run(self, pieces: list[_Piece], size: int, stream: torch.cuda.Stream | None) -> list[Tensor | str]:
        """Of each piece its frames, or why there are none. DALI fails as a whole, so the bad one is sought by halves."""
        late = f"does not come back from dali; left alone after {self.runner.seconds:.0f} s"
        (found,) = self.runner.map(lambda these: self._try(these, size, stream), [pieces], lambda _: late)
        if not isinstance(found, str):
            return found
        self.pipelines.pop(size, None)  # after an error it is of no use
        if len(pieces) == 1:
            return [found]
        half = len(pieces) // 2
        return self._run(pieces[:half], size, stream) + self._run(pieces[half:], size, stream)

    def _try(self, pieces: list[_Piece], size: int, stream: torch.cuda.Stream | None) -> list[Tensor] | str:
        if size not in self.pipelines:
            self.pipelines[size] = self._build(size)
        try:
            (out,) = self.pipelines[size].run(
                stream,
                file=[piece.file for piece in pieces],
                frames=[piece.frames for piece in pieces],
                start=[piece.part[0] for piece in pieces],
                end=[piece.part[1] for piece in pieces],
            )
        except RuntimeError as error:
            return _reason(error)
        # Documented: with the dynamic executor, the default, outputs stay valid as long as someone holds them.
        with torch.cuda.stream(stream):
            return [torch.from_dlpack(out[i]) for i in range(len(pieces))]

    def _build(self, size: int) -> Any:
        fn, types = importlib.import_module("nvidia.dali.fn"), self.dali.types
        # Depth 1: each run has its own inputs. The work ahead is the loader's, which decodes beside the step.
        pipeline = self.dali.Pipeline(
            batch_size=MOST_PIECES,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if self.cuda else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
            # pad_mode: the default shows black for a frame that is not there
            video = fn.decoders.video(file, frames=frames, device="mixed" if self.cuda else "cpu", pad_mode="none")
            pipeline.set_outputs(
                fn.resize(
                    video,
                    size=[size, size],
                    roi_start=start,
                    roi_end=end,
                    roi_relative=True,
                    interp_type=types.INTERP_CUBIC,
                    antialias=True,
                )
            )
        pipeline.build()
        return pipeline

    def _finish(self, clip: _Clip, parts: list[Tensor | str]) -> Got:
        tensors = []
        for piece, part in zip(clip.pieces, parts, strict=True):
            if isinstance(part, str):
                return Got(None, part, self.name)
            if len(part) != len(piece.frames):
                return Got(None, f"damaged: dali found {len(part)} of {len(piece.frames)} frames", self.name)
            tensors.append(part)
        frames = torch.cat(tensors) if len(tensors) != 1 else tensors[0]
        if clip.rows != list(range(len(frames))):
            frames = frames[clip.rows]
        if clip.turns:
            frames = torch.rot90(frames, clip.turns, (1, 2)).contiguous()
        if clip.matrix in WEIGHTS:
            frames = _recoloured(frames, WEIGHTS[clip.matrix])
        return Got(frames, "", self.name)

    def close(self) -> None:
        self.threads.close()
        self.runner.close()
        self.pipelines.clear()


@dataclass(frozen=True, slots=True)
class _Piece:
    """What DALI decodes as one file."""

    file: np.ndarray  # its bytes
    frames: np.ndarray  # numbers of the wanted frames, ascending
    part: np.ndarray  # (2, 2) float32: top and left, bottom and right of what is shown, as shares of the frame
    pixels: int  # of a frame
    packets: int


@dataclass(frozen=True, slots=True)
class _Clip:
    pieces: list[_Piece]
    rows: list[int]  # of each wanted frame its place among the frames of all pieces
    turns: int  # quarters to turn frames anticlockwise
    matrix: int  # of its colours, numbered as in H.273


def _chunks(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    chunk: list[_Piece] = []
    shown = decoded = 0
    for piece in pieces:
        more = piece.pixels * len(piece.frames), piece.pixels * piece.packets
        full = len(chunk) == MOST_PIECES or shown + more[0] > MOST_SHOWN or decoded + more[1] > MOST_DECODED
        if chunk and full:
            yield chunk
            chunk, shown, decoded = [], 0, 0
        chunk.append(piece)
        shown, decoded = shown + more[0], decoded + more[1]
    if chunk:
        yield chunk


def _first_frame(context: VideoCodecContext, packet: Packet) -> VideoFrame:
    """The key frame, decoded for what DALI does not tell: the turn, and how colours are stored. 1 of 45 ms a clip."""
    context.flush_buffers()
    frames = context.decode(packet) + context.decode(None)
    if not frames:
        raise DecodeError("its key frames are not whole, which dali does not expect")
    return frames[0]


def _part(view: _View, frame: VideoFrame, turns: int) -> np.ndarray:
    high, long, top, left = view.place(frame.height, frame.width, turns)
    part = np.array([[top, left], [top + view.size, left + view.size]]) / (high, long)
    if view.flip:  # before the turn; DALI flips what ends before it starts
        axis = 1 - turns % 2
        part[:, axis] = part[::-1, axis].copy()
    return part.astype(np.float32)


def _ivf(codec: bytes, context: VideoCodecContext, packets: Sequence[tuple[Packet, int]]) -> bytes:
    size = (context.width, context.height)
    parts = [struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, codec, *size, 25, 1, len(packets), 0)]
    for packet, number in packets:
        parts += (struct.pack("<IQ", packet.size, number), bytes(packet))
    return b"".join(parts)


def _matroska(stream: VideoStream, packets: Sequence[tuple[Packet, int]]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        copy = file.add_stream_from_template(stream)
        for position, (packet, number) in enumerate(packets):
            packet.stream, packet.time_base = copy, Fraction(1, 1000)
            packet.pts, packet.duration = 40 * number, 40
            packet.dts = 40 * (position - 32)  # before every pts: no codec reorders by more than 16 frames
            file.mux(packet)
    return out.getvalue()


def _recoloured(frames: Tensor, weights: tuple[float, float]) -> Tensor:
    """What BT.601 made of a stream, as its own matrix would have shown it: RGB -> luma and chroma -> RGB.

    Exact but for colours that BT.601 cannot show, very saturated greens and magentas, which are cut at 0 and 255.
    """
    back = torch.linalg.inv(_to_luma(*weights)) @ _to_luma(*BT601)
    return (frames.float() @ back.T.to(frames.device)).round_().clamp_(0, 255).byte()


def _to_luma(red: float, blue: float) -> Tensor:
    luma = torch.tensor([red, 1 - red - blue, blue])
    r, _, b = torch.eye(3)
    return torch.stack([luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)])


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line.split("failed: ")[-1] for line in lines if line.startswith(("Assert on", "[", "Error"))), "")
    return f"dali: {said[:100]}" if said else "dali cannot decode it"
