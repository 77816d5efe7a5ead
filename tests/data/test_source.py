"""Manifests, folders with captions beside the files, shards and patterns of them, alone and together."""

import json
import os
from pathlib import Path

import pytest
import webdataset

from smaug.data.manifest import ManifestError, Skip
from smaug.data.source import expand, read_source, source_name


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path_factory.mktemp("cache")))


def fill(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def shard(path, *keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for key in keys:
            tar.write({"__key__": key, "mp4": b"video", "txt": f"said of {key}"})
    return path


def said(samples):
    return [(sample.name, sample.kind, list(sample.captions)) for sample in samples]


def test_a_folder_with_captions_beside_the_files(tmp_path):
    files = {
        "b.mp4": "v", "b.txt": "one\n\n two \n", "b.json": '{"caption": "not read"}',
        "a.JPG": "i", "a.json": '{"caption": ["red", "round"], "whisper": {"text": "junk"}}',
        "c.webm": "v", "c.txt": " \n", "c.json": '{"caption": "of json"}',
        "latin.gif": "v", "latin.txt": b"caf\xe9", "dots.in.name.mp4": "v", "dots.in.name.txt": "dotted",
        "deep/er/d.mkv": "v", "deep/er/d.txt": "deep", "deep/z.mp4": "v", "deep/z.txt": "z",
        ".hidden.mp4": "v", ".hidden.txt": "x", ".git/e.mp4": "v", ".git/e.txt": "x",
        "none.mp4": "v", "junk.mp4": "v", "junk.json": '["segments"]', "long.mp4": "v", "long.txt": "x" * (2**20 + 1),
        "notes.txt": "no media", "sound.m4a": "s", "sound.txt": "x",
    }  # fmt: skip
    folder = fill(tmp_path / "clips", files)
    skipped = []
    assert said(read_source([folder], skipped=skipped)) == [
        ("a.JPG", "image", ["red", "round"]),
        ("b.mp4", "video", ["one", "two"]),
        ("c.webm", "video", ["of json"]),
        ("dots.in.name.mp4", "video", ["dotted"]),
        ("latin.gif", "video", ["caf\ufffd"]),
        ("deep/z.mp4", "video", ["z"]),
        ("deep/er/d.mkv", "video", ["deep"]),
    ]
    assert skipped == [
        Skip("junk.mp4", "no caption in junk.json"),
        Skip("long.mp4", "long.txt has more than 1 MiB"),
        Skip("none.mp4", "no caption: neither none.txt nor none.json beside it"),
    ]


def test_links_and_pipes(tmp_path):
    """A link is followed once; one that leads in a circle, to itself or to nothing, and a pipe, do no harm."""
    folder = fill(tmp_path / "clips", {"a/b.mp4": "v", "a/b.txt": "said", "p.mp4": "v"})
    fill(tmp_path / "elsewhere", {"c.mp4": "v", "c.txt": "linked"})
    (folder / "a/up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "lost.mp4").symlink_to("nowhere")
    (folder / "z1").symlink_to(tmp_path / "elsewhere")
    (folder / "z2").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "p.txt")
    os.mkfifo(folder / "q.tar")
    (folder / "dir.tar").mkdir()
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"v")
    skipped = []
    assert [s.name for s in read_source([folder], skipped=skipped)] == ["a/b.mp4", "z1/c.mp4"]
    assert {skip.name for skip in skipped} == {"p.mp4", "lost.mp4", "q.tar", "caf\\xe9.mp4"}


def test_shards_by_name_by_pattern_and_in_folders(tmp_path):
    for number in range(8, 12):
        shard(tmp_path / f"s/{number:05d}.tar", f"{number:05d}0000", f"{number:05d}0001")
    fill(tmp_path / "s", {"00008.parquet": "p", "00008_stats.json": "{}", "loose.mp4": "v", "loose.txt": "loose"})
    names = [f"{n:05d}.tar:{n:05d}000{k}" for n in range(8, 12) for k in (0, 1)]
    assert [s.name for s in read_source([tmp_path / "s/{00008..00011}.tar"])] == names
    assert [s.name for s in read_source([tmp_path / "s"])] == [*names, "loose.mp4"]
    assert [s.name for s in read_source([tmp_path / "s/00009.tar"])] == names[2:4]
    # a shard that is named twice is read once
    twice = [tmp_path / "s/00009.tar", tmp_path / "s", tmp_path / "s/../s/00009.tar"]
    assert [s.name for s in read_source(twice)] == [*names[2:4], *names[:2], *names[4:], "loose.mp4"]


def test_one_file_from_several_sources_is_one_sample(tmp_path, monkeypatch):
    fill(tmp_path, {"c/a.mp4": "v", "c/a.txt": "beside", "c/b.mp4": "v", "c/b.txt": "b"})
    fill(
        tmp_path,
        {"m.csv": "video,caption\nc/a.mp4,listed\n,nothing\n", "n.jsonl": '{"video": "c/a.mp4", "caption": "n"}'},
    )
    monkeypatch.chdir(tmp_path)
    skipped = []
    samples = read_source([tmp_path / "m.csv", Path("c"), Path("n.jsonl")], skipped=skipped)
    assert [(s.name, s.captions) for s in samples] == [("c/a.mp4", ("listed", "beside", "n")), ("b.mp4", ("b",))]
    assert skipped == [Skip("m.csv:3", "no file name")]


def test_patterns():
    def names(pattern):
        return [str(path) for path in expand(Path(pattern))]

    assert names("s/{00098..00101}.tar") == [f"s/{n:05d}.tar" for n in range(98, 102)]
    assert names("{9..11}.tar") == ["9.tar", "10.tar", "11.tar"] and names("{0..2}") == ["0", "1", "2"]
    assert names("{train,val}/{0..1}.tar") == ["train/0.tar", "train/1.tar", "val/0.tar", "val/1.tar"]
    assert names("a{b.tar") == ["a{b.tar"] and names("a{b}.tar") == ["a{b}.tar"]
    for pattern, message in (("{9..1}.tar", "counts down"), ("{0..99999999999}.tar", "more than 1000000 paths")):
        with pytest.raises(ManifestError, match=message):
            expand(Path(pattern))


def test_a_name_for_a_person(tmp_path):
    assert source_name([Path("a/m.csv"), Path("n.csv")]) == "m.csv + n.csv"
    assert source_name([Path("laion/{00000..00040}.tar")]) == "41 shards of laion"
    assert source_name([Path(f"laion/{n}.tar") for n in range(41)]) == "41 shards of laion"
    assert source_name([Path(f"{n}/m.csv") for n in range(9)]) == "9 sources of 0 + 1 + 2 ..."
    assert source_name([Path(".")]) == Path.cwd().name


def test_what_cannot_be_a_source_is_said_in_one_sentence(tmp_path):
    fill(tmp_path, {"clips/a.mp4": "v", "table/a.mp4": "v", "table/m.csv": "video,caption\na.mp4,x\n", "a.mp4": "v"})
    fill(tmp_path, {"t.tar.gz": b"\x1f\x8b" + bytes(600), "m.json": "{}"})
    shard(tmp_path / "s/00000.tar", "a")
    wrong = {
        "clip": r"clip does not exist; check --data.manifest; did you mean clips\.",
        "s/00001.tar": r"00001.tar does not exist; .* mean 00000.tar\.",
        "s/{00000..00001}.tar": r"00001.tar does not exist",
        "clips": r"no video or image with a caption in .*clips; of 1 that were skipped .* a.mp4: .* beside it\.$",
        "table": r"Perhaps .*m\.csv is meant\.",
        "a.mp4": r"a.mp4 is no manifest \(.csv, .* no .tar and no folder",
        "t.tar.gz": r"t.tar.gz: compressed, .*: gzip -d\.",
        "m.json": "no manifest",
        "\0": "does not exist",
    }
    for name, message in wrong.items():
        with pytest.raises(ManifestError, match=message) as error:
            read_source([tmp_path / name])
        assert "\n" not in str(error.value)


def test_every_json_is_tolerated(tmp_path):
    for number, value in enumerate(
        [None, 1, "x", [], {}, {"caption": None}, {"caption": {"a": 1}}, {"caption": [1, ""]}]
    ):
        fill(tmp_path, {f"{number}.mp4": "v", f"{number}.json": json.dumps(value)})
    fill(tmp_path, {"good.mp4": "v", "good.txt": "said", "deep.mp4": "v", "deep.json": "[" * 10**5})
    skipped = []
    assert len(read_source([tmp_path], skipped=skipped)) == 1 and len(skipped) == 9
