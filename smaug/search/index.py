"""Embeds every video and picture below a folder: decoding in threads beside the encoder, each file opened once.

A video is cut into windows, each embedded on its own. One `Want` asks for the frames of up to PART windows, so that a
film is neither decoded once a window nor held in memory whole, and a stopped run loses no more of it than that.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor

from smaug.data.decode import Decoder, Want, open_decoder
from smaug.data.decode.contract import MAX_SECONDS
from smaug.data.frames import FrameSampler
from smaug.data.journal import bar, one_line
from smaug.data.listing import list_files
from smaug.data.manifest import Skip, near_file
from smaug.data.media import media_reason, printable
from smaug.embed import contrast_heads, embed_videos
from smaug.run import Run, load_run
from smaug.search import store
from smaug.search.store import Entry, Made, Window

PART = 16  # windows decoded together; of 8 s at 4K and 60 frames a second still within the limits of decode/contract.py
SAVE_SECONDS = 2.0  # between two saves, and at most for a batch: what a crash loses
FIRST = 4  # clips encoded together before it is known how long they take
SHOWN = 20  # bad files on the terminal


@dataclass(frozen=True)
class IndexOptions:
    """Embeds every video and picture below a folder. With Ctrl-C and again it goes on; later it takes what changed."""

    folder: Annotated[Path, tyro.conf.Positional]
    model: Path  # folder of a run of smaug.train
    out: Path | None = None  # folder of the index; default: NAME.search in the current folder
    window: float = 8.0  # seconds; a rest of less than half of it belongs to the last window
    batch: int = 64  # clips encoded together; fewer where they would take more than 2 s
    workers: int = os.cpu_count() or 1  # decoding threads
    follow_links: bool = False  # also take what links lead to outside the folder
    retry_bad: bool = False  # try again the files that could not be decoded
    fresh: bool = False  # throw away what is in the index
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class File:
    """A file to embed, from its window `at` on."""

    entry: Entry  # without windows
    path: Path
    at: int


@dataclass(frozen=True, slots=True)
class Part:
    """What became of some windows of a file: frames, or why there are none."""

    file: File
    at: int
    of: int
    times: Sequence[Window]
    clips: Tensor | None  # (len(times), F, size, size, 3) uint8 in host memory
    reason: str = ""


def cut(times: np.ndarray, seconds: float) -> list[tuple[float, float, int, int]]:
    """Windows of a clip with frames at `times` (n,) -> start and end in seconds, first frame, one past the last.

    Of `seconds` each; a rest of at least half of that is one too, a shorter one belongs to the last. None is without
    frames: one that no frame begins in shows the frame before it.
    """
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    length = float(times[-1]) + float(step)
    count = max(1, int(length / seconds + 0.5))
    found = []
    for number in range(count):
        start, end = number * seconds, (number + 1) * seconds if number + 1 < count else max(length, number * seconds)
        # 1 us: the frame of a moment must not fall before it by rounding
        low, high = np.searchsorted(times, [start - 1e-6, end - 1e-6 if number + 1 < count else np.inf])
        low = min(int(low), len(times) - 1)
        if low == high:
            low = max(0, low - 1)
        found.append((round(start, 3), round(end, 3), low, max(int(high), low + 1)))
    return found


def read_parts(
    decoder: Decoder, file: File, sampler: FrameSampler, frames: int, view: int, size: int, seconds: float
) -> Iterator[Part]:
    """A file in parts of up to PART windows, until one cannot be decoded."""
    sample = sampler.pick(frames, view)
    at, of = file.at, file.at + 1
    while at < of:
        windows: list[tuple[float, float, int, int]] = []

        def pick(times: np.ndarray, at: int = at, windows: list[tuple[float, float, int, int]] = windows) -> list[int]:
            windows[:] = cut(times, seconds)
            some = windows[at : at + PART]
            return [low + i for _, _, low, high in some for i in sample(times[low:high] - times[low])]

        got = decoder.decode([Want(file.path, file.entry.kind, pick)], size)[0]  # type: ignore[arg-type]  # its defaults
        if file.entry.kind == "image":
            windows = [(0.0, 0.0, 0, 1)]
        some = [(start, end) for start, end, _, _ in windows[at : at + PART]]
        if got.frames is None or not some:  # none: fewer frames come out than an earlier part was told of
            yield Part(file, at, 0, [], None, got.reason or "damaged: another number of frames each time it is read")
            return
        of = len(windows)
        yield Part(file, at, of, some, got.frames.unflatten(0, (len(some), -1)))
        at += len(some)


class Readers:
    """Threads that decode files ahead of the encoder, at most `ahead` windows. Iterate over it once.

    One file a thread, so that a long one does not hold up the others; Ctrl-C waits for none: they are daemons.
    """

    def __init__(self, files: Sequence[File], read: Callable[[File], Iterator[Part]], workers: int, ahead: int):
        self.read, self.ahead = read, ahead
        self._files = deque(files)
        self._parts: deque[Part | BaseException] = deque()
        self._windows = 0  # in _parts
        self._working = workers
        self._over = False
        self._changed = threading.Condition()  # guards all of these
        for number in range(workers):
            threading.Thread(target=self._work, name=f"smaug-read-{number}", daemon=True).start()

    def _work(self) -> None:
        try:
            while not self._over:
                with self._changed:
                    if not self._files:
                        break
                    file = self._files.popleft()
                for part in self.read(file):
                    with self._changed:
                        self._changed.wait_for(lambda: self._over or self._windows < self.ahead)
                        if self._over:
                            return
                        self._parts.append(part)
                        self._windows += len(part.times)
                        self._changed.notify_all()
        except BaseException as error:  # it belongs to the thread that iterates
            self._parts.append(error)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Part]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or not self._working)
                if not self._parts:
                    return
                part = self._parts.popleft()
                if isinstance(part, BaseException):
                    raise part
                self._windows -= len(part.times)
                self._changed.notify_all()
            yield part

    def stop(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


def index(options: IndexOptions, console: Console) -> int:
    """Exit code 0, or 130 after Ctrl-C. Raises ValueError for what a person must change, OSError for a full disk."""
    if not options.window > 0 or options.batch < 1 or options.workers < 1:
        raise ValueError("--window, --batch and --workers must be above 0")
    if not options.folder.is_dir():
        what = "is no folder" if options.folder.exists() else f"does not exist{near_file(options.folder)}"
        raise ValueError(f"{options.folder} {what}; name the folder with the videos")
    store.faiss()  # said before hours of work, not after
    folder = options.folder.resolve()
    out = options.out or Path(f"{folder.name or 'root'}.search")
    run = load_run(options.model, options.device)
    heads = contrast_heads(run)
    made = Made(
        str(folder), str(options.model.resolve()), run.step, *store.weights_of(options.model, run.step),
        heads.video.out_features, options.window,
    )  # fmt: skip
    with store.claimed(out):
        made = _open(out, made, options.fresh)
        writer = store.Writer(out, made)
        try:
            code = embed_folder(options, console, run, folder, out, writer)
        finally:
            writer.close()
        if code == 0:
            _tidy(out, made, writer, console)
    return code


def _open(out: Path, made: Made, fresh: bool) -> Made:
    """The index as it is there, if it was made with the same model and windows of the same folder; else a new one."""
    if fresh or not (out / "index.json").exists():
        try:
            made = replace(made, generation=store.read_made(out).generation + 1)
        except ValueError:  # there is none, or it is damaged, or of another version
            names = [path.name for path in out.iterdir() if not path.name.startswith(".")]
            if not all(map(store.OWN.fullmatch, names)):  # what a new index finds is deleted
                raise ValueError(f"{out} is not empty, and holds no index; choose another --out") from None
        store.new(out, made)
        return made
    there = store.read_made(out)
    if (there.weights, there.tokenizer) != (made.weights, made.tokenizer):
        raise ValueError(
            f"{out} was made with {there.run} at step {there.step}, and vectors of two models cannot be compared; "
            "choose another --out, or --fresh to embed all again"
        )
    known = made.folder if _moved(out, there, Path(made.folder)) else there.folder
    for what, old, new in (("folder", known, made.folder), ("--window", there.window, made.window)):
        if old != new:
            raise ValueError(f"{out} has {what} {old}, not {new}; choose another --out, or --fresh to embed all again")
    if (there.run, there.folder) != (made.run, made.folder):  # moved
        there = replace(there, run=made.run, folder=made.folder)
        store.write_made(out, there)
    return there


def _moved(out: Path, there: Made, folder: Path) -> bool:
    """Whether this is the folder of an index, which is no more where it was: a file of it is here, as it was."""
    if (was := Path(there.folder)).exists():
        return was.resolve() == folder  # a link is left there
    for name, entry in store.read_entries(out, there)[0].items():
        with contextlib.suppress(OSError):
            if entry.is_of((folder / name).stat()):
                return True
    return False


def embed_folder(
    options: IndexOptions, console: Console, run: Run, folder: Path, out: Path, writer: store.Writer
) -> int:
    """Brings an index up to date with its folder. Exit code: 0, or 130 after Ctrl-C."""
    files, bad, counts = _compare(options, folder, writer)
    console.print(f"index      {out}: {counts}", highlight=False, soft_wrap=True)
    writer.save()
    recipe = run.recipe
    frames, view, size = recipe.test_frames, recipe.model.video.view, recipe.model.video.image_size
    # Many threads ask for a clip each, as only pyav lets them. A PART of a film may take as long as 16 clips.
    decoder = open_decoder("pyav", torch.device("cpu"), options.workers, PART * MAX_SECONDS)

    def read(file: File) -> Iterator[Part]:
        return read_parts(decoder, file, recipe.data.sampler, frames, view, size, options.window)

    readers = Readers(files, read, options.workers, 2 * options.batch)
    began = saved = time.monotonic()
    encoding, clips, files_done, stopped = 0.0, 0, 0, False
    enough = min(FIRST, options.batch)  # clips to encode at once
    ahead: list[Part] = []
    try:
        with bar(lambda: f"{clips / max(time.monotonic() - began, 1e-9):.1f} clips/s") as bars:
            task = bars.add_task("files", total=len(files))

            def encode() -> None:
                nonlocal encoding, clips, saved, enough, ahead
                start, before = time.monotonic(), clips
                vectors = embed_parts(run, [part.clips for part in ahead if part.clips is not None], options.batch)
                took = time.monotonic() - start
                encoding += took
                for part, some in zip(ahead, vectors, strict=True):
                    if reason := _changed(part.file):
                        bad.append(Skip(part.file.entry.name, reason))
                    else:
                        entry = replace(part.file.entry, of=part.of, windows=[], rows=[])
                        writer.add(entry, part.at, part.times, some)
                    clips += len(part.times)
                    if part.at + len(part.times) == part.of:
                        done()
                ahead = []
                enough = min(options.batch, max(1, int(SAVE_SECONDS * (clips - before) / max(took, 1e-9))))
                if time.monotonic() - saved > SAVE_SECONDS:
                    writer.save()
                    saved = time.monotonic()

            def done() -> None:
                nonlocal files_done
                files_done += 1
                bars.advance(task)
                if not console.is_terminal and files_done * 10 // len(files) > (files_done - 1) * 10 // len(files):
                    console.print(f"index      {files_done} of {len(files)} files", highlight=False)  # ten in all

            for part in readers:
                if part.clips is None:
                    bad.append(Skip(part.file.entry.name, part.reason))
                    ahead = [one for one in ahead if one.file is not part.file]  # half a film is not in the index
                    if not _changed(part.file):
                        writer.bad(replace(part.file.entry, reason=part.reason))
                    done()
                    continue
                for first in range(0, len(part.times), step := enough):
                    times, some = part.times[first : first + step], part.clips[first : first + step]
                    ahead.append(replace(part, at=part.at + first, times=times, clips=some))
                    if sum(len(one.times) for one in ahead) >= enough:
                        encode()
            if ahead:
                encode()
    except KeyboardInterrupt:
        stopped = True
    finally:
        readers.stop()
        decoder.close()
    writer.save()
    took = time.monotonic() - began
    _report_bad(out, list(dict.fromkeys(bad)), console)
    if stopped:
        console.print(f"stopped    {files_done} of {len(files)} files; the same command goes on", highlight=False)
        return 130
    if clips:
        console.print(
            f"embedded   {clips} clips of {files_done} files in {took:.1f} s, {clips / took:.1f} clips/s; "
            f"the encoder worked {encoding / took:.0%} of that time",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _compare(options: IndexOptions, folder: Path, writer: store.Writer) -> tuple[list[File], list[Skip], str]:
    """Files to embed; what is bad already; and how the folder differs from the index, for a person."""
    listing = list_files([folder], None, "video", "image", "caption")
    bad = list(listing.bad)
    todo: list[File] = []
    new = changed = begun = known = 0
    present = set()
    for sample in listing.samples:
        if not isinstance(sample.path, Path):
            continue  # a member of a tar shard; a page cannot play it
        path = sample.path
        reason = media_reason(path)
        real = Path(os.path.realpath(path))
        if not reason and not options.follow_links and not real.is_relative_to(folder):
            reason = "a link that leads out of the folder; take it with --follow-links"
        if reason:  # seen again at no cost, so it is not remembered
            bad.append(Skip(printable(sample.name), reason))
            continue
        try:
            found = path.stat()
        except OSError:  # it went away this moment
            continue
        present.add(sample.name)
        own = "" if real == path else str(real)
        entry = writer.entries.get(sample.name)
        # Of the same content behind another link the index has another entry, or the page would refuse it for ever.
        if entry is None or not entry.is_of(found) or entry.real != own:
            new, changed = new + (entry is None), changed + (entry is not None)
            entry = None
        elif entry.reason and not options.retry_bad:
            bad.append(Skip(printable(entry.name), entry.reason))
            continue
        elif entry.whole and not entry.reason:
            known += 1
            continue
        else:
            begun += 1
        at = 0 if entry is None or entry.reason else len(entry.windows)
        todo.append(File(Entry(sample.name, found.st_size, found.st_mtime_ns, sample.kind, real=own), path, at))
    gone = [name for name in writer.entries if name not in present]
    for name in gone:
        writer.gone(name)
    if not present and not bad:
        raise ValueError(f"{folder} holds no video or picture")
    counts = f"{new} new files, {changed} changed, {known} known, {len(gone)} gone, {len(bad)} bad"
    return todo, bad, counts + (f", {begun} to go on with" if begun else "")


@torch.no_grad()
def embed_parts(run: Run, clips: Sequence[Tensor], batch: int) -> list[np.ndarray]:
    """Clips (n, F, size, size, 3) uint8, any n and F -> (n, embed_dim) fp32 of each; `batch` of one F at once."""
    found: list[np.ndarray] = [np.empty(0)] * len(clips)
    for frames in {one.shape[1] for one in clips}:
        numbers = [i for i, one in enumerate(clips) if one.shape[1] == frames]
        together = torch.cat([clips[i] for i in numbers])
        vectors = torch.cat([embed_videos(run, some) for some in together.split(batch)]).cpu().numpy()
        ends = np.cumsum([len(clips[i]) for i in numbers])
        for number, some in zip(numbers, np.split(vectors, ends[:-1]), strict=True):
            found[number] = some
    return found


def _changed(file: File) -> str:
    """Why what was read of a file may be of neither its old nor its new content."""
    try:
        same = file.entry.is_of(file.path.stat())
    except OSError:
        return "went away while it was read"
    return "" if same else "changed while it was read; the next run takes it"


def _report_bad(out: Path, bad: list[Skip], console: Console) -> None:
    store.write_whole(out / "bad.txt", "".join(f"{one_line(skip.name)}: {skip.reason}\n" for skip in bad))
    for skip in bad[:SHOWN]:
        console.print(f"bad        {one_line(skip.name)}: {skip.reason}", highlight=False, soft_wrap=True)
    if len(bad) > SHOWN:
        console.print(f"bad        and {len(bad) - SHOWN} more, see {out / 'bad.txt'}", highlight=False, soft_wrap=True)


def _tidy(out: Path, made: Made, writer: store.Writer, console: Console) -> None:
    """Once all is embedded: no more rows than windows, and cells where there are many."""
    windows = sum(len(entry.windows) for entry in writer.entries.values())
    rows = writer.rows
    if rows - windows > store.WASTE * rows:
        made, rows = store.compact(out, made), windows
    if windows > store.APPROXIMATE:
        cells = store.read_cells(out, made)
        if rows - (cells.ntotal if cells else 0) > store.WASTE * rows:  # what is not in cells is searched exactly
            console.print(f"index      {windows} clips are many: sorting them into cells", highlight=False)
            store.build_cells(out, made)
    where = f"{sum(bool(entry.windows) for entry in writer.entries.values())} files, {windows} clips"
    console.print(f"done       {out}: {where}; search with", highlight=False, soft_wrap=True)
    console.print(f'  python -m smaug.search query {out} "a dog jumps"', highlight=False, soft_wrap=True)
