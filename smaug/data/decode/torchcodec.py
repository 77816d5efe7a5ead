"""Video through torchcodec, in host memory, from the small files of trim.py.

By itself it is off by some frames in MPEG-2 and where pictures are refreshed bit by bit, without a word, and fails on
transport streams; of a trimmed file, whose times are even, every frame is the one asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smaug.data.decode.contract import MAX_PIXELS, MAX_SECONDS, DecodeError, Got, Want
from smaug.data.decode.images import read_image
from smaug.data.decode.threads import Threads
from smaug.data.decode.trim import SECONDS, Trimmed, recoloured, trim


class TorchcodecDecoder:
    """Clips in threads, one clip a thread. Frames are in host memory."""

    name = "torchcodec"

    def __init__(self, workers: int = 2, seconds: float = MAX_SECONDS):
        try:
            self.open: Any = importlib.import_module("torchcodec.decoders").VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: FFmpeg's libraries are not found
            missing = "FFmpeg's shared libraries" if isinstance(error, RuntimeError) else "torchcodec"
            raise ValueError(
                f"torchcodec cannot be imported, for want of {missing}; run: apt install ffmpeg && "
                "pip install -c constraints.txt -e '.[torchcodec]'"
            ) from None
        self.seconds = seconds
        self.threads = Threads(workers, 2 * seconds + 1)

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        return self.threads.map(lambda want: self._one(want, size), wants, self._late)

    def _one(self, want: Want, size: int) -> Got:
        try:
            if want.kind == "image":
                frames = torch.from_numpy(read_image(want.media, size, crop=want.crop, flip=want.flip))
                return Got(frames, "", self.name)
            clip = trim(want, size, self.seconds, lambda codec: None, self.name)
            if isinstance(clip, Got):
                return clip
            if clip.full and not clip.format.startswith("yuvj"):
                raise DecodeError("torchcodec does not see that its levels go from 0 to 255")
            frames = clip.upright([self._squares(piece.file, piece.frames, clip, size) for piece in clip.pieces])
            frames = frames if clip.tagged else recoloured(frames, clip.matrix)
            return Got(frames.flip(2) if clip.flip else frames, "", self.name)
        except DecodeError as error:
            return Got(None, error.reason, self.name)

    def _squares(self, file: bytes, numbers: list[int], clip: Trimmed, size: int) -> Tensor:
        high, long, top, left = clip.place
        if high * long > MAX_PIXELS:
            raise DecodeError(f"a frame of {clip.width} x {clip.height} is too long and thin")
        try:
            batch = self.open(file, num_ffmpeg_threads=1).get_frames_at(numbers)
        except (RuntimeError, ValueError, IndexError) as error:  # it names its own source file, and then the reason
            raise DecodeError(f"torchcodec: {str(error).partition(chr(10))[0].split(', ')[-1][:100]}") from None
        if (batch.pts_seconds - SECONDS * torch.tensor(numbers)).abs().max() > SECONDS / 2:
            raise DecodeError("damaged: a wanted frame cannot be decoded")  # and the one before or after it came
        frames = batch.data
        squares = torch.empty((len(frames), size, size, 3), dtype=torch.uint8)
        for square, frame in zip(squares, frames, strict=True):
            whole = F.interpolate(frame[None], (high, long), mode="bicubic", antialias=True)[0]
            square.copy_(whole[:, top : top + size, left : left + size].permute(1, 2, 0))
        return squares

    def _late(self, want: Want) -> Got:
        return Got(None, f"does not come back from decoding; left alone after {self.threads.seconds:.0f} s", self.name)

    def close(self) -> None:
        self.threads.close()
