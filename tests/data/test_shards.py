"""Tar shards read in place: what webdataset wrote, what a person packed, and what is damaged or hostile."""

import io
import json
import os
import random
import stat
import tarfile
import time
from dataclasses import replace

import pytest
import torch
import webdataset

from smaug.data import shapes, shards, text
from smaug.data.clips import DataConfig, open_manifest
from smaug.data.loader import Loader
from smaug.data.manifest import Skip
from smaug.data.media import Member, read_bytes
from smaug.data.shards import index_shard, read_shard
from smaug.masks import TextMask


@pytest.fixture(scope="module")
def encoded(shapes_cache):
    """Eight clips and what is said of them."""
    folder = shapes.build((64, 16, 16))
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()][:8]
    return [((folder / row["video"]).read_bytes(), row["caption"]) for row in rows]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def entry(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def pack(path, *entries, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return path


def said(samples):
    return {sample.name.partition(":")[2]: list(sample.captions) for sample in samples}


def test_what_video2dataset_writes(tmp_path, encoded):
    """Its layout by webdataset's own writer: metadata beside each clip, sound and a failed download among them."""
    path = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for number, (data, caption) in enumerate(encoded):
            record = {"caption": caption, "status": "success", "error_message": None, "whisper": {"segments": []}}
            sample = {"__key__": f"{number:09d}", "mp4": data, "txt": caption, "json": record, "m4a": b"sound"}
            tar.write(sample if number != 3 else {k: v for k, v in sample.items() if k != "mp4"})
    samples, skipped = index_shard(path)
    assert skipped == [Skip("00000.tar:000000003", "no video or image (has .json, .m4a, .txt)")]
    assert [s.name for s in samples] == [f"00000.tar:{n:09d}" for n in range(8) if n != 3]
    assert [(read_bytes(s.path), *s.captions) for s in samples] == [e for n, e in enumerate(encoded) if n != 3]
    assert {s.kind for s in samples} == {"video"} and all(isinstance(s.path, Member) for s in samples)


def test_grouping_is_that_of_webdataset(tmp_path):
    names = "a/b.c.mp4 a/b.txt a/b.mp4 ./d.mp4 ./d.txt e/d.jpg e/d.txt .h.mp4 no k.MP4 k.TXT f/ x.y/z.png x.y/z.txt"
    files = [entry(name, b"", type=b"5") if name[-1] == "/" else entry(name, name.encode()) for name in names.split()]
    samples, skipped = index_shard(pack(tmp_path / "s.tar", *files))
    captions = {"a/b": "a/b.txt", "d": "./d.txt", "e/d": "e/d.txt", "k": "k.TXT", "x.y/z": "x.y/z.txt"}
    assert said(samples) == {key: [caption] for key, caption in captions.items()}
    assert [s.kind for s in samples] == ["video", "video", "image", "video", "image"] and not skipped
    assert read_bytes(samples[0].path) == b"a/b.mp4"
    theirs = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    assert [s["__key__"].removeprefix("./") for s in theirs] == list(said(samples))


def test_captions(tmp_path):
    deep = b"[" * 100_000
    cases = {
        "both": ({"txt": b"\xef\xbb\xbf of the text \n", "json": b'{"caption": "of json"}'}, ["of the text"]),
        "only-json": ({"json": b'{"caption": "of json"}'}, ["of json"]),
        "several": ({"txt": b"one", "json": b'{"captions": ["one", "two", 3, " "]}'}, ["one", "two"]),
        "latin": ({"txt": "caf\xe9 \u2013".encode("cp1252")}, ["caf\ufffd \ufffd"]),
        "half": ({"json": b'{"caption": "a \\ud83d b"}'}, ["a \ufffd b"]),
        "bad-json": ({"txt": b"text", "json": b"{"}, ["text"]),
        "deep": ({"txt": b"text", "json": deep}, ["text"]),
        "digits": ({"txt": b"text", "json": b"9" * 10_000}, ["text"]),
        "large": ({"txt": b"text", "json": b'{"captions": ["x"], "y": "%s"}' % (b"y" * 2**20)}, ["text"]),
        "junk": ({"json": b"[1]"}, "no caption in a .txt or .json"),
        "empty": ({"txt": b" \n"}, "no caption in a .txt or .json"),
        "too-large": ({"txt": b"x" * (2**20 + 1)}, "its .txt has more than 1 MiB"),
    }
    files = [entry(f"{key}.{s}", d) for key, (parts, _) in cases.items() for s, d in {"mp4": b"m", **parts}.items()]
    samples, skipped = index_shard(pack(tmp_path / "s.tar", *files))
    found = said(samples) | {skip.name.partition(":")[2]: skip.reason for skip in skipped}
    assert found == {key: wanted for key, (_, wanted) in cases.items()}


def test_what_leads_out_of_a_shard_is_refused(tmp_path):
    outside = "its name leads out of the shard"
    wanted = {
        "../a.mp4": outside, "/etc/a.mp4": outside, "b/../../a.mp4": outside, "..\\a.mp4": outside,
        "C:\\a.mp4": outside,
        "l.mp4": "a symbolic link", "h.mp4": "a hard link", "p.mp4": "a pipe", "c.mp4": "a device",
        "e\x1b[2J.mp4": "its name has control characters", "odd.mp4": "not a plain file; pack it anew without --sparse",
    }  # fmt: skip
    kinds = {"l.mp4": b"2", "h.mp4": b"1", "p.mp4": b"6", "c.mp4": b"3", "odd.mp4": b"Z"}
    files = [entry(name, b"" if name in kinds else b"x", type=kinds.get(name, b"0")) for name in wanted]
    for info, _ in files:
        info.linkname = "/etc/passwd"
    good = [entry("good.mp4", b"x"), entry("good.txt", b"said")]
    samples, skipped = index_shard(pack(tmp_path / "s.tar", *files, *good))
    assert said(samples) == {"good": ["said"]}
    found = {skip.name.removeprefix("s.tar:"): skip.reason for skip in skipped}
    assert found == {name: f"refused: {reason}" for name, reason in wanted.items()}
    sparse = entry("s.mp4", b"x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "s.mp4"})
    assert "sparse" in index_shard(pack(tmp_path / "t.tar", sparse, *good))[1][0].reason


def test_the_first_of_a_key_is_used(tmp_path):
    names = ["a.mp4", "a.txt", "b.mp4", "b.mp4", "b.txt", "a.mp4", "a.txt", "c.mp4", "c.jpg", "c.txt", "d.mp4", "d.txt"]
    files = [entry(name, b"" if name == "d.mp4" else f"{n} {name}".encode()) for n, name in enumerate(names)]
    samples, skipped = index_shard(pack(tmp_path / "s.tar", *files))
    assert said(samples) == {"a": ["1 a.txt"], "b": ["4 b.txt"], "c": ["9 c.txt"]}
    assert [read_bytes(s.path) for s in samples] == [b"0 a.mp4", b"2 b.mp4", b"7 c.mp4"]
    assert [s.name for s in skipped] == ["s.tar:b.mp4", "s.tar:a", "s.tar:d"]
    assert "--sort=name" in skipped[1].reason and skipped[2].reason == "0 bytes"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    """A prefix, GNU's long name and an extended header; and bytes that are no UTF-8, which stay apart and printable."""
    keys = ["p" * 90 + "/" + "n" * 90, "视频", "caf\udce9", "caf\udce8"]
    if form != tarfile.USTAR_FORMAT:
        keys.append("x" * 300)
    files = [entry(f"{key}.{suffix}", b"data") for key in keys for suffix in ("mp4", "txt")]
    with tarfile.open(tmp_path / "s.tar", "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in files:
            tar.addfile(info, io.BytesIO(data))
    samples, skipped = index_shard(tmp_path / "s.tar")
    assert list(said(samples)) == [*keys[:2], "caf\\xe9", "caf\\xe8", *keys[4:]] and not skipped
    assert {read_bytes(s.path) for s in samples} == {b"data"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"\x1f\x8b" + bytes(600), "compressed, so no clip can be read alone; unpack it: gzip -d"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed, so no clip can be read alone; unpack it: zstd -d"),
        (b"no tar at all " * 100, "damaged at byte 0: no header of a plain tar"),
        (b"short", "truncated: ends at byte 5 without the mark that ends a tar"),
    ],
)
def test_what_is_no_shard(tmp_path, data, reason):
    (tmp_path / "s.tar").write_bytes(data)
    assert index_shard(tmp_path / "s.tar") == ([], [Skip("s.tar", reason)])
    assert index_shard(tmp_path / "none.tar") == ([], [Skip("none.tar", "file not found")])


def header(size: bytes, kind=b"0", name=b"a.mp4"):
    block = bytearray(name.ljust(124, b"\0") + size.ljust(32, b"\0") + kind + bytes(512))[:512]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (header(b"77777777777"), "needs 8589937151 bytes, there are"),
        (header(b"-0000000001"), "damaged at byte 2048"),
        (header(b"\xff" * 12), "damaged at byte 2048"),  # -1 of base 256
        (header(b"\x80" + b"\xff" * 11), "needs "),  # 2**88 - 1
        (header(b"12", b"S"), "damaged at byte 2048"),
        (header(b"77777777", b"x") + bytes(2**24), "an extended header of 16777215 bytes"),
        (header(b"77777777", b"L") + bytes(2**24), "an extended header of 16777215 bytes"),
        (header(b"1000", b"x") + b"0 path=" + bytes(505), "without sense"),
        (header(b"1000", b"x") + b"-5 path=" + bytes(504), "without sense"),
        (header(b"1000", b"x") + b"99999999999 path=" + bytes(495), "without sense"),
        (header(b"14", b"x") + b"12 size=-99\n" + bytes(500) + header(b"1"), "damaged at byte 3072"),
        (header(b"22", b"x") + b"18 size=999999999\n" + bytes(494) + header(b"1"), "needs 1000003583 bytes"),
    ],
)  # fmt: skip
def test_sizes_that_lie(tmp_path, hostile, reason):
    """One good sample, then what a person would write to fill our memory or to make us read for ever."""
    good = [header(b"1"), b"x".ljust(512, b"\0"), header(b"4", name=b"a.txt"), b"said".ljust(512, b"\0")]
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join([*good, hostile, bytes(1024)]))
    samples, skipped = index_shard(path)
    assert said(samples) == {"a": ["said"]} and len(skipped) == 1 and reason in skipped[0].reason


