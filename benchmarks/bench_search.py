"""Search: a query among many vectors, and whether `index` keeps up with its encoder.

    pytest benchmarks/bench_search.py --benchmark-only [--full]
    python -m benchmarks.bench_search FOLDER --model RUN [--size base]      # index beside its encoder, interleaved
    python -m benchmarks.bench_search --what cells --rows 500000            # exact against cells: time and recall

Vectors are random unit vectors, the worst case for cells: nothing is near anything. `clusters` are what clips of real
folders look like, many of a kind. numpy is what one would write first. usearch takes part where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from smaug.data.decode import open_decoder
from smaug.device import describe
from smaug.embed import contrast_heads, embed_texts
from smaug.recipe import load
from smaug.run import Run, load_run
from smaug.search import store
from smaug.search.index import File, IndexOptions, embed_folder, embed_parts, read_parts
from smaug.search.query import Index, search
from smaug.search.store import Entry, Made
from smaug.testing import save_random_run

DIM, TOP = 128, 10  # embed_dim of every recipe; results
CAPTIONS = ["a man walks along a corridor", "the red ring beside the white square that grows"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@cache
def vectors(rows: int, kind: str = "random") -> tuple[np.ndarray, np.ndarray]:
    """(rows, DIM) fp32 unit vectors, and 100 to search with; `clusters`: about 50 around each of many centres."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows + 100, DIM), dtype=np.float32)
    if kind == "clusters":
        x = (
            rng.standard_normal((rows // 50, DIM), dtype=np.float32)[rng.integers(rows // 50, size=rows + 100)]
            + 0.7 * x
        )
    x = unit(x)
    return x[:rows], x[rows:]


def flat_index(x: np.ndarray) -> Index:
    """An index of as many files of one window each."""
    rows = len(x)
    flat = store.faiss().IndexFlatIP(DIM)
    flat.add(x)
    files = [Entry(f"{row}.mp4", 0, 0, "video", 1, [(0.0, 8.0)], [row]) for row in range(rows)]
    times = np.tile(np.array([0, 8], np.float32), (rows, 1))
    made = Made("", "", 0, 0, 0, DIM, 8.0)
    return Index(made, files, np.arange(rows, dtype=np.int32), times, [(flat, np.arange(rows))])


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_random_run(folder, load("smaug"), CAPTIONS, fast=True)
    return load_run(folder, "cpu")


@pytest.mark.parametrize("provider", ["smaug", "smaug, from text", "numpy", "usearch"])
@pytest.mark.parametrize("rows", [100_000, pytest.param(500_000, marks=pytest.mark.full)])
def test_query(timed, rows, provider, request):
    store.faiss().omp_set_num_threads(torch.get_num_threads())
    x, queries = vectors(rows)
    numbers = iter(range(10**9))
    if provider == "numpy":

        def function():
            scores = x @ queries[next(numbers) % 100]
            best = np.argpartition(scores, -TOP)[-TOP:]
            return best[np.argsort(-scores[best])]

    elif provider == "usearch":
        if importlib.util.find_spec("usearch") is None:
            pytest.skip("usearch is not installed")
        from usearch.index import MetricKind
        from usearch.index import search as search_all

        def function():
            return search_all(x, queries[next(numbers) % 100], TOP, MetricKind.IP, exact=True).keys

    else:
        index = flat_index(x)
        loaded = request.getfixturevalue("run") if provider != "smaug" else None

        def function():
            vector = queries[next(numbers) % 100]
            if loaded is not None:
                vector = embed_texts(loaded, [CAPTIONS[next(numbers) % 2]])[0].numpy()
            return [hit.row for hit in search(index, vector, TOP)]

    if provider != "smaug, from text":
        truth = np.argsort(-(x @ queries[0]))[:TOP].tolist()
        assert list(function()) == truth
    timed(function, f"{rows} vectors of {DIM}", torch.float32, least_bytes=4 * rows * DIM, countable=False)


def of_cells(rows: int) -> Iterable[str]:
    """Median and 95th percentile of a query in ms, and the share of the ten nearest that cells find."""
    module = store.faiss()
    module.omp_set_num_threads(torch.get_num_threads())
    yield "| vectors | | ms a query | 95 % under | recall of 10 |"
    yield "|---|---|---|---|---|"
    for kind in ("random", "clusters"):
        x, queries = vectors(rows, kind)
        flat = module.IndexFlatIP(DIM)
        flat.add(x)
        truth = flat.search(queries, TOP)[1]
        with tempfile.TemporaryDirectory() as folder:
            made = Made("", "", 0, 0, 0, DIM, 8.0)
            writer = store.Writer(Path(folder), made)
            for first in range(0, rows, 1000):
                some = x[first : first + 1000]
                entry = Entry(str(first), 0, 0, "video", len(some))
                writer.add(entry, 0, [(0.0, 8.0)] * len(some), some)
            writer.save()
            writer.close()
            began = time.perf_counter()
            store.build_cells(Path(folder), made)
            built = time.perf_counter() - began
            cells = store.read_cells(Path(folder), made)
        for name, index in (("exact", flat), (f"cells, built in {built:.0f} s", cells)):
            seconds, found = [], []
            for query in queries:
                began = time.perf_counter()
                found.append(index.search(query[None], TOP)[1][0])
                seconds.append(time.perf_counter() - began)
            recall = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(found, truth, strict=True)])
            ms = 1000 * np.array(seconds)
            yield f"| {rows} {kind} | {name} | {np.median(ms):.1f} | {np.percentile(ms, 95):.1f} | {recall:.2f} |"


