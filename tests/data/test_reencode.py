"""The frames that come out are those that went in, at their times; and a run that was stopped leaves no halves."""

import _thread
import io
import resource
import struct
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from smaug.data import reencode as module
from smaug.data.__main__ import main
from smaug.data.decode import read_frames, read_image
from smaug.data.frames import every_frame
from smaug.data.manifest import Sample, read_manifest
from smaug.data.media import Member
from smaug.data.reencode import ReencodeOptions, reencode, target_stems

N = 30
TIMES = [0, *np.cumsum(np.random.default_rng(0).integers(20, 90, N - 1)).tolist()]  # ms


def clip(path: Path, picture=lambda number: np.full((80, 120, 3), 20 + 7 * number, np.uint8), aspect=1) -> Path:
    """N frames at uneven times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", format="matroska" if path.suffix == ".mkv" else "mp4") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "5", "preset": "ultrafast", "bf": "2"})
        stream.height, stream.width = picture(0).shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = aspect
        for number, at in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn_clockwise(path: Path) -> Path:
    """By a quarter, in the matrix of an MP4 track: (x, y), y downwards, is shown at (-y, x)."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40
    path.write_bytes(data[:at] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) + data[at + 36 :])
    return path


def look(path):
    """Frames and their times."""
    seen = []
    frames = read_frames(path, lambda times: seen.append(times) or every_frame(times), 64)
    return frames.astype(int), seen[0]


def run(source, out, code=0, **options):
    console = Console(record=True, markup=False, width=300, file=io.StringIO())
    assert reencode(ReencodeOptions((source,), out, workers=2, **options), console) == code
    return console.export_text()


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_the_same_frames_come_out(tmp_path, codec):
    clip(tmp_path / "v/sub/a [1].mkv")
    run(tmp_path / "v", tmp_path / "out", codec=codec, gop=8)
    path = tmp_path / f"out/sub/a [1]{module.ENDS[codec]}"
    frames, times = look(path)
    assert [round((level - 20) / 7) for level in frames.mean((1, 2, 3))] == list(range(N))
    assert np.abs(times - np.array(TIMES) / 1000).max() < 0.0011
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.width, context.height, context.pix_fmt) == (120, 80, "yuv420p")
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        keys = [n for n, packet in enumerate(file.demux(video=0)) if packet.is_keyframe and packet.size]
    assert max(np.diff([*keys, N])) <= 8