def test_many_extended_records_take_linear_time(tmp_path):
    records = b"5 a=\n" * (2**20 // 5)
    path = tmp_path / "s.tar"
    path.write_bytes((header(b"%o" % len(records), b"x") + records.ljust(2**20, b"\0")) * 4 + bytes(1024))
    start = time.monotonic()
    index_shard(path)
    assert time.monotonic() - start < 5


def test_truncated_anywhere(tmp_path, encoded):
    path, whole = tmp_path / "s.tar", pack_encoded(tmp_path / "w.tar", encoded[:3])
    wanted, _ = index_shard(whole)
    data = whole.read_bytes()
    counts = []
    for end in range(0, len(data), 100):
        path.write_bytes(data[:end])
        samples, skipped = index_shard(path)
        assert [s.captions for s in samples] == [s.captions for s in wanted[: len(samples)]]
        assert all(s.path.offset + s.path.size <= end for s in samples)
        assert skipped or samples == [replace(s, path=replace(s.path, tar=path), name=f"s{s.name[1:]}") for s in wanted]
        counts.append(len(samples))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}


def test_flipped_bits_in_headers_never_raise(tmp_path, encoded):
    small = [(b"video", caption) for _, caption in encoded]
    data = pack_encoded(tmp_path / "w.tar", small).read_bytes()
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    rng = random.Random(0)
    path = tmp_path / "s.tar"
    for turn in range(400):
        bad = bytearray(data)
        at = rng.choice(heads)
        for _ in range(rng.choice([1, 1, 3])):
            bad[at + rng.randrange(512)] ^= 1 << rng.randrange(8)
        if turn % 2:  # and a checksum that is right, as of someone who means it
            bad[at + 148 : at + 156] = b" " * 8
            bad[at + 148 : at + 156] = b"%06o\0 " % sum(bad[at : at + 512])
        path.write_bytes(bad)
        samples, skipped = index_shard(path)
        assert all(len(read_bytes(s.path)) == s.path.size for s in samples)
        assert len(samples) >= 7 or skipped


