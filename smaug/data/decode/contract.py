"""What every decoder takes and gives, and the limits that all of them keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from smaug.data.frames import Crop, Pick
from smaug.data.media import Media

MAX_PIXELS = 64 * 2**20  # of one frame, decoded or resized; a damaged or hostile header can ask for gigabytes
MAX_DECODED = 2**36  # pixels of all frames of one clip: 4K for 5 minutes; more than a core decodes in MAX_SECONDS
# of one clip; a decoder is stopped at its next packet, and one that does not come back is left behind
MAX_SECONDS = 30.0


class DecodeError(Exception):
    """What is wrong with a file, in a few words for a report of skipped files: `reason`. It does not name the file."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Want:
    """What is wanted of one clip: `pick` says which frames, `crop` which part of them (None: the middle square)."""

    media: Media
    kind: Literal["video", "image"]  # an image has one frame, whatever is picked
    pick: Pick
    crop: Crop | None = None
    flip: bool = False  # left to right


@dataclass(frozen=True, slots=True)
class Got:
    """What became of one clip."""

    frames: Tensor | None  # (F, size, size, 3) uint8 RGB, levels 0 to 255, on the decoder's device
    reason: str  # why there are none; "" if there are
    decoder: str  # who tried it last


class Decoder(Protocol):
    """Decodes many clips at once. One that cannot be decoded is a Got with a reason, never an exception."""

    name: str

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        """One Got a Want, in their order. `size`: side of the square frames, in pixels."""
        ...

    def close(self) -> None: ...


def too_large(width: int, height: int) -> str:
    return f"a frame of {width} x {height} exceeds {MAX_PIXELS // 2**20} megapixels"