def test_upright_square_pixels_and_the_colours(tmp_path):
    y, x = np.mgrid[:80, :120]
    colours = np.stack([255 * x / 120, 255 * y / 80, 128 + 60 * np.sin(x / 15)], -1).astype(np.uint8)
    # 240 x 80 as it is seen, and then turned
    source = turn_clockwise(clip(tmp_path / "v/a.mp4", lambda number: colours, aspect=2))
    run(tmp_path / "v", tmp_path / "out")
    before, after = look(source)[0], look(tmp_path / "out/a.mp4")[0]
    assert before.shape == after.shape
    assert np.abs(before - after).mean() < 4 and np.abs((after - before).mean((0, 1, 2))).max() < 1.5
    with av.open(str(tmp_path / "out/a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.width, stream.codec_context.height) == (80, 240)
        assert (stream.sample_aspect_ratio or 1) == 1 and next(file.decode(video=0)).rotation == 0


def test_smaller_and_fewer(tmp_path):
    clip(tmp_path / "v/a.mp4", lambda number: np.full((101, 67, 3), 20 + 7 * number, np.uint8).repeat(2, 0)[:100, :66])
    run(tmp_path / "v", tmp_path / "out", short_side=32, fps=5)
    frames, times = look(tmp_path / "out/a.mp4")
    kept = [round((level - 20) / 7) for level in frames.mean((1, 2, 3))]
    assert kept[0] == 0 and len(set(kept)) == len(kept) == int(TIMES[-1] / 200) + 1
    assert np.abs(times - np.array(TIMES)[kept] / 1000).max() < 1e-4  # those that stay keep their time
    with av.open(str(tmp_path / "out/a.mp4")) as file:
        assert (file.streams.video[0].width, file.streams.video[0].height) == (32, 48)


@pytest.fixture
def source(tmp_path):
    for name in ("a.mp4", "b.mp4", "b.mkv", "c d.mp4"):
        clip(tmp_path / "v" / name)
        (tmp_path / "v" / name).with_suffix(".txt").write_text(f"Говорят {name[0]}.")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "v/a.png")
    (tmp_path / "v/text.mp4").write_text("no video")
    return tmp_path / "v"


def test_it_goes_on_and_its_manifest_trains(tmp_path, source, monkeypatch):
    out, written = tmp_path / "out", []
    write = module.write_video
    monkeypatch.setattr(module, "write_video", lambda media, *rest: written.append(media.name) or write(media, *rest))
    text = run(source, out)
    assert "wrote      5 files" in text and "skipped    1 files" in text
    assert (out / "skipped.txt").read_text() == "text.mp4\tnot a media file\n"
    samples = read_manifest([out / "manifest.jsonl"], None)
    assert [s.kind for s in samples] == ["video", "image", "video", "video", "video"]
    assert [(s.name, s.captions) for s in samples] == [
        ("a.mp4", ("Говорят a.",)),
        ("a.png", ("Говорят a.",)),
        ("b.mp4", ("Говорят b.",)),
        ("b.mp4.mp4", ("Говорят b.",)),
        ("c d.mp4", ("Говорят c.",)),
    ]
    assert read_image(out / "a.png", 8).mean() == pytest.approx(220 / 3)
    assert len(written) == 5  # the text as well

    written.clear()
    assert "6 of 6 files are done already" in run(source, out) and written == []
    clip(source / "a.mp4", lambda number: np.zeros((64, 64, 3), np.uint8))
    (out / "b.mp4").unlink()
    run(source, out)
    assert sorted(written) == ["a.mp4", "b.mkv"]
    written.clear()
    run(source, out, gop=4)
    assert len(written) == 5
    black = clip(tmp_path / "black.mp4", lambda number: np.zeros((64, 64, 3), np.uint8))
    black.rename(source / "b.avi")  # takes the place of b.mkv, which moves
    run(source, out, gop=4)
    assert look(out / "b.mp4")[0].max() < 5 < look(out / "b.mkv.mp4")[0].max()


def test_ctrl_c_leaves_whole_files_only(tmp_path, source, monkeypatch, capsys):
    out, write = tmp_path / "out", module.write_video

    def stop(media, *rest):
        if media.name == "c d.mp4":
            _thread.interrupt_main()
            threading.Event().wait(1)
        return write(media, *rest)

    monkeypatch.setattr(module, "write_video", stop)
    monkeypatch.setattr(sys, "argv", ["smaug", "reencode", str(source), "--out", str(out), "--workers", "1"])
    assert main() == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not (out / "manifest.jsonl").exists() and not (out / ".aside").exists()
    assert sorted(path.name for path in out.glob("*.mp4")) == ["a.mp4", "b.mp4", "b.mp4.mp4"]
    monkeypatch.setattr(module, "write_video", write)
    time.sleep(1.2)  # the thread that was left behind finds its folder gone
    assert main() == 0
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 5


def test_a_full_disk_ends_it(tmp_path, source):
    """A limit on the size of files stands for the disk: its error is of the same kind."""
    noise = np.random.default_rng(0).integers(0, 255, (N, 80, 120, 3), np.uint8)
    clip(source / "c d.mp4", lambda number: noise[number])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ValueError, match=r"out cannot be written: .*the same command goes on from here"):
            run(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out/c d.mp4").exists() and not (tmp_path / "out/.aside").exists()
    run(source, tmp_path / "out")
    assert len(look(tmp_path / "out/c d.mp4")[0]) == N


def test_folders_that_are_not_for_it(tmp_path, source):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        run(source, tmp_path / "mine")
    with pytest.raises(ValueError, match="lies inside the source"):
        run(source, source / "out")


def test_names_stay_inside_and_apart():
    def named(*names):
        return target_stems([Sample(Path(name), "video", (), name) for name in names])

    assert named("a.mp4", "a.avi", "b/a.mp4", "/x/a.mp4", "../a.b.mp4") == ["a", "a.avi", "b/a", "x/a", "a.b"]
    assert named("a.mp4", "../a.mp4", "/a.mp4", "a.mp4.mkv", "..") == ["a", "a.mp4", "a.mp4-2", "a.mp4.mkv", "-2"]
    member = Sample(Member(Path("x/00000.tar"), 512, 10), "video", (), "00000.tar:sub/0001")
    assert target_stems([member]) == ["00000/sub/0001"]