def pack_encoded(path, encoded, start=0):
    """Samples as convert writes them."""
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number, (data, caption) in enumerate(encoded, start):
            tar.write({"__key__": f"{number:09d}", "webm": data, "txt": caption})
    return path


def test_the_index_is_kept(tmp_path, encoded, cache, monkeypatch):
    path = pack_encoded(tmp_path / "s.tar", encoded)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 30_000)
    first = read_shard(path)
    assert first == index_shard(path) and first[0] and first[1]
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_shard", None)
        assert read_shard(path) == first
        os.utime(path, (1, 1))
        with pytest.raises(TypeError):  # another time: it is read anew
            read_shard(path)
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    for damage in (b"", b"junk", kept.read_bytes()[:-9], kept.read_bytes()[:40] + b"\xff" + kept.read_bytes()[41:]):
        for file in cache.iterdir():
            file.write_bytes(damage)
        assert read_shard(path) == first
        assert read_shard(path) == first


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, encoded, monkeypatch):
    path = pack_encoded(tmp_path / "s.tar", encoded)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "file"))  # root may write anywhere, but not into a file
    assert len(read_shard(path)[0]) == 8
    monkeypatch.setenv("SMAUG_CACHE", "/dev/full")
    assert len(read_shard(path)[0]) == 8
    assert not stat.S_ISDIR((tmp_path / "file").stat().st_mode)


