"""Words to clips: the text encoder of the run, and the vectors of its index."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from smaug.data.journal import one_line
from smaug.data.manifest import clean
from smaug.data.media import printable
from smaug.data.text import UNK
from smaug.embed import embed_texts
from smaug.run import Run, load_run
from smaug.search import store
from smaug.search.store import Entry, Made

MAX_TEXT = 2000  # characters of a query; a caption has a few dozen words


@dataclass(frozen=True)
class QueryOptions:
    """Prints the clips that fit a text best. The score is a cosine: 1 at most; only its order means something."""

    index: Annotated[Path, tyro.conf.Positional]
    text: Annotated[str, tyro.conf.Positional]
    top: int = 10  # results
    all_windows: bool = False  # not only the best window of each file
    json: bool = False  # one JSON object, for programs
    model: Path | None = None  # folder of the run, if it was moved since
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class Hit:
    row: int  # number of the window in the index
    file: str  # path below the folder
    kind: str
    start: float  # seconds
    end: float
    score: float


@dataclass(frozen=True)
class Index:
    """An index in memory, in rows of the windows that count."""

    made: Made
    files: list[Entry]
    of_row: np.ndarray  # (rows,) int32: number of the file
    times: np.ndarray  # (rows, 2) fp32: start and end, seconds
    # Each with the row of everything in it, -1 for what no file has any more.
    parts: list[tuple[Any, np.ndarray]]

    @property
    def approximate(self) -> bool:
        return len(self.parts) > 0 and hasattr(self.parts[0][0], "nprobe")


def open_index(folder: Path) -> Index:
    """Raises ValueError for a folder without an index, or with an empty one."""
    made, module = store.read_made(folder), store.faiss()
    entries, vectors = store.read_entries(folder, made)
    files = [entry for entry in entries.values() if entry.windows]
    if not files:
        raise ValueError(f"{folder} has no clip in it yet; go on with `python -m smaug.search index`")
    stored = np.array([row for entry in files for row in entry.rows])
    parts: list[tuple[Any, np.ndarray]] = []
    cells = store.read_cells(folder, made)
    in_cells = 0 if cells is None else cells.ntotal
    if cells is not None:
        rows = np.full(in_cells, -1)
        rows[stored[stored < in_cells]] = np.flatnonzero(stored < in_cells)
        parts.append((cells, rows))
    if (rest := np.flatnonzero(stored >= in_cells)).size:
        flat = module.IndexFlatIP(made.embed_dim)
        flat.add(vectors[stored[rest]])
        parts.append((flat, rest))
    of_row = np.repeat(np.arange(len(files), dtype=np.int32), [len(entry.windows) for entry in files])
    times = np.array([window for entry in files for window in entry.windows], np.float32)
    return Index(made, files, of_row, times, parts)


def open_run(index: Path, made: Made, model: Path | None, device: str) -> Run:
    """The run that made an index. Raises ValueError if it has gone, or has another checkpoint now."""
    folder = model or Path(made.run)
    if not folder.is_dir():
        raise ValueError(f"{index} was made with the run {folder}, which is not there; say where it is with --model")
    run = load_run(folder, device)
    if store.weights_of(folder, run.step) != (made.weights, made.tokenizer):
        raise ValueError(
            f"{index} was made with step {made.step} of {made.run}, and {folder} is another model, at step {run.step}; "
            "name the right one with --model, or embed all again with `index --fresh`"
        )
    return run


def search(index: Index, vector: np.ndarray, top: int, all_windows: bool = False) -> list[Hit]:
    """The `top` windows whose vectors are nearest to `vector` (embed_dim,) fp32, best first; by default one of each
    file. Exact, unless the index is `approximate`."""
    rows = len(index.of_row)
    ask = min(rows, top if all_windows else 4 * top)
    while True:
        found: list[tuple[float, int]] = []
        for part, row_of in index.parts:
            scores, places = part.search(np.ascontiguousarray(vector[None], np.float32), min(ask, part.ntotal))
            known = row_of[places[0]]
            keep = (places[0] >= 0) & (known >= 0)
            found += zip(scores[0][keep].tolist(), known[keep].tolist(), strict=True)
        found.sort(reverse=True)
        hits: list[Hit] = []
        seen: set[int] = set()
        for score, row in found[:ask]:
            number = int(index.of_row[row])
            if all_windows or number not in seen:
                seen.add(number)
                entry, (start, end) = index.files[number], index.times[row].tolist()
                hits.append(Hit(row, entry.name, entry.kind, round(start, 3), round(end, 3), score))
        # One long film can fill the first places with its windows.
        if len(hits) >= top or ask >= rows:
            return hits[:top]
        ask = min(rows, 8 * ask)


def query(options: QueryOptions, console: Console) -> int:
    check_text(options.text)
    if options.top < 1:
        raise ValueError("--top is at least 1")
    index = open_index(options.index)
    run = open_run(options.index, index.made, options.model, options.device)
    vector = embed_texts(run, [options.text])[0].cpu().numpy()
    hits, unknown = search(index, vector, options.top, options.all_windows), unknown_words(run, options.text)
    if options.json:
        rows = [asdict(hit) | {"file": printable(hit.file)} for hit in hits]
        folder = printable(index.made.folder)
        print(json.dumps({"text": options.text, "folder": folder, "unknown": unknown, "hits": rows}))
        return 0
    if unknown:
        console.print(f"note: the model does not know {one_line(', '.join(unknown))}", highlight=False, soft_wrap=True)
    table = Table("", "score", "time", "file", box=None, pad_edge=False)
    for number, hit in enumerate(hits, 1):
        table.add_row(str(number), f"{hit.score:.3f}", span(hit), one_line(hit.file))
    console.print(table, soft_wrap=True)
    return 0


def check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("the text is empty; describe what is to be seen")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text)} characters; a query has at most {MAX_TEXT}")
    if clean([text]) != [text.strip()]:
        raise ValueError("the text is not UTF-8")


def unknown_words(run: Run, text: str) -> list[str]:
    """What the model reads as [UNK]; a search for nothing but that has the same hits whatever it is."""
    found = run.tokenizer.encode(text, add_special_tokens=False)
    words = [text[a:b] for token, (a, b) in zip(found.tokens, found.offsets, strict=True) if token == UNK]
    return list(dict.fromkeys(words)) if found.tokens else [text]


def span(hit: Hit) -> str:
    return "picture" if hit.kind == "image" else f"{clock(hit.start)} to {clock(hit.end)}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
