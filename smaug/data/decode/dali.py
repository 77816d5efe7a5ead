"""Video through NVIDIA DALI: on a GPU by its video engine (NVDEC), on a CPU by the FFmpeg inside DALI.

DALI decodes a file from its start to the last wanted frame, and knows neither edit lists nor hidden packets; so it gets
the small files of trim.py. Cropping, resizing and flipping are one operation on the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smaug.data.decode.contract import MAX_SECONDS, DecodeError, Got, Want
from smaug.data.decode.images import read_image
from smaug.data.decode.threads import Threads
from smaug.data.decode.trim import SAME, WEIGHTS, Piece, Trimmed, recoloured, trim

# FFmpeg's names; DALI 2.4.0 refuses the latter on a CPU.
CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = ("h264", "hevc", "av1", "mpeg4")
GPU_FORMATS = ("yuv420p", "yuvj420p")  # DALI maps NVDEC's surfaces as 8-bit 4:2:0

# Of one run: decoded frames are held in RGB before they are resized, and a run that never ends is given up by time.
MOST_PIECES, MOST_SHOWN, MOST_DECODED = 64, 2**28, 2**31  # the last two in pixels


class DaliDecoder:
    """Clips together, in one DALI pipeline a frame size. Frames are on `device`, in DALI's own memory: not copied.

    On a GPU they are ready for the CUDA stream that is current in the thread that asks, which should also be the one
    that lets go of them. A decoder is for one thread.
    """

    name = "dali"

    def __init__(self, device: torch.device, workers: int = 2, seconds: float = MAX_SECONDS):
        try:
            self.dali: Any = importlib.import_module("nvidia.dali")
            self.fn: Any = importlib.import_module("nvidia.dali.fn")
        except ImportError:
            raise ValueError("dali is not installed; run: pip install -c constraints.txt -e '.[dali]'") from None
        self.cuda = device.type == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise ValueError("dali is to decode on a GPU, but PyTorch sees none here")
        self.device, self.workers, self.seconds = device, workers, seconds
        self.threads = Threads(workers, 2 * seconds + 1)
        self.runner = Threads(1, 2 * seconds + 1)  # DALI cannot be interrupted, only left behind
        self.pipelines: dict[int, Any] = {}  # by frame size

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        clips = self.threads.map(lambda want: self._prepare(want, size), wants, self._late)
        jobs = [_Job(piece, clip, size) for clip in clips if isinstance(clip, Trimmed) for piece in clip.pieces]
        stream = torch.cuda.current_stream(self.device) if self.cuda else None
        decoded = iter([part for chunk in _chunks(jobs) for part in self._run(chunk, size, stream)])
        return [
            self._finish(clip, [next(decoded) for _ in clip.pieces])
            if isinstance(clip, Trimmed)
            else Got(None if clip.frames is None else clip.frames.to(self.device), clip.reason, self.name)
            for clip in clips
        ]

    def _late(self, want: Want) -> Got:
        return Got(None, f"does not come back from reading; left alone after {self.threads.seconds:.0f} s", self.name)

    def _prepare(self, want: Want, size: int) -> Trimmed | Got:
        try:
            if want.kind == "image":
                frames = read_image(want.media, size, crop=want.crop, flip=want.flip)
                return Got(torch.from_numpy(frames), "", self.name)
            clip = trim(want, size, self.seconds, self._check, self.name)
            if isinstance(clip, Trimmed):
                if self.cuda and clip.format not in GPU_FORMATS:
                    raise DecodeError(f"dali does not decode {clip.format} on a GPU")
                if clip.matrix not in (*SAME, *WEIGHTS):
                    raise DecodeError(f"dali does not know its colours (matrix {clip.matrix})")
            return clip
        except DecodeError as error:
            return Got(None, error.reason, self.name)

    def _check(self, codec: str) -> None:
        if codec in GPU_CODECS and not self.cuda:
            raise DecodeError(f"dali decodes {codec} on a GPU only")
        if codec not in (*CODECS, *GPU_CODECS):
            raise DecodeError(f"dali does not decode {codec}")

    def _run(self, jobs: list[_Job], size: int, stream: torch.cuda.Stream | None) -> list[Tensor | str]:
        """Of each piece its frames, or why there are none. DALI fails as a whole: the bad one is sought by halves."""
        late = f"does not come back from dali; left alone after {self.runner.seconds:.0f} s"
        (found,) = self.runner.map(lambda these: self._try(these, size, stream), [jobs], lambda _: late)
        if not isinstance(found, str):
            return found
        self.pipelines.pop(size, None)  # after an error it is of no use
        if len(jobs) == 1:
            return [found]
        half = len(jobs) // 2
        return self._run(jobs[:half], size, stream) + self._run(jobs[half:], size, stream)

    def _try(self, jobs: list[_Job], size: int, stream: torch.cuda.Stream | None) -> list[Tensor | str] | str:
        try:
            if size not in self.pipelines:
                self.pipelines[size] = self._build(size)
            (out,) = self.pipelines[size].run(
                stream,
                file=[np.frombuffer(job.piece.file, np.uint8) for job in jobs],
                frames=[np.array(job.piece.shown, np.int32) for job in jobs],
                start=[job.start for job in jobs],
                end=[job.end for job in jobs],
            )
        except RuntimeError as error:
            return _reason(error)
        # Documented: with the dynamic executor, the default, outputs stay valid as long as someone holds them.
        with torch.cuda.stream(stream):
            return [torch.from_dlpack(out[i]) for i in range(len(jobs))]

    def _build(self, size: int) -> Any:
        fn, types = self.fn, self.dali.types
        pipeline = self.dali.Pipeline(
            batch_size=MOST_PIECES,
            num_threads=self.workers,
            device_id=torch.empty(0, device=self.device).get_device() if self.cuda else None,  # cuda: the current one
            prefetch_queue_depth=1,  # every run brings its own inputs; what runs ahead of the step is the loader
        )
        with pipeline:
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
            video = fn.decoders.video(file, frames=frames, device="mixed" if self.cuda else "cpu")
            cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
            square = fn.resize(video, size=[size, size], roi_start=start, roi_end=end, roi_relative=True, **cubic)
            pipeline.set_outputs(square)
        pipeline.build()
        return pipeline

    def _finish(self, clip: Trimmed, parts: list[Tensor | str]) -> Got:
        squares = []
        for piece, part in zip(clip.pieces, parts, strict=True):
            if isinstance(part, str):
                return Got(None, part, self.name)
            if len(part) != len(piece.frames):
                return Got(None, f"damaged: dali decodes {len(part)} of {len(piece.frames)} frames", self.name)
            squares.append(part)
        frames = clip.upright(squares)
        # DALI takes every stream for BT.601.
        return Got(recoloured(frames, clip.matrix) if clip.matrix in WEIGHTS else frames, "", self.name)

    def close(self) -> None:
        self.threads.close()
        self.runner.close()
        self.pipelines.clear()


@dataclass(slots=True)
class _Job:
    """A piece of a clip, and what to show of its frames: corners (y, x) as shares of the height and the width."""

    piece: Piece
    pixels: int  # of a frame
    start: np.ndarray
    end: np.ndarray

    def __init__(self, piece: Piece, clip: Trimmed, size: int):
        high, long, top, left = clip.place
        self.piece, self.pixels = piece, clip.height * clip.width
        self.start = np.array([top / high, left / long], np.float32)
        self.end = np.array([(top + size) / high, (left + size) / long], np.float32)
        if clip.flip:  # DALI flips what ends before it starts; the turn comes after that, so left may still be top
            axis = 1 - clip.turns % 2
            self.start[axis], self.end[axis] = self.end[axis], self.start[axis].copy()


def _chunks(jobs: list[_Job]) -> Iterator[list[_Job]]:
    chunk: list[_Job] = []
    shown = decoded = 0
    for job in jobs:
        shown += job.pixels * len(job.piece.frames)
        decoded += job.pixels * job.piece.packets
        if chunk and (len(chunk) == MOST_PIECES or shown > MOST_SHOWN or decoded > MOST_DECODED):
            yield chunk
            chunk, shown, decoded = [], job.pixels * len(job.piece.frames), job.pixels * job.piece.packets
        chunk.append(job)
    if chunk:
        yield chunk


def _reason(error: RuntimeError) -> str:
    """The part of DALI's message that says what is wrong."""
    said = next((line.split("failed: ")[-1] for line in str(error).splitlines() if "failed: " in line), "")
    return f"dali: {said[:100]}" if said else "dali cannot decode it"
