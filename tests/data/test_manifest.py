"""Every way a table of captions can be written, and every way it can be wrong."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smaug.data.manifest import ManifestError, Sample, Skip, check_files, read_manifest

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
TEXTS = ['A dog, "Rex",\nruns.', "Ein Hund läuft.", "一只狗"]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_with_mark_quotes_newlines_and_crlf(tmp_path):
    text = '\ufeffvideo,caption\r\n a.mp4 ,"A dog, ""Rex"",\nruns."\r\n\r\n'
    text += "sub/b.mp4,Ein Hund läuft.\r\na.mp4,一只狗\r\n"
    assert read_manifest([write(tmp_path / "m.csv", text)], None) == [
        Sample(tmp_path / "a.mp4", "video", (TEXTS[0], TEXTS[2]), "a.mp4"),
        Sample(tmp_path / "sub/b.mp4", "video", (TEXTS[1],), "sub/b.mp4"),
    ]


def test_tsv_quoted_as_pandas_writes_it_and_plain_as_the_web_does(tmp_path):
    quoted = write(tmp_path / "q.tsv", 'caption\tvideo\n"A dog, ""Rex"",\nruns."\ta.mp4\n')
    plain = write(tmp_path / "p.tsv", 'caption\tvideo\n"Rex" is a dog\ta.mp4\n"unclosed\tb.mp4\n')
    assert [s.captions for s in read_manifest([quoted], None)] == [(TEXTS[0],)]
    assert [s.captions for s in read_manifest([plain], None)] == [('"Rex" is a dog',), ('"unclosed',)]


def test_jsonl_takes_a_string_or_a_list(tmp_path):
    rows = [{"video": "a.mp4", "caption": TEXTS}, {"image": "b.png", "caption": "A cat.", "id": 3}]
    manifest = write(tmp_path / "m.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    a, b = read_manifest([manifest], None)
    assert a == Sample(tmp_path / "a.mp4", "video", tuple(TEXTS), "a.mp4")
    assert b == Sample(tmp_path / "b.png", "image", ("A cat.",), "b.png")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"video": ["a.mp4", "b.mp4", "a.mp4", None], "caption": [*TEXTS, "no file"], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "m.parquet")
    skipped: list[Skip] = []
    a, b = read_manifest([tmp_path / "m.parquet"], None, skipped=skipped)
    assert a.captions == (TEXTS[0], TEXTS[2]) and b.captions == (TEXTS[1],)
    assert skipped == [Skip("m.parquet, row 4", "no file name")]
    lists = pa.table({"video": ["a.mp4"], "caption": [TEXTS]})
    pq.write_table(lists, tmp_path / "lists.parquet")
    assert read_manifest([tmp_path / "lists.parquet"], None)[0].captions == tuple(TEXTS)
    whole = (tmp_path / "m.parquet").read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "text": b"video,caption\n", "empty": b""}.items():
        with pytest.raises(ManifestError, match="write or copy it again"):
            read_manifest([write(tmp_path / f"{name}.parquet", data)], None)


def test_parquet_without_pyarrow_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ManifestError, match=r"pip install pyarrow$"):
        read_manifest([write(tmp_path / "m.parquet", b"")], None)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=1, max_size=4))
def test_any_caption_survives_csv(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "m.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [(f"{i}.mp4", text) for i, text in enumerate(texts)]
        csv.writer(file).writerows([("video", "caption"), *rows, ("x", "y")])
    assert [s.captions[0] for s in read_manifest([path], None)][:-1] == [t.strip() for t in texts if t.strip()]


def test_several_manifests_root_columns_and_absolute_names(tmp_path):
    (tmp_path / "one").mkdir()
    one = write(tmp_path / "one/m.csv", f"clip,text\na.mp4,x\n{tmp_path}/b.mp4,y\n./a.mp4,z\n")
    two = write(tmp_path / "n.csv", "picture,text\na.mp4,w\n")
    own = read_manifest([one, two], None, "clip", "picture", "text")
    assert [(s.path, s.kind, s.captions) for s in own] == [
        (tmp_path / "one/a.mp4", "video", ("x", "z")),
        (tmp_path / "b.mp4", "video", ("y",)),
        (tmp_path / "a.mp4", "image", ("w",)),
    ]
    rooted = read_manifest([one, two], tmp_path, "clip", "picture", "text")
    assert [s.path for s in rooted] == [tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "a.mp4"]
    assert [s.kind for s in rooted] == ["video", "video", "image"]


def test_rows_that_cannot_be_used_are_told(tmp_path):
    text = "video,image,caption\na.mp4,,good\n,,lost\nb.mp4,, \nc.mp4\nd.mp4,d.png,both\n"
    text += "e.mp4,,A dog, a cat\n,f.png,good\n"
    skipped: list[Skip] = []
    samples = read_manifest([write(tmp_path / "m.csv", text)], None, skipped=skipped)
    assert [(s.name, s.kind) for s in samples] == [("a.mp4", "video"), ("f.png", "image")]
    assert skipped == [
        Skip("m.csv:3", "no file name"),
        Skip("b.mp4", "m.csv:4: empty caption"),
        Skip("c.mp4", "m.csv:5: empty caption"),
        Skip("m.csv:6", "names a file under 'video' and under 'image'; use two rows"),
        Skip("m.csv:7", "4 fields in 3 columns; quote a caption with commas"),
    ]
    rows = [
        {"video": "a.mp4", "caption": 3},
        {"video": 4, "caption": "x"},
        {"caption": "x"},
        {"video": "b.mp4", "caption": []},
        {"video": "c.mp4", "caption": ["", None, "good", "half \ud83d of a pair"]},
    ]
    skipped.clear()
    samples = read_manifest([write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))], None, skipped=skipped)
    assert [s.captions for s in samples] == [("good", "half \ufffd of a pair")]
    assert [s.reason for s in skipped] == [
        "m.jsonl:1: a caption must be text, not 3",
        "a file name must be text, not 4",
        "no file name",
        "m.jsonl:4: empty caption",
    ]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("m.csv", "", "m.csv has no rows: give"),
        ("m.csv", "video,caption\n\n", "m.csv has no rows: give"),
        ("m.jsonl", "\n", "m.jsonl has no rows: give"),
        ("m.csv", "video,caption\n,x\n", "no usable row among 1; the first, m.csv:2: no file name"),
        ("m.txt", "video,caption\n", "ends in .csv, .tsv, .jsonl or .parquet, not '.txt'; convert"),
        ("m.json", "[]", "one object a line"),
        (
            "m.csv",
            "Video,caption\na,b\n",
            "'image'; its .* 'Video', 'caption'; perhaps --data.video-column Video",
        ),
        ("m.csv", "images,caption\na,b\n", "perhaps --data.image-column images"),
        (
            "m.csv",
            "video,Captions\na,b\n",
            "its .* 'video', 'Captions'; perhaps --data.caption-column Captions",
        ),
        ("m.csv", "video,name\na,b\n", "perhaps --data.caption-column name"),
        ("m.csv", "video,x1\na,b\n", "say which one it is with --data.caption-column"),
        (
            "m.jsonl",
            '{"clip": "a", "caption": "b"}\n',
            "have 'clip', 'caption'; perhaps --data.video-column clip",
        ),
        ("m.jsonl", '{"video": "a", "caption": "b"}\n{"video": "a",\n', r"m.jsonl:2: not JSON \(.* at column"),
        ("m.jsonl", '{"video": "a", "n": 1' + 5000 * "0" + "}\n", r"m.jsonl:1: not JSON \(Exceeds"),
        ("m.jsonl", '[{"video": "a", "caption": "b"}]\n', "m.jsonl:1: a list where an object is needed"),
        ("m.jsonl", "[" * 100_000, "m.jsonl:1: nested too deeply"),
        ("m.csv", b"video,caption\na.mp4,x\nb.mp4,\xe9t\xe9\n", "line 3, is not UTF-8; .* iconv"),
        ("m.jsonl", b'{"video": "a", "caption": "\xe9"}\n', "line 1, is not UTF-8"),
        ("m.csv", 'video,caption\na.mp4,"never closed\nb.mp4,x\n', "m.csv:3: .*close every quote"),
        ("m.csv", "video,caption\na.mp4," + "x" * 200_000, "m.csv:2: field larger than"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, name, content, complaint):
    with pytest.raises(ManifestError, match=complaint) as error:
        read_manifest([write(tmp_path / name, content)], None)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__ == (error.value.__context__ is not None)


def test_missing_files_and_folders(tmp_path):
    write(tmp_path / "clips.csv", "video,caption\na,b\n")
    with pytest.raises(ManifestError, match=r"clip\.csv does not exist.*did you mean clips\.csv"):
        read_manifest([tmp_path / "clip.csv"], None)
    with pytest.raises(ManifestError, match="no folder"):
        read_manifest([tmp_path / "nowhere/clip.csv"], None)
    with pytest.raises(ManifestError, match=r"is not a folder; --data\.root"):
        read_manifest([tmp_path / "clips.csv"], tmp_path / "nowhere")
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(ManifestError, match="is a folder"):
        read_manifest([tmp_path / "dir.csv"], None)


def test_check_files(tmp_path):
    write(tmp_path / "good.mp4", b"x")
    write(tmp_path / "empty.mp4", b"")
    write(tmp_path / "locked.mp4", b"x").chmod(0)
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ["good.mp4", "gone.mp4", "empty.mp4", "folder.mp4", "pipe.mp4", "nul\0.mp4", "x" * 300, "good.mp4/x"]
    present, skipped = check_files([Sample(tmp_path / name, "video", ("x",), name) for name in names])
    assert [s.name for s in present] == ["good.mp4"]
    reasons = {skip.name: skip.reason for skip in skipped}
    assert list(reasons) == names[1:]
    assert list(reasons.values())[:4] == ["file not found", "0 bytes", "is a directory", "not a regular file"]
    assert all(reason.startswith("cannot be read: ") for reason in list(reasons.values())[4:])
    if os.geteuid() == 0:
        return  # the superuser may read everything
    locked = Sample(tmp_path / "locked.mp4", "video", ("x",), "l")
    assert check_files([locked]) == ([], [Skip("l", "no permission to read")])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared real clips are not at {SHARED}")
def test_the_real_manifests():
    samples = read_manifest([SHARED / "clips.csv", SHARED / "images.csv"], SHARED)
    assert [s.kind for s in samples] == ["video"] * 28 + ["image"] * 15
    assert check_files(samples) == (samples, [])
    assert samples == read_manifest([SHARED / "clips.csv", SHARED / "images.csv"], None)
    assert all(len(s.captions) == 1 for s in samples) and '"again"' in samples[0].captions[0]
