"""A small run that was never trained, and a folder of the kinds of files that people have."""

import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from PIL import Image

from smaug.model.model import ModelConfig
from smaug.model.text_encoder import TextEncoderConfig
from smaug.model.video_encoder import VideoEncoderConfig
from smaug.objectives.vtc import Vtc
from smaug.recipe import Recipe
from smaug.testing import save_random_run

WORDS = ["a red ring beside a white square", "a dog jumps over the fence"]
RATE = 4  # frames a second


def recipe() -> Recipe:
    size = dict(width=32, depth=1, heads=2)
    video = VideoEncoderConfig(**size, image_size=32, patch=16, frames=4, tubelet=2)
    return Recipe("small", ModelConfig(video, TextEncoderConfig(**size)), objectives={"vtc": Vtc(embed_dim=16)})


def _write_video(path: Path, seconds: float, seed: int = 0, codec: str = "mpeg4", size: int = 64) -> None:
    """Frames of one grey each, brighter and brighter."""
    shades = np.linspace(20, 230, round(seconds * RATE)) - seed
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=RATE)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for shade in shades:
            picture = np.full((size, size, 3), shade, np.uint8)
            target.mux(stream.encode(VideoFrame.from_ndarray(picture, "rgb24")))
        target.mux(stream.encode(None))


@pytest.fixture(scope="session")
def write_video():
    """write_video(path, seconds, ...): a video of RATE frames a second."""
    return _write_video


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two runs of one shape, `a` and `b`."""
    import torch

    folder = tmp_path_factory.mktemp("models")
    for name in "ab":
        torch.manual_seed(ord(name))
        save_random_run(folder / name, recipe(), WORDS)
    return folder


@pytest.fixture(scope="session")
def _media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    _write_video(folder / "short.mp4", 3)
    (folder / "films").mkdir()
    _write_video(folder / "films/long.mp4", 44, seed=10)
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"no film at all" * 100)
    (folder / "notes.txt").write_text("not a film")
    return folder


@pytest.fixture
def media(_media, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(_media, tmp_path / "media"))