def loader(clips, **more):
    tokenizer = text.train_tokenizer([c for s in clips.samples for c in s.captions], 300)
    settings = {"frames": 2, "max_words": 16, "text_mask": TextMask(0.4), "seed": 3} | more
    return Loader(clips, tokenizer, DataConfig(batch=4), **settings)


def content(batch):
    """What each sample is, without the number and the name it has in its source."""
    videos = torch.cat([group.video for group in batch.groups])
    return [(video.numpy().tobytes(), int(key)) for video, key in zip(videos, batch.caption_keys, strict=True)]


def test_order_is_of_seed_epoch_and_step_alone(tmp_path, encoded, cache):
    """However the samples lie in shards, however many threads decode them and whatever was read before."""
    one = pack_encoded(tmp_path / "one.tar", encoded)
    (tmp_path / "five").mkdir()
    for number, (start, end) in enumerate([(0, 1), (1, 2), (2, 5), (5, 7), (7, 8)]):
        pack_encoded(tmp_path / f"five/{number:05d}.tar", encoded[start:end], start)
    steps = (0, 1, 2, 5)
    wanted = [content(loader(open_manifest([one], DataConfig(workers=1), 32)).batch(step)) for step in steps]
    assert len({clip for batch in wanted[:2] for clip in batch}) == 8  # the first epoch holds each once
    for source in (tmp_path / "five", tmp_path / "five/{00000..00004}.tar"):
        for workers in (1, 3):
            clips = open_manifest([source], DataConfig(workers=workers), 32)
            backwards = loader(clips)
            assert [content(backwards.batch(step)) for step in reversed(steps)] == wanted[::-1]
    assert clips.name == "5 shards of five"
    shares = [loader(clips, rank=rank, ranks=2).batch(5) for rank in (0, 1)]
    assert [one for share in shares for one in content(share)] == wanted[3]