def ready_clips(run: Run, folder: Path, options: IndexOptions) -> list[torch.Tensor]:
    """The frames that `index` would encode."""
    video = run.recipe.model.video
    decoder = open_decoder("pyav", torch.device("cpu"), options.workers)
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = File(Entry(path.name, 0, 0, "video"), path, 0)
        for part in read_parts(
            *(decoder, file, run.recipe.data.sampler, run.recipe.test_frames),
            *(video.view, video.image_size, options.window),
        ):
            if part.clips is not None:
                found.append(part.clips)
    decoder.close()
    return found


def race(run: Run, options: IndexOptions, rounds: int) -> Iterable[str]:
    """The encoder alone on ready frames, and all of `index` with a loaded model, in turns. Processor seconds too: where
    both share all cores these are what counts, and a busy machine does not change them much."""
    quiet = Console(file=io.StringIO())
    clips = ready_clips(run, options.folder, options)
    count = sum(map(len, clips))
    embed_parts(run, clips[:1], options.batch)  # warm
    wall: dict[str, list[float]] = {"alone": [], "index": []}
    used: dict[str, list[float]] = {"alone": [], "index": []}
    for _ in range(rounds):
        for name in ("alone", "index"):
            with tempfile.TemporaryDirectory() as out:
                made = Made("", "", 0, 0, 0, contrast_heads(run).video.out_features, options.window)
                writer = store.Writer(Path(out), made)
                began, cpu = time.perf_counter(), time.process_time()
                if name == "alone":
                    embed_parts(run, clips, options.batch)
                else:
                    assert embed_folder(options, quiet, run, options.folder.resolve(), Path(out), writer) == 0
                    assert writer.rows == count
                wall[name].append((time.perf_counter() - began) / count)
                used[name].append((time.process_time() - cpu) / count)
                writer.close()
    yield f"| {count} clips | encoder alone | index | encoder / index, median (range) of {rounds} rounds |"
    yield "|---|---|---|---|"
    for what, taken in (("clips/s", wall), ("clips/s of a processor", used)):
        ratios = [a / b for a, b in zip(taken["alone"], taken["index"], strict=True)]
        cells = [f"{1 / statistics.median(taken[name]):.2f}" for name in ("alone", "index")]
        spread = f"{statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})"
        yield f"| {what} | {cells[0]} | {cells[1]} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--what", choices=("index", "cells"), default="index")
    parser.add_argument("--model", type=Path, help="default: random weights")
    parser.add_argument("--recipe", default="mac")
    parser.add_argument("--size", default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=500_000)
    for field in dataclasses.fields(IndexOptions):
        if field.name in ("batch", "workers"):
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args()
    print(describe(torch.device("cpu")), time.strftime("%Y-%m-%d"))
    if options.what == "cells":
        lines = of_cells(options.rows)
    elif options.folder is None:
        parser.error("--what index needs a folder of videos")
    else:
        with tempfile.TemporaryDirectory() as folder:
            if options.model is None:
                options.model = Path(folder, "run")
                save_random_run(options.model, load(options.recipe, options.size), CAPTIONS, fast=True)
            run = load_run(options.model, "cpu")
        asked = IndexOptions(options.folder, options.model, batch=options.batch, workers=options.workers)
        lines = race(run, asked, options.rounds)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
