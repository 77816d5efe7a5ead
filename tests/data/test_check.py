"""`check` counts and names, goes on where it was stopped, and no file ends it."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from smaug.data import check as module
from smaug.data.__main__ import main
from smaug.data.check import CheckOptions, Verdict, check
from smaug.data.contact_sheet import font_for, wrap
from smaug.data.journal import Journal
from smaug.data.listing import list_files

ROOT = Path(__file__).resolve().parents[2]
AWKWARD = ROOT.parent / "shared/data/awkward"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def clip(path: Path, frames=10, rate=10, size=(48, 64), gop=5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={"g": str(gop), "preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((*size, 3), 20 * number % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


NAMES = ["a b.mp4", "[bold]c[/].mp4", "视频 клип.MP4", "sub/ü:1%d.mkv"]


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "my [red]videos"
    for name in NAMES:
        clip(top / name)
    Image.new("RGB", (40, 30)).save(top / "p.png")
    (top / "a b.txt").write_text("Что-то движется.\n")
    (top / "text.mp4").write_text("no video at all")
    (top / "zero.webm").touch()
    (top / "random.avi").write_bytes(bytes(range(256)) * 20)
    (top / "README.md").write_text("mine")
    (top / ".hidden.mp4").write_text("")
    (top / "circle").symlink_to(top)
    (top / "gone.mp4").symlink_to(top / "nothing")
    return top


def start(*arguments):
    command = [sys.executable, "-m", "smaug.data", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def report_of(*sources, code=0, **options):
    options = CheckOptions(tuple(sources), json=Path("r.json"), workers=2, **options)
    assert check(options, Console(quiet=True)) == code
    return json.loads(Path("r.json").read_text())


def test_the_command_counts_and_names(folder, tmp_path):
    process = start("check", folder, "--json", "-")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    report = json.loads(output)  # nothing else is there
    assert (report["files"], report["good"], report["missing_captions"], report["ignored"]) == (9, 5, 8, ["README.md"])
    assert {bad["name"]: bad["reason"] for bad in report["bad"]} == {
        "gone.mp4": "file not found",
        "random.avi": "not a media file",
        "text.mp4": "not a media file",
        "zero.webm": "0 bytes",
    }
    assert report["codecs"] == {"h264": 4, "png": 1} and report["resolutions"] == {"64x48": 4, "40x30": 1}
    assert report["seconds"] == {"min": 1.0, "median": 1.0, "max": 1.0, "total": 4.0}
    assert (report["frames"], report["frames_per_key_frame"]) == (40, 5.0)
    assert "text.mp4: not a media file" in errors
    with Image.open(tmp_path / report["sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    console = Console(record=True, file=io.StringIO(), width=300)
    assert check(CheckOptions((folder,), no_sheet=True, strict=True), console) == 1
    assert "8 of 9 files from an earlier check" in console.export_text()  # what is not there has no time of change


def test_errors_are_one_line(capsys, monkeypatch, tmp_path):
    for arguments, text in (
        (["check"], "name a source"),
        (["check", "nothing"], "nothing does not exist"),
        (["check", ".", "--json", "no/r.json"], "there is no folder no"),
        (["check", ".", "--sheet", "a.jpg"], "must end in .png"),
        (["check", ".", "--frames", "0"], "must be above 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["smaug", *arguments])
        assert main() == 1
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


def test_manifests_and_shards(tmp_path):
    clip(tmp_path / "v/a.mp4")
    clip(tmp_path / "v/b.mp4")
    (tmp_path / "m.csv").write_text("video,caption\nv/a.mp4,A dog.\nv/b.mp4,\nv/c.mp4,A cat.\n,nothing\n")
    report = report_of(tmp_path / "m.csv")
    assert (report["files"], report["good"], report["missing_captions"]) == (4, 2, 1)
    assert {bad["name"] for bad in report["bad"]} == {"v/c.mp4", "m.csv:5"}
    with tarfile.open(tmp_path / "v/00000.tar", "w") as tar:
        for key, name in (("0", "a.mp4"), ("1", "b.mp4")):
            tar.add(tmp_path / "v" / name, f"{key}.mp4")
        tar.add(tmp_path / "m.csv", "0.txt")
        tar.add(tmp_path / "m.csv", "../out.mp4")
    report = report_of(tmp_path / "v/00000.tar")
    assert report["files"] - report["good"] == len(report["bad"]) >= 1
    assert any("out of the shard" in bad["reason"] for bad in report["bad"])
    assert report_of(tmp_path / "v")["good"] >= 2  # a folder with both


def test_a_changed_file_is_looked_at_again(tmp_path, monkeypatch):
    seen = []
    examine = module.examine
    monkeypatch.setattr(module, "examine", lambda media, *rest: seen.append(media.name) or examine(media, *rest))
    for name in ("a.mp4", "b.mp4"):
        clip(tmp_path / "v" / name)
    assert report_of(tmp_path / "v")["good"] == 2
    (journal,) = (tmp_path / "cache/check").iterdir()
    journal.write_bytes(journal.read_bytes() + b'\xff{"broken\n{"file": 1}\n[]\n{"file"')
    (tmp_path / "v/b.mp4").write_text("changed")
    seen.clear()
    report = report_of(tmp_path / "v")
    assert seen == ["b.mp4"] and (report["good"], len(report["bad"])) == (1, 1)
    seen.clear()
    report_of(tmp_path / "v", fresh=True)
    assert sorted(seen) == ["a.mp4", "b.mp4"]
    (tmp_path / "m.csv").write_text("image,caption\nv/a.mp4,A dog.\n")
    assert report_of(tmp_path / "m.csv")["bad"] == [{"name": "v/a.mp4", "reason": "not a picture"}]
    (tmp_path / "m.csv").write_text("video,caption\nv/a.mp4,A dog.\n")
    assert report_of(tmp_path / "m.csv")["good"] == 1


def test_no_file_ends_it(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        clip(tmp_path / "v" / name)
    examine = module.examine
    forever = threading.Event()

    def fails(media, *rest):
        if media.name == "b.mp4":
            raise MemoryError
        if media.name == "c.mp4":
            raise ZeroDivisionError("by zero")
        if media.name == "d.mp4":
            forever.wait()
        return examine(media, *rest)

    monkeypatch.setattr(module, "examine", fails)
    report = report_of(tmp_path / "v", clip_seconds=0.1)
    forever.set()
    assert report["good"] == 1
    assert [bad["reason"] for bad in report["bad"]] == [
        "MemoryError",
        "ZeroDivisionError: by zero",
        "does not come back from decoding; left alone after 1 s",
    ]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    clip(tmp_path / "v/a.mp4")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "file"))
    console = Console(record=True, file=io.StringIO())
    assert check(CheckOptions((tmp_path / "v",), no_sheet=True), console) == 0
    text = console.export_text()
    assert "warning: " in text and "1 good" in text


def test_ctrl_c_and_on(tmp_path):
    """The verdicts of an interrupted run are those that the next one does not ask for again."""
    first = clip(tmp_path / "v/00.mp4", frames=200, size=(240, 320))
    for number in range(1, 40):
        os.link(first, tmp_path / f"v/{number:02}.mp4")
    process = start("check", "v", "--full", "--no-sheet", "--workers", "1")
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        if any(path.stat().st_size > 500 for path in (tmp_path / "cache").glob("check/*.jsonl")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    console = Console(record=True, file=io.StringIO(), width=300)
    check(CheckOptions((Path("v"),), full=True, no_sheet=True), console)
    text = console.export_text()
    assert 1 <= int(text.split("known")[1].split()[0]) < 40 and "40 good" in text


def test_a_journal_forgets_what_it_cannot_read(tmp_path):
    file = tmp_path / "a"
    file.write_text("x")
    journal = Journal(tmp_path / "j.jsonl", Verdict, pytest.fail)
    journal.add(file, Verdict("video", "bad"))
    line = (tmp_path / "j.jsonl").read_bytes().strip()
    for text in (line[:-3], line.replace(b"reason", b"wrong"), b"\xff", b"[1]", b"null"):
        (tmp_path / "j.jsonl").write_bytes(text)
        assert Journal(tmp_path / "j.jsonl", Verdict, pytest.fail).get(file) is None
    (tmp_path / "j.jsonl").write_bytes(line)
    assert Journal(tmp_path / "j.jsonl", Verdict, pytest.fail).get(file) == Verdict("video", "bad")


def test_captions_are_wrapped():
    assert wrap("a dog runs", 5, 2, len) == ["a dog", "runs"]
    assert wrap("a dog runs and runs", 6, 2, len) == ["a dog", "runs…"]
    assert wrap("x" * 10, 4, 2, len) == ["xxxx", "xxx…"]
    assert wrap("", 4, 2, len) == []
    assert font_for("Каждый") is not None


@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"the shared awkward files are not at {AWKWARD}")
@pytest.mark.parametrize("full", [False, True])
def test_awkward_files_are_good_or_named(full):
    report = report_of(AWKWARD, full=full)
    assert report["files"] == sum(path.is_file() for path in AWKWARD.iterdir())
    assert (report["good"], len(report["bad"]), report["missing_captions"]) == (18, 7, 25)
    assert all(bad["reason"] for bad in report["bad"])


def test_twenty_thousand_rows_without_captions_are_no_work(tmp_path):
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,yes\n" + "".join(f"{i}.mp4,\n" for i in range(20_000)))
    began = time.monotonic()
    listing = list_files([tmp_path / "m.csv"], None, "video", "image", "caption")
    assert (len(listing.samples), listing.missing, listing.bad) == (20_001, 20_000, [])
    assert time.monotonic() - began < 10  # a quadratic one took 24 s
