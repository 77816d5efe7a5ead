"""Every decoder gives the same frames of the clips it accepts, and says of the others why it does not.

The clips are those of test_decode.py: the brightness of a frame is its number.
"""

import runpy
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from smaug.data.decode import Want, choose, dali, open_decoder, read_frames, read_image
from smaug.data.decode.choose import Second
from smaug.data.decode.dali import DaliDecoder
from smaug.data.decode.pyav import PyavDecoder
from smaug.data.frames import Crop, every_frame

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_decode.py"))))
N, encode, numbers = made.N, made.encode, made.numbers
CPU = torch.device("cpu")
VPX = {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"}
FINE = {"qmin": "1", "qmax": "1", "strict": "unofficial"}
OPTIONS = {"libvpx": {"crf": "4", "b": "2M"}, "libvpx-vp9": VPX, "mjpeg": FINE}
KINDS = made.KINDS | {
    "vp9.mp4": ("libvpx-vp9", VPX),
    "mjpeg.avi": ("mjpeg", FINE),
    "av1.mkv": ("libsvtav1", {"crf": "8"}),
}
PIX_FMT = {"gif": "rgb8", "mjpeg": "yuvj420p"}
ON_A_CPU = ("vp9.webm", "vp8.webm", "vp9.mp4", "mjpeg.avi")  # what DALI decodes there
REFUSED = {
    "pyav": {},
    "torchcodec": {
        "intrarefresh.mp4": "its key frames are damaged or not whole, and torchcodec would not notice",
        "no_times.avi": "torchcodec cannot tell its frames apart: not every one has a time",
        "gif.gif": "its packets cannot be written to a Matroska file",
    },
    "dali": {
        name: f"dali decodes {codec} on a GPU only" if codec in dali.GPU_CODECS else f"dali does not decode {codec}"
        for name, (library, _) in KINDS.items()
        if name not in ON_A_CPU
        for codec in [{"libx264": "h264", "libx265": "hevc", "libsvtav1": "av1"}.get(library, library)]
    },
}
# Decoding is exact, so what differs is how chroma is spread and which bicubic filter makes a frame smaller. Two of them
# in FFmpeg and Pillow differ by up to this much, in levels of 255 (test_decode.py, video and picture).
LEVELS = {"pyav": 0.0, "dali": 1.5, "torchcodec": 2.5}  # torchcodec darkens green by up to 2, see pyav.FILTER


@pytest.fixture(scope="module", params=["pyav", "dali", "torchcodec"])
def decoder(request):
    try:
        opened = open_decoder(request.param, CPU, 2, 20.0)
    except ValueError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")

    def clip(name: str) -> Path:
        codec, options = KINDS[name]
        if not (folder / name).exists():
            if codec not in av.codecs_available:
                pytest.skip(f"this PyAV has no {codec}")
            encode(folder / name, made.numbered(), codec, PIX_FMT.get(codec, "yuv420p"), options)
        return folder / name

    return clip


def video(media, frames, **how) -> Want:
    return Want(media, "video", lambda times: frames, **how)


def frames_of(got) -> np.ndarray:
    assert got.frames is not None, got.reason
    assert got.reason == "" and got.frames.dtype == torch.uint8 and got.frames.is_contiguous()
    return got.frames.cpu().numpy()


def assert_like_pyav(decoder, wants, size):
    levels = LEVELS[decoder.name]
    for want, got in zip(wants, decoder.decode(wants, size), strict=True):
        expected = read_frames(want.media, want.pick, size, crop=want.crop, flip=want.flip).astype(float)
        difference = frames_of(got) - expected
        assert np.abs(difference).mean() <= levels and np.abs(difference.mean((0, 1, 2))).max() <= levels


def all_orders():
    """Every frame, one alone at every place in a group of pictures, and some in any order with repeats."""
    rng = np.random.default_rng(0)
    return [
        [*range(N)],
        *([first] for first in range(0, N, 3)),
        *(rng.integers(0, N, rng.integers(1, 9)).tolist() for _ in range(8)),
    ]


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(decoder, clip, name):
    wants = [video(clip(name), frames) for frames in all_orders()]
    got = decoder.decode(wants, 32)
    if name in REFUSED[decoder.name]:
        assert {one.reason for one in got if one.frames is None} == {REFUSED[decoder.name][name]}
        assert all(
            numbers(one.frames.numpy()) == want.pick([])
            for one, want in zip(got, wants, strict=True)
            if one.frames is not None
        )
    else:
        assert [numbers(frames_of(one)) for one in got] == all_orders()
        (none,) = decoder.decode([video(clip(name), [])], 32)
        assert frames_of(none).shape == (0, 32, 32, 3)


def test_hidden_packets_of_vp8_are_no_frames(decoder, tmp_path, clip):
    hidden = {5, 17, 30}
    with av.open(str(clip("vp8.webm"))) as source, av.open(str(tmp_path / "a.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= ~0x10 if number in hidden else 0xFF  # the bit is show_frame
            copy = av.Packet(bytes(data))
            copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, packet.pts, packet.dts
            copy.is_keyframe = packet.is_keyframe
            target.mux(copy)
    shown = [number for number in range(N) if number not in hidden]
    orders = [[*range(57)], [4, 5, 15, 16, 27, 28], [56], [29]]
    got = decoder.decode([video(tmp_path / "a.webm", frames) for frames in orders], 32)
    assert [numbers(frames_of(one)) for one in got] == [[shown[i] for i in frames] for frames in orders]


def test_hidden_frames_of_vp9_are_no_frames(decoder, tmp_path, clip):
    """A writer of files joins each with the frame after it."""
    with av.open(str(clip("vp9.webm"))) as source, av.open(str(tmp_path / "a.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= ~0x02 if packet.is_keyframe and number else 0xFF  # the bit is show_frame
            copy = av.Packet(bytes(data))
            copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, packet.pts, packet.dts
            copy.is_keyframe = packet.is_keyframe
            target.mux(copy)
    shown = [number for number in range(N) if number % 12 or not number]
    orders = [[*range(56)], [3, 20], [11, 12], [55]]
    got = decoder.decode([video(tmp_path / "a.webm", frames) for frames in orders], 32)
    assert [numbers(frames_of(one)) for one in got] == [[shown[i] for i in frames] for frames in orders]


CROPS = (None, Crop(0.4, 1.3, 0.1, 0.8), Crop(1.0, 0.75, 0.5, 0.5), Crop(0.3, 0.8, 1.0, 0.0))


@pytest.mark.parametrize("turn", range(8))
def test_crops_flips_and_turns_are_the_same(decoder, tmp_path, turn):
    path = encode(tmp_path / "a.mp4", [made.smooth(120, 160)] * 2, "libvpx-vp9", options=VPX)
    turned = made.turned_copy(path, turn % 4, mirrored=turn >= 4)
    wants = [video(turned, [1, 0], crop=crop, flip=flip) for crop in CROPS for flip in (False, True)]
    assert_like_pyav(decoder, wants, 64)
    assert_like_pyav(decoder, wants[:3], 150)  # larger than the film


def test_a_large_film_that_names_no_matrix_is_bt709(decoder, tmp_path):
    path = encode(tmp_path / "a.webm", [made.smooth(592, 64)], "libvpx-vp9", options=VPX)
    assert_like_pyav(decoder, [video(path, [0])], 32)


def test_wide_pixels_are_shown_wide(decoder, tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=25, options=VPX)
        stream.height, stream.width, stream.pix_fmt = 80, 60, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        file.mux(stream.encode(av.VideoFrame.from_ndarray(made.smooth(80, 60), format="rgb24")))
        file.mux(stream.encode())
    assert_like_pyav(decoder, [video(tmp_path / "a.mkv", [0], crop=crop) for crop in CROPS], 40)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("libvpx-vp9", "yuv420p"), ("libvpx-vp9", "yuv444p"), ("mjpeg", "yuvj420p")]
)
@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize("full", [False, True])
def test_range_and_matrix_are_those_of_the_stream(decoder, tmp_path, codec, pix_fmt, matrix, full):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream(codec, rate=25, options=VPX if "vp9" in codec else FINE)
        stream.width = stream.height = 64
        stream.pix_fmt = pix_fmt
        frame = av.VideoFrame(64, 64, pix_fmt)
        for of in (stream.codec_context, frame):
            of.color_range, of.colorspace = 1 + full, matrix
        for plane, level in zip(frame.planes, (110, 100, 170), strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    want = video(tmp_path / "a.mkv", [0])
    if decoder.name == "torchcodec" and full and "vp9" in codec:
        assert decoder.decode([want], 32)[0].reason == "torchcodec does not see that its levels go from 0 to 255"
    else:
        assert_like_pyav(decoder, [want], 32)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9", "mjpeg"])
@pytest.mark.parametrize("second", [(64, 160), (32, 96), (128, 192)])
def test_a_clip_whose_size_changes(decoder, tmp_path, codec, second):
    """DALI would show memory that was never written, or die of memory that is not its own."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    pictures = [made.smooth(64, 96)] * 12, [made.smooth(*second)] * 12
    parts = [encode(tmp_path / f"{i}.mkv", p, codec, pix_fmt, OPTIONS[codec]) for i, p in enumerate(pictures)]
    with av.open(str(tmp_path / "a.mkv"), "w") as file, av.open(str(parts[0])) as one, av.open(str(parts[1])) as two:
        stream = file.add_stream_from_template(one.streams.video[0], opaque=True)
        packets = [packet for part in (one, two) for packet in part.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * number
            file.mux(packet)
    whole, start = decoder.decode([video(tmp_path / "a.mkv", frames) for frames in ([0, 13, 20], [0, 7])], 32)
    assert len(frames_of(start)) == 2
    if decoder.name == "pyav":
        assert len(frames_of(whole)) == 3
    else:
        assert whole.reason == f"its frames have several sizes, which {decoder.name} does not notice"


def test_bad_clips_spoil_no_others(decoder, clip, tmp_path):
    good = clip("vp9.webm").read_bytes()
    Image.fromarray(made.smooth(40, 50)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    middle = len(good) // 2
    wants = [
        video(good, [3, 50, 3]),
        video(b"", [0]),
        Want(tmp_path / "a.png", "image", every_frame, flip=True),
        video(bytes(5000), [0]),
        video(np.random.default_rng(0).bytes(5000), [0]),
        video(clip("vp8.webm"), [7]),
        video(clip("h264.mp4"), [9]),
        video(tmp_path / "none.webm", [0]),
        Want(tmp_path / "b.png", "image", every_frame),
        video(good[: middle - 500] + bytes(1000) + good[middle + 500 :], range(0, 40, 5)),
        video(good[:middle], [0]),
        video(good, [59]),
    ]
    got = decoder.decode(wants, 32)
    assert numbers(frames_of(got[0])) == [3, 50, 3] and numbers(frames_of(got[-1])) == [59]
    assert numbers(frames_of(got[5])) == [7] and numbers(frames_of(got[10])) == [0]
    assert (frames_of(got[2]) == read_image(tmp_path / "a.png", 32, flip=True)).all()
    assert [got[i].reason for i in (1, 3, 7, 8)] == ["0 bytes", "not a media file", "file not found", "not a picture"]
    assert got[4].reason and {one.decoder for one in got} == {decoder.name}
    assert got[6].reason == ("dali decodes h264 on a GPU only" if decoder.name == "dali" else "")
    with pytest.raises(ValueError, match="not a frame of a clip of 60"):
        decoder.decode([wants[0], video(good, [60])], 32)


@pytest.mark.parametrize("name", ["vp9.webm", "vp8.webm", "mjpeg.avi"])
def test_flipped_bits_raise_nothing(decoder, clip, name):
    rng = np.random.default_rng(5)
    wants = []
    for _ in range(16):
        broken = bytearray(clip(name).read_bytes())
        for at in rng.integers(len(broken) // 8, len(broken), 4):
            broken[at] ^= 1 << rng.integers(8)
        wants.append(Want(bytes(broken), "video", lambda times: made.middle_segments(len(times), 3)))
    for got in decoder.decode(wants, 32):
        assert got.frames is None or got.frames.shape == (3, 32, 32, 3)
        assert (got.frames is None) == (0 < len(got.reason) < 150) and "\n" not in got.reason


# ---- DALI alone


@pytest.fixture
def on_cpu():
    try:
        opened = DaliDecoder(CPU, 2, 20.0)
    except ValueError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def test_frames_of_dali_stay_when_it_goes_on(on_cpu, clip, monkeypatch):
    """They are DALI's own memory. Runs are short here, so that the later ones would reuse it."""
    monkeypatch.setattr(dali, "MOST_SHOWN", 1)
    wants = [video(clip("vp9.webm"), [i, 59 - i]) for i in range(20)]
    held = on_cpu.decode(wants, 32)
    on_cpu.decode(wants[::-1], 32)
    on_cpu.close()
    assert [numbers(frames_of(one)) for one in held] == [[i, 59 - i] for i in range(20)]


def test_a_run_of_dali_that_never_ends_is_left(on_cpu, clip, monkeypatch):
    on_cpu.runner.seconds = 0.5
    plain = on_cpu._try
    monkeypatch.setattr(
        on_cpu, "_try", lambda jobs, *rest: time.sleep(2) if len(jobs[0].piece.frames) == 3 else plain(jobs, *rest)
    )
    got = on_cpu.decode([video(clip("vp9.webm"), [1, 2, 3]), video(clip("vp9.webm"), [4])], 32)
    assert got[0].reason == "does not come back from dali; left alone after 0 s"
    assert numbers(frames_of(got[1])) == [4]


def test_auto_asks_pyav_for_what_dali_refuses(on_cpu, clip):
    second = Second(on_cpu, PyavDecoder(2))
    got = second.decode([video(clip("h264.mp4"), [5]), video(clip("vp9.webm"), [6]), video(b"", [0])], 32)
    assert [one.decoder for one in got] == ["pyav", "dali", "pyav"] and got[2].reason == "0 bytes"
    assert [numbers(frames_of(one)) for one in got[:2]] == [[5], [6]]


# ---- what is asked for and not there


def test_a_missing_decoder_is_refused_in_one_line(monkeypatch):
    for module in ("nvidia.dali", "torchcodec.decoders", "nvidia"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=r"^dali is not installed; run: pip install -c constraints.txt -e '.\[dali\]'$"
    ):
        open_decoder("dali", CPU)
    with pytest.raises(ValueError, match=r"^torchcodec cannot be imported.*-e '.\[torchcodec\]'$"):
        open_decoder("torchcodec", CPU)
    assert not choose._has_dali()
    assert open_decoder("auto", CPU).name == open_decoder("auto", torch.device("cuda")).name == "pyav"


def test_dali_on_a_gpu_that_is_not_there_is_refused(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^dali is to decode on a GPU, but PyTorch sees none here$"):
        open_decoder("dali", torch.device("cuda"))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["h264.mp4", "opengop.mp4", "mpeg.ts", "hevc.mp4", "vp9.webm", "vp8.webm", "av1.mkv"])
def test_dali_on_a_gpu(tmp_path, name):
    """NVDEC's least sizes are 128 x 128 for VP9 and AV1, 144 x 144 for HEVC."""
    try:
        on_gpu = DaliDecoder(torch.device("cuda"), 2, 20.0)
    except ValueError as error:
        pytest.skip(str(error))
    codec, options = KINDS[name]
    large = [np.asarray(Image.fromarray(picture).resize((288, 192))) for picture in made.numbered()]
    path = encode(tmp_path / name, large, codec, options=options)
    wants = [video(path, frames) for frames in all_orders()]
    got = on_gpu.decode(wants, 32)
    assert [numbers(frames_of(one)) for one in got] == all_orders()
    assert all(one.frames.is_cuda for one in got)
    films = encode(tmp_path / f"smooth.{name}", [made.smooth(192, 288)] * 2, codec, options=options)
    assert_like_pyav(
        on_gpu, [video(films, [1, 0], crop=crop, flip=flip) for crop in CROPS for flip in (False, True)], 64
    )
    auto = open_decoder("auto", torch.device("cuda"))
    (film,) = auto.decode([Want(films, "video", every_frame)], 64)
    assert film.decoder == "dali" and film.frames.is_cuda
    on_gpu.close()
