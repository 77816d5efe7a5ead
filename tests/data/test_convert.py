"""Shards from any source: the layout of video2dataset, the same bytes each time, and what stops half-way goes on."""

import io
import json
import resource
import tarfile

import pytest
import webdataset
from PIL import Image
from rich.console import Console

from smaug.data import convert as converting
from smaug.data.convert import ConvertOptions, convert
from smaug.data.manifest import ManifestError
from smaug.data.media import read_bytes
from smaug.data.source import read_source


@pytest.fixture
def folder(tmp_path, shapes_cache, monkeypatch):
    """Eight clips, the first with two captions; a picture; and two files that cannot be decoded."""
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    folder.mkdir()
    built = next(shapes_cache.glob("shapes-*"))
    for number, line in enumerate((built / "train.jsonl").read_text().splitlines()[:8]):
        row = json.loads(line)
        (folder / f"{number}.webm").write_bytes((built / row["video"]).read_bytes())
        (folder / f"{number}.txt").write_text(row["caption"] + ("\nein café" if number == 0 else ""))
    Image.new("RGB", (40, 30), (9, 90, 9)).save(folder / "5i.png")
    (folder / "3bad.mp4").write_bytes(b"no video")
    (folder / "4none.mp4").touch()
    for name in ("5i", "3bad", "4none"):
        (folder / f"{name}.txt").write_text(f"said of {name}")
    return folder


def run(source, out, **options):
    log = io.StringIO()
    code = convert(ConvertOptions((source,), out, per_shard=4, **options), Console(file=log, width=300))
    return code, log.getvalue()


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_what_goes_in_comes_out(folder, tmp_path):
    code, log = run(folder, tmp_path / "out")
    assert code == 0 and "10 samples to 3 shards" in log and "done       3 shards; 2 were left out" in log
    assert (tmp_path / "out/skipped.txt").read_text() == "4none.mp4: 0 bytes\n3bad.mp4: not a media file\n"
    before, after = (read_source([path]) for path in (folder, tmp_path / "out"))
    good = [sample for sample in before if sample.name not in ("3bad.mp4", "4none.mp4")]
    assert [(s.kind, s.captions, read_bytes(s.path)) for s in after] == [
        (s.kind, s.captions, read_bytes(s.path)) for s in good
    ]
    assert len(after[0].captions) == 2 and after[0].name == "00000.tar:000000000"
    with tarfile.open(tmp_path / "out/00001.tar") as tar:
        names = [member.name for member in tar]
        assert names[:3] == ["000010001.json", "000010001.txt", "000010001.webm"]
        assert "000010003.png" in names  # and none is 000010000: the number of 3bad stays free
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    assert json.loads((tmp_path / "out/00001_stats.json").read_text())["successes"] == 3


def test_webdataset_reads_it(folder, tmp_path):
    run(folder, tmp_path / "out")
    theirs = list(webdataset.WebDataset(str(tmp_path / "out/{00000..00002}.tar"), shardshuffle=False))
    assert len(theirs) == 9
    record = json.loads(theirs[0]["json"])
    assert theirs[0]["txt"].decode() == record["caption"] == record["captions"][0]
    assert (record["name"], record["key"], record["status"]) == ("0.webm", theirs[0]["__key__"], "success")
    assert record["captions"][1] == "ein café" and theirs[0]["webm"] == (folder / "0.webm").read_bytes()


def test_shards_of_shards(folder, tmp_path):
    """A member has no name of its own; what it begins with tells the ending."""
    run(folder, tmp_path / "one")
    run(tmp_path / "one", tmp_path / "two")
    one, two = (read_source([tmp_path / name]) for name in ("one", "two"))
    assert [(s.kind, s.captions, read_bytes(s.path)) for s in one] == [
        (s.kind, s.captions, read_bytes(s.path)) for s in two
    ]
    with tarfile.open(tmp_path / "two/00001.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"json", "txt", "webm", "png"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_stopped_and_gone_on_is_as_if_never_stopped(folder, tmp_path, monkeypatch, stop):
    run(folder, tmp_path / "whole", workers=1)
    decoded = []

    def interrupted(sample):
        decoded.append(sample)
        if len(decoded) == 6:
            raise stop
        return read(sample)

    read = converting._read
    with monkeypatch.context() as patch:
        patch.setattr(converting, "_read", interrupted)
        if stop is KeyboardInterrupt:
            code, log = run(folder, tmp_path / "out")
            assert code == 130 and "1 of 3 shards are made; the same command goes on" in log
        else:
            with pytest.raises(
                OSError, match=r"out cannot be written: No space left on device; 1 of 3 shards are made"
            ):
                run(folder, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"00000.tar", "00000_stats.json", "source.json"}
    made = (tmp_path / "out/00000.tar").stat().st_mtime_ns
    # and what a machine leaves that lost its power
    (tmp_path / "out/.00001.tar.aside").write_bytes(b"half")
    (tmp_path / "out/00001.tar").write_bytes(b"half")
    assert run(folder, tmp_path / "out")[0] == 0
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == made
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk(folder, tmp_path):
    """A limit on the size of files fails as a full disk does, in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: File too large; 0 of 3 shards are made"):
            run(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(contents(tmp_path / "out")) == {"source.json"}
    assert run(folder, tmp_path / "out")[0] == 0


def test_a_folder_holds_one_source(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(ManifestError, match="holds shards of another source"):
        run(folder, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(ManifestError, match="is not empty, and not made by convert"):
        run(folder, tmp_path / "full")
    with pytest.raises(ManifestError, match="lies in"):
        run(folder, folder / "shards")
    with pytest.raises(ManifestError, match="at least 1"):
        convert(ConvertOptions((folder,), tmp_path / "x", per_shard=0), Console())
    with converting._claimed(tmp_path / "busy", "{}"), pytest.raises(ManifestError, match="another process"):
        run(folder, tmp_path / "busy")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        run(folder, tmp_path / "file")
