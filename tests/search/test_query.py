"""The nearest windows are found, whatever lies between them in the index; and what is said of a query."""

import json
import shutil
import sys

import numpy as np
import pytest
from rich.console import Console

from smaug.search import __main__ as search_main
from smaug.search import store
from smaug.search.index import IndexOptions, index
from smaug.search.query import clock, open_index, search
from smaug.search.store import Entry, Made

DIM = 16


def unit_vectors(count, seed):
    x = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def add(folder, films, made):
    """Writes files of planted vectors, a window of 8 s each."""
    writer = store.Writer(folder, made)
    for name, vectors in films.items():
        times = [(8.0 * i, 8.0 * i + 8) for i in range(len(vectors))]
        writer.add(Entry(name, 1, 1, "video", len(vectors)), 0, times, vectors)
    writer.save()
    return writer


@pytest.fixture
def planted(tmp_path):
    """An index of 60 files of one window, a film of 150 windows that are nearly alike, and one of three; by name."""
    made = Made("/films", "/run", 0, 0, 0, DIM, 8.0)
    films = {f"{number}.mp4": unit_vectors(1, number) for number in range(60)}
    films["alike.mp4"] = np.repeat(unit_vectors(1, 100), 150, 0) + np.linspace(0, 1e-3, 150, dtype=np.float32)[:, None]
    films["three.mp4"] = unit_vectors(3, 101)
    store.write_made(tmp_path, made)
    add(tmp_path, films, made).close()
    return tmp_path, films


def best(films, query, top, all_windows=False):
    """By a loop over everything."""
    scores = [(float(x @ query), name, 8.0 * i) for name, some in films.items() for i, x in enumerate(some)]
    seen, found = set(), []
    for score, name, start in sorted(scores, reverse=True):
        if all_windows or name not in seen:
            seen.add(name)
            found.append((name, start, pytest.approx(score, abs=1e-5)))
    return found[:top]


def shown(hits):
    return [(hit.file, hit.start, hit.score) for hit in hits]


@pytest.mark.parametrize("all_windows", [False, True])
@pytest.mark.parametrize("top", [1, 10, 500])
def test_the_nearest_are_found(planted, top, all_windows):
    folder, films = planted
    opened = open_index(folder)
    assert not opened.approximate
    for query in (films["alike.mp4"][0], unit_vectors(1, 999)[0]):
        assert shown(search(opened, query, top, all_windows)) == best(films, query, top, all_windows)


def test_cells_what_came_after_them_and_what_has_gone(planted):
    folder, films = planted
    made = store.read_made(folder)
    store.build_cells(folder, made)
    late = {"late.mp4": unit_vectors(5, 500)}
    writer = add(folder, late, made)
    writer.gone("7.mp4")
    writer.gone("late.mp4")
    writer.save()
    writer.close()
    again = {"late.mp4": late["late.mp4"][:2]}
    add(folder, again, made).close()
    opened = open_index(folder)
    assert opened.approximate
    opened.parts[0][0].nprobe = 10**6  # all cells: then nothing may differ
    films = {name: x for name, x in films.items() if name != "7.mp4"} | again
    for query in (films["alike.mp4"][0], late["late.mp4"][1], unit_vectors(1, 7)[0]):
        assert shown(search(opened, query, 20)) == best(films, query, 20)


def test_cells_are_made_above_a_number_of_windows(monkeypatch, models, media, tmp_path):
    monkeypatch.setattr(store, "APPROXIMATE", 5)
    out = tmp_path / "many"
    assert index(IndexOptions(media, models / "a", out, workers=1, device="cpu"), Console(quiet=True)) == 0
    opened = open_index(out)
    assert opened.approximate and opened.parts[0][0].ntotal == 8
    assert search(opened, np.array(store.read_entries(out, opened.made)[1][7]), 1)[0].score == pytest.approx(
        1, abs=1e-5
    )


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


@pytest.fixture
def indexed(call, media, models):
    assert call(search_main.main, "index", media, "--model", models / "a", "--device", "cpu", "--workers", 1)[0] == 0
    return media


def test_the_command(call, indexed, models, tmp_path):
    code, out, err = call(search_main.main, "query", "media.search", "a dog jumps")
    assert code == 0 and not err
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["score", "time", "file"] and [row[0] for row in rows[1:]] == ["1", "2", "3"]
    assert {row[-1] for row in rows[1:]} == {"short.mp4", "films/long.mp4", "picture.png"}
    scores = [float(row[1]) for row in rows[1:]]
    assert scores == sorted(scores, reverse=True)

    code, out, _ = call(
        search_main.main, "query", "media.search", "a dog jumps", "--json", "--all-windows", "--top", 50
    )
    found = json.loads(out)
    assert code == 0 and len(found["hits"]) == 8 and found["folder"] == str(indexed)
    assert round(found["hits"][0]["score"], 3) == scores[0]

    code, out, _ = call(search_main.main, "query", "media.search", "a [zebra] jumps zebra")
    assert code == 0 and "note: the model does not know [, zebra, ]\n" in out
    code, out, _ = call(search_main.main, "query", "media.search", "\U0001f642", "--json")
    assert json.loads(out)["unknown"] == ["\U0001f642"]

    for arguments, reason in [
        (
            ["nowhere", "a dog"],
            "nowhere holds no index: there is no nowhere/index.json. `python -m smaug.search index`",
        ),
        (["media.search", " "], "the text is empty; describe what is to be seen"),
        (["media.search", "x" * 3000], "the text has 3000 characters; a query has at most 2000"),
        (["media.search", "a \udcff"], "the text is not UTF-8"),
        (["media.search", "a dog", "--top", "0"], "--top is at least 1"),
        (["media.search", "a dog", "--model", models / "b"], "is another model, at step 0; name the right one with"),
        (["media.search", "a dog", "--model", "gone"], "made with the run gone, which is not there; say where it is"),
    ]:
        code, out, err = call(search_main.main, "query", *arguments)
        assert code == 1 and not out and err.count("\n") == 1 and reason in err


def test_a_run_that_was_moved(call, indexed, models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "moved")
    assert call(search_main.main, "query", "media.search", "a dog", "--model", tmp_path / "moved")[0] == 0


def test_a_damaged_index(call, indexed, tmp_path):
    path = tmp_path / "media.search/index.json"
    whole = path.read_text()
    for text, reason in [("{", "is damaged"), (whole.replace('"version": 1', '"version": 0'), "another version")]:
        path.write_text(text)
        code, _, err = call(search_main.main, "query", "media.search", "a dog")
        assert code == 1 and reason in err and "--fresh" in err and err.count("\n") == 1
    (tmp_path / "media.search/files-0.jsonl").unlink()
    path.write_text(whole)
    code, _, err = call(search_main.main, "query", "media.search", "a dog")
    assert code == 1 and "has no clip in it yet" in err


def test_without_faiss(call, indexed, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    code, _, err = call(search_main.main, "query", "media.search", "a dog")
    assert code == 1 and "pip install 'smaug[search]'" in err and err.count("\n") == 1
