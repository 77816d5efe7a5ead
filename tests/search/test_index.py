"""What is in an index is what the model says of each window; nothing is embedded twice, and nothing is lost."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from smaug.data.decode import read_frames
from smaug.embed import embed_videos
from smaug.run import load_run
from smaug.search import __main__ as search_main
from smaug.search import index as index_file
from smaug.search import store
from smaug.search.index import IndexOptions, cut, index

RATE = 4  # frames a second of what `write_video` writes
BAD = "broken.mp4: not a media file"


@pytest.mark.parametrize(
    ("seconds", "windows"),
    [
        (0.25, [(0, 0.25)]),
        (8, [(0, 8)]),
        (11.75, [(0, 11.75)]),  # a rest of less than half a window belongs to the last
        (12, [(0, 8), (8, 12)]),
        (44, [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 44)]),
    ],
)
def test_cut(seconds, windows):
    n = round(seconds * RATE)
    found = cut(np.arange(n) / RATE, 8.0)
    length = seconds if n > 1 else 0  # one frame tells no length
    assert [(a, b) for a, b, _, _ in found] == [(a, min(b, length)) for a, b in windows]
    assert [low for _, _, low, _ in found] == [a * RATE for a, _ in windows]
    assert [high for _, _, _, high in found] == [*(low for _, _, low, _ in found[1:]), n]


@given(st.lists(st.floats(0.001, 30), min_size=0, max_size=40), st.floats(0.5, 20))
def test_every_window_has_frames_and_every_frame_a_window(gaps, seconds):
    times = np.cumsum([0.0, *gaps])
    found = cut(times, seconds)
    shown = {i for _, _, low, high in found for i in range(low, high)}
    assert shown == set(range(len(times)))
    assert all(0 <= low < high <= len(times) for _, _, low, high in found)
    assert [a for a, *_ in found][1:] == [b for _, b, *_ in found][:-1]


def run_index(media, models, tmp_path, model="a", out="index", **options):
    """-> exit code, what it printed, entries by name, vectors."""
    with (tmp_path / "said.txt").open("w") as file:
        console = Console(file=file, markup=False, width=200)
        code = index(
            IndexOptions(
                media, models / model, tmp_path / out, **{"batch": 3, "workers": 2, "device": "cpu", **options}
            ),
            console,
        )
    folder = tmp_path / out
    entries, vectors = store.read_entries(folder, store.read_made(folder))
    return code, (tmp_path / "said.txt").read_text(), entries, vectors


def embedded(said):
    """How many clips a run of `index` embedded."""
    lines = [line.split() for line in said.splitlines() if line.startswith("embedded")]
    return int(lines[0][1]) if lines else 0


def test_vectors_are_those_of_each_window(media, models, tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "PART", 4)  # the long film comes in two parts
    code, said, entries, vectors = run_index(media, models, tmp_path)
    assert code == 0 and embedded(said) == 8
    assert f"bad        {BAD}" in said and (tmp_path / "index/bad.txt").read_text() == BAD + "\n"
    assert {name: len(entry.windows) for name, entry in entries.items()} == {
        "short.mp4": 1, "films/long.mp4": 6, "picture.png": 1, "broken.mp4": 0,
    }  # fmt: skip
    run = load_run(models / "a", "cpu")
    film = entries["films/long.mp4"]
    for (start, end), row in zip(film.windows, film.rows, strict=True):
        first, n = int(start * RATE), int((end - start) * RATE)
        wanted = [first + (n * i // 4 + n * (i + 1) // 4 - 1) // 2 for i in range(4)]
        frames = read_frames(media / "films/long.mp4", lambda times, wanted=wanted: wanted, 32)
        (expected,) = embed_videos(run, torch.from_numpy(frames)[None])
        np.testing.assert_allclose(vectors[row], expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)


def test_only_what_changed_is_embedded(media, models, tmp_path, monkeypatch, write_video):
    run_index(media, models, tmp_path)
    opened = []
    read_parts = index_file.read_parts
    monkeypatch.setattr(index_file, "read_parts", lambda d, f, *a: opened.append(f.entry.name) or read_parts(d, f, *a))
    code, said, before, vectors = run_index(media, models, tmp_path)
    assert (code, opened) == (0, []) and "0 new files, 0 changed, 3 known, 0 gone, 1 bad" in said and BAD in said

    run_index(media, models, tmp_path, retry_bad=True)
    assert opened == ["broken.mp4"]
    write_video(media / "short.mp4", 2, seed=15)
    write_video(media / "new.mp4", 2)
    (media / "picture.png").unlink()
    code, said, after, changed = run_index(media, models, tmp_path)
    assert sorted(opened[1:]) == ["new.mp4", "short.mp4"]
    assert "1 new files, 1 changed, 1 known, 1 gone, 1 bad" in said
    assert after.keys() == before.keys() - {"picture.png"} | {"new.mp4"}
    film = "films/long.mp4"
    assert (changed[after[film].rows] == vectors[before[film].rows]).all()
    assert (changed[after["short.mp4"].rows] != vectors[before["short.mp4"].rows]).any()

    (media / film).unlink()  # most of the rows are of no file now, so all is written anew
    *_, entries, vectors = run_index(media, models, tmp_path)
    assert len(vectors) == 2 and store.read_made(tmp_path / "index").generation == 1
    assert (vectors[entries["new.mp4"].rows] == changed[after["new.mp4"].rows]).all()
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        ".lock", "bad.txt", "files-1.jsonl", "index.json", "vectors-1.f32",
    ]  # fmt: skip


def test_a_stopped_run_goes_on(media, models, tmp_path, monkeypatch):
    *_, entries, vectors = run_index(media, models, tmp_path, out="undisturbed")
    monkeypatch.setattr(index_file, "PART", 2)
    calls = []

    def stops(*given):
        calls.append(given)
        if len(calls) == 4:  # a call for the picture, one for the short clip, one for a part of the film
            raise KeyboardInterrupt
        return embed_videos(*given)

    monkeypatch.setattr(index_file, "embed_videos", stops)
    code, said, begun, _ = run_index(media, models, tmp_path, batch=2, workers=1)
    assert code == 130 and "the same command goes on" in said
    done = sum(len(entry.windows) for entry in begun.values())
    assert 0 < done < 8 and not begun["films/long.mp4"].whole
    code, said, ended, again = run_index(media, models, tmp_path, batch=2, workers=1)
    assert code == 0 and embedded(said) == 8 - done and "1 to go on with" in said
    for name, entry in entries.items():
        assert ended[name].windows == entry.windows
        np.testing.assert_allclose(again[ended[name].rows], vectors[entry.rows], atol=1e-4)


def test_what_a_crash_cut_is_embedded_again(media, models, tmp_path):
    *_, entries, vectors = run_index(media, models, tmp_path)
    lines, data = tmp_path / "index/files-0.jsonl", tmp_path / "index/vectors-0.f32"
    whole = lines.read_bytes(), data.read_bytes()
    row = entries["short.mp4"].rows[0]
    for damage in ("line", "end of the vectors", "a bit"):
        lines.write_bytes(whole[0][:-20] if damage == "line" else whole[0])
        broken = bytearray(whole[1])
        if damage == "end of the vectors":
            del broken[-10:]
        elif damage == "a bit":
            broken[row * 64 + 5] ^= 1
        data.write_bytes(broken)
        code, said, again, found = run_index(media, models, tmp_path)
        assert code == 0 and embedded(said) > 0, damage
        for name, entry in entries.items():
            assert again[name].windows == entry.windows, damage
            np.testing.assert_allclose(found[again[name].rows], vectors[entry.rows], atol=1e-4)


def test_a_disk_that_fills_up(media, models, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        run_index(media, models, tmp_path)
    (tmp_path / "media/short.mp4").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"index cannot be written: No space left on device; when that is mended"):
            run_index(media, models, tmp_path)
    code, said, *_ = run_index(media, models, tmp_path)
    assert code == 0 and "bad        broken" in said


def test_refusals(media, models, tmp_path):
    run_index(media, models, tmp_path)
    other = r"index was made with .*/a at step 0, and vectors of two models .* choose another --out, or --fresh"
    with pytest.raises(ValueError, match=other):
        run_index(media, models, tmp_path, model="b")
    with pytest.raises(ValueError, match=r"has --window 8.0, not 4.0; choose another --out, or --fresh"):
        run_index(media, models, tmp_path, window=4.0)
    with pytest.raises(ValueError, match=r"has folder .*media, not .*films"):
        run_index(media / "films", models, tmp_path)
    code, _, entries, _ = run_index(media, models, tmp_path, model="b", window=4.0, fresh=True)
    assert code == 0 and len(entries["films/long.mp4"].windows) == 11
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        run_index(media / "nowhere", models, tmp_path)
    with pytest.raises(ValueError, match=r"media is not empty, and holds no index"):
        run_index(media, models, tmp_path, out="media")
    for name in ("index.json", "files-2024.jsonl", "files-mine.jsonl"):  # names like ours, and something else beside
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / name).write_text("{}")
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"own was written by another|own is not empty"):
            run_index(media, models, tmp_path, out="own", fresh=fresh)
    assert len(list((tmp_path / "own").glob("*.json*"))) == 3 and (tmp_path / "own/index.json").read_text() == "{}"
    (media / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no video or picture"):
        run_index(media / "empty", models, tmp_path, out="third")
    with pytest.raises(ValueError, match=r"picture.png cannot be written: File exists; choose another --out"):
        run_index(media, models, tmp_path, out="media/picture.png")
    with store.claimed(tmp_path / "index"), pytest.raises(ValueError, match=r"another process writes"):
        run_index(media, models, tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smaug-read")]


@pytest.mark.parametrize("damage", ["index.json is gone", "index.json is damaged", "a crash while it was compacted"])
def test_nothing_of_another_model_is_left(media, models, tmp_path, damage):
    *_, vectors = run_index(media, models, tmp_path, model="b", out="right")
    run_index(media, models, tmp_path)
    folder, fresh = tmp_path / "index", True
    if damage == "index.json is gone":
        (folder / "index.json").unlink()
        fresh = False
    elif damage == "index.json is damaged":
        (folder / "index.json").write_text("{")
    else:
        for name in ("files-0.jsonl", "vectors-0.f32"):
            shutil.copy(folder / name, folder / name.replace("0", "1", 1))
    code, said, entries, found = run_index(media, models, tmp_path, model="b", fresh=fresh)
    assert code == 0 and embedded(said) == 8 and found.shape == vectors.shape
    assert sum(len(entry.windows) for entry in entries.values()) == 8


def test_links(media, models, tmp_path, write_video):
    write_video(tmp_path / "outside.mp4", 2)
    (media / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (media / "inside.mp4").symlink_to("short.mp4")
    _, said, entries, _ = run_index(media, models, tmp_path)
    assert "link.mp4: a link that leads out of the folder; take it with --follow-links" in said
    assert "link.mp4" not in entries and entries["inside.mp4"].real == str(media / "short.mp4")
    *_, entries, _ = run_index(media, models, tmp_path, follow_links=True)
    assert entries["link.mp4"].real == str(tmp_path / "outside.mp4")
    # the same file, but now behind a link: the page would refuse the old entry
    (media / "short.mp4").rename(media / "there.mp4")
    (media / "short.mp4").symlink_to("there.mp4")
    _, said, entries, _ = run_index(media, models, tmp_path, follow_links=True)
    assert "1 new files, 2 changed" in said and entries["short.mp4"].real == str(media / "there.mp4")


def test_a_folder_that_was_moved(media, models, tmp_path):
    *_, before = run_index(media, models, tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(media / "picture.png", tmp_path / "other")
    media.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"has folder .*media, not .*other"):  # of which it knows nothing
        run_index(tmp_path / "other", models, tmp_path)
    for folder in ("moved", "again"):
        code, said, _, vectors = run_index(tmp_path / folder, models, tmp_path)
        assert code == 0 and embedded(said) == 0 and np.array_equal(vectors, before)
        assert store.read_made(tmp_path / "index").folder == str(tmp_path / folder)
        if folder == "moved":
            (tmp_path / "moved").rename(tmp_path / "again")
            (tmp_path / "moved").symlink_to("again")


def test_a_file_that_changes_while_it_is_read_is_left_to_the_next_run(media, models, tmp_path, monkeypatch):
    read_parts = index_file.read_parts

    def changing(decoder, file, *more):
        for part in read_parts(decoder, file, *more):
            if file.entry.name == "short.mp4":
                os.utime(file.path, ns=(1, 1))
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(index_file, "read_parts", changing)
        code, said, entries, _ = run_index(media, models, tmp_path)
    assert code == 0 and "short.mp4: changed while it was read" in said and "short.mp4" not in entries
    _, said, entries, _ = run_index(media, models, tmp_path)
    assert embedded(said) == 1 and "short.mp4" in entries


@pytest.mark.parametrize("batch", [1, 64])  # what came before the damage is embedded by then, or waits for more
def test_half_a_film_is_not_in_the_index(media, models, tmp_path, monkeypatch, batch):
    read_parts = index_file.read_parts

    def fails(decoder, file, *more):
        for part in read_parts(decoder, file, *more):
            damaged = part.at and file.entry.name == "films/long.mp4"
            yield replace(part, clips=None, times=[], reason="damaged") if damaged else part
            if damaged:
                return

    monkeypatch.setattr(index_file, "PART", 2)
    monkeypatch.setattr(index_file, "FIRST", batch)
    monkeypatch.setattr(index_file, "read_parts", fails)
    _, said, entries, _ = run_index(media, models, tmp_path, batch=batch, workers=1)
    film = entries["films/long.mp4"]
    assert "bad        films/long.mp4: damaged" in said and film.reason == "damaged" and not film.windows
    assert {name for name, entry in entries.items() if entry.windows} == {"short.mp4", "picture.png"}


def test_an_error_in_a_thread_is_not_lost(media, models, tmp_path, monkeypatch):
    def fails(*given):
        raise RuntimeError("out of luck")
        yield

    monkeypatch.setattr(index_file, "read_parts", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        run_index(media, models, tmp_path)


def test_the_command(call, media, models, tmp_path):
    code, out, err = call(search_main.main, "index", media, "--model", models / "a", "--device", "cpu")
    assert code == 0 and not err
    assert out.splitlines()[-2:] == [
        "done       media.search: 3 files, 8 clips; search with",
        '  python -m smaug.search query media.search "a dog jumps"',
    ]
    code, out, err = call(search_main.main, "index", media, "--model", models)
    assert code == 1 and err.startswith("smaug: ") and "holds no run" in err and err.count("\n") == 1


def test_readers_keep_no_more_ahead_than_they_may():
    entry = store.Entry("a", 0, 0, "video")
    made = []

    def read(file):
        for at in range(20):
            made.append(at)
            yield index_file.Part(file, at, 20, [(0.0, 1.0)], None)

    readers = index_file.Readers([index_file.File(replace(entry), None, 0)] * 3, read, 2, 4)
    first = next(iter(readers))
    deadline = threading.Event()
    deadline.wait(0.2)
    assert first.at == 0 and len(made) <= 1 + 4 + 2  # taken, ahead, and one in the hands of each thread
    readers.stop()
