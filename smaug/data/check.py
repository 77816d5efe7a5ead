"""Whether a source can be trained on, before a run finds out: what it holds, and every file that cannot be used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from smaug.data import shapes
from smaug.data.contact_sheet import contact_sheet
from smaug.data.decode import DecodeError, read_frames, read_image
from smaug.data.decode.contract import MAX_SECONDS
from smaug.data.decode.pyav import frame_rate, index_packets, open_media, ranges, video_stream
from smaug.data.decode.threads import Threads
from smaug.data.frames import every_frame, middle_segments
from smaug.data.journal import Journal, bar, one_line
from smaug.data.listing import Listing, list_files
from smaug.data.manifest import Sample, Skip
from smaug.data.media import Media, media_reason, read_bytes, size_of
from smaug.data.reencode import GOP, SHORT_SIDE

VERSION = 1  # raise it whenever the same file would be judged differently
PATIENCE = 60  # times the limit of a clip that decoding every frame of it may take
SIZE = 32  # pixels of the frames that are decoded to see whether they can be; 3 KB each, so --full can hold all
SHOWN = 20  # bad files on the terminal


@dataclass(frozen=True)
class CheckOptions:
    """Decodes some frames of every file, as training would, and reports what is there and what cannot be used.

    A folder is checked file by file, whether or not its files have captions. The exit code is 0 when the check ran,
    whatever it found (1 with --strict and bad files), and 1 when it could not run. Stopped with Ctrl-C and started
    again, it goes on where it was: files that have not changed since are not decoded again.
    """

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders, manifests (.csv .tsv .jsonl .parquet), .tar
    root: Path | None = None  # folder that the paths in a manifest start from; default: the manifest's own
    video_column: str = "video"
    image_column: str = "image"
    caption_column: str = "caption"
    json: Path | None = None  # also write all of it there; - is stdout, with nothing else on it
    sheet: Path | None = None  # PNG of clips with captions; default: beside --json, else ./smaug-check.png
    no_sheet: bool = False  # make no such picture
    frames: int = 4  # frames decoded of each video, from all of its length, beside its first and last
    full: bool = False  # decode every frame of each video
    strict: bool = False  # exit code 1 if a file is bad
    fresh: bool = False  # decode again what an earlier check has decoded
    workers: int = os.cpu_count() or 1  # decoding threads
    clip_seconds: float = MAX_SECONDS  # a file that takes longer is bad, as in training; 60 times as long with --full


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file is. With a `reason` it is bad, and the rest says nothing."""

    kind: str
    reason: str = ""
    codec: str = ""
    container: str = ""
    width: int = 0  # as stored
    height: int = 0
    frames: int = 0
    keys: int = 0  # frames that decoding can start from
    seconds: float = 0.0
    decoded: int = 0  # frames to decode for `frames` of --frames, from the key frames before them
    audio: bool = False
    size: int = 0  # bytes


def check(options: CheckOptions, console: Console) -> int:
    began = time.monotonic()
    if options.frames < 1 or options.workers < 1 or not options.clip_seconds > 0:
        raise ValueError("--frames, --workers and --clip-seconds must be above 0")
    to_stdout = options.json is not None and str(options.json) == "-"
    sheet = None if options.no_sheet else options.sheet or _beside(options.json, to_stdout)
    for path in (None if to_stdout else options.json, sheet):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder; name the file to write in it")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {sheet}: the name of the picture must end in .png")

    columns = (options.video_column, options.image_column, options.caption_column)
    listing = list_files(options.source, options.root, *columns)
    verdicts = _judge(listing.samples, options, console)
    judged = list(zip(listing.samples, verdicts, strict=True))
    bad = listing.bad + [Skip(sample.name, verdict.reason) for sample, verdict in judged if verdict.reason]
    good = [verdict for verdict in verdicts if not verdict.reason]
    report = summary(listing, good, bad)
    if sheet is not None and good:
        title = f"{', '.join(one_line(p.name or str(p)) for p in options.source)}: {len(good)} good, {len(bad)} bad"
        try:
            shown = [sample for sample, verdict in judged if not verdict.reason]
            contact_sheet(sheet, title, shown, bad, options.workers, options.clip_seconds)
            report["sheet"] = str(sheet)
        except OSError as error:
            console.print(f"warning: {sheet} cannot be written: {error.strerror or error}", soft_wrap=True)
    _tell(report, good, options, console)
    console.print(f"{'took':<11}{time.monotonic() - began:.1f} s", highlight=False)
    if to_stdout:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    elif options.json is not None:
        try:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"{options.json} cannot be written: {error.strerror or error}") from None
        console.print(f"{'report':<11}{options.json}", highlight=False, soft_wrap=True)
    return int(options.strict and bool(bad))


def _beside(report: Path | None, to_stdout: bool) -> Path:
    return Path("smaug-check.png") if report is None or to_stdout else report.with_suffix(".png")


def _judge(samples: Sequence[Sample], options: CheckOptions, console: Console) -> list[Verdict]:
    """A verdict for each, from the journal where it has one."""
    name = [VERSION, [os.path.abspath(p) for p in options.source], options.frames, options.full, options.clip_seconds]
    digest = hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, soft_wrap=True)

    journal = Journal(shapes.cache_folder() / "check" / f"{digest}.jsonl", Verdict, warn, options.fresh)
    # the kind: a row that called a video an image may have been mended
    verdicts = {
        number: known
        for number, sample in enumerate(samples)
        if (known := journal.get(sample.path)) is not None and known.kind == sample.kind
    }
    if verdicts:
        console.print(
            f"{'known':<11}{len(verdicts)} of {len(samples)} files from an earlier check, unchanged since; "
            "--fresh decodes them again",
            highlight=False,
            soft_wrap=True,
        )
    bad = sum(bool(v.reason) for v in verdicts.values())
    seconds = options.clip_seconds * (PATIENCE if options.full else 1)
    threads = Threads(options.workers, 2 * seconds + 1)  # examine's own limit comes first wherever FFmpeg comes back

    def one(number: int) -> Verdict:
        return note(number, judge(samples[number], options.frames, options.full, seconds))

    def late(number: int) -> Verdict:
        reason = f"does not come back from decoding; left alone after {threads.seconds:.0f} s"
        return note(number, Verdict(samples[number].kind, reason))

    def note(number: int, verdict: Verdict) -> Verdict:
        nonlocal bad
        bad += bool(verdict.reason)
        journal.add(samples[number].path, verdict)
        bars.advance(task)
        return verdict

    todo = [n for n in range(len(samples)) if n not in verdicts]
    with bar(lambda: f"{bad} bad") as bars:
        task = bars.add_task("checking", total=len(samples), completed=len(verdicts))
        verdicts |= dict(zip(todo, threads.map(one, todo, late), strict=True))
    threads.close()
    return [verdicts[n] for n in range(len(samples))]


def judge(sample: Sample, frames: int, full: bool, seconds: float) -> Verdict:
    try:
        return examine(sample.path, sample.kind, frames, full, seconds)
    except DecodeError as error:
        return Verdict(sample.kind, error.reason)
    except Exception as error:  # also MemoryError: one file must not end a check of a million
        return Verdict(sample.kind, f"{type(error).__name__}: {error}".removesuffix(": "))


def examine(media: Media, kind: str, frames: int, full: bool, seconds: float) -> Verdict:
    """Decodes the middle of `frames` equal parts of a clip, its first and its last frame; with `full` all of them.

    Raises DecodeError for what is wrong with the file.
    """
    if reason := media_reason(media):
        raise DecodeError(reason)
    size = size_of(media)
    if kind == "image":
        read_image(media, SIZE)
        with Image.open(media if isinstance(media, Path) else io.BytesIO(read_bytes(media))) as image:
            codec = (image.format or "").lower()
            return Verdict(kind, "", codec, codec, image.width, image.height, 1, 1, 0.0, 1, False, size)

    until = time.monotonic() + seconds
    with open_media(media, until) as container:
        stream = video_stream(container)
        index = index_packets(container, stream, until)
        codec = stream.codec_context.codec.canonical_name
        width, height = stream.codec_context.width, stream.codec_context.height
        audio = bool(container.streams.audio)
        form = container.format.name.split(",")  # mov,mp4,m4a,...
        suffix = media.suffix[1:].lower() if isinstance(media, Path) else ""
        suffix = suffix if suffix in form else "mp4" if "mp4" in form else form[0]
        rate = frame_rate(stream)
    wanted = [index.shown[i] for i in middle_segments(len(index.shown), frames)]
    decoded = sum(last - first + 1 for first, last in ranges(index, wanted))

    times = np.zeros(1)

    def pick(now: np.ndarray) -> Sequence[int]:
        nonlocal times
        times = now
        last = len(now) - 1
        return every_frame(now) if full else sorted({0, *middle_segments(len(now), frames), last})

    read_frames(media, pick, SIZE, seconds=seconds)
    length = float(times[-1]) * len(times) / (len(times) - 1) if len(times) > 1 else 1 / rate
    return Verdict(
        kind, "", codec, suffix, width, height, len(times), len(index.keys),
        length, decoded, audio, size,
    )  # fmt: skip


def summary(listing: Listing, good: Sequence[Verdict], bad: Sequence[Skip]) -> dict[str, Any]:
    """What --json holds."""
    videos = [v for v in good if v.kind == "video"]
    seconds = sorted(v.seconds for v in videos)
    return {
        "files": len(listing.samples) + len(listing.bad),
        "good": len(good),
        "bad": [{"name": skip.name, "reason": skip.reason} for skip in bad],
        "missing_captions": listing.missing,
        "ignored": listing.ignored,  # files of folders that are no media by their names
        "videos": len(videos),
        "images": len(good) - len(videos),
        "with_audio": sum(v.audio for v in videos),
        "bytes": sum(v.size for v in good),
        "codecs": _counted(v.codec for v in good),
        "containers": _counted(v.container for v in good),
        "resolutions": _counted(f"{v.width}x{v.height}" for v in good),
        "frame_rates": _counted(f"{v.frames / v.seconds:.4g}" for v in videos),
        "seconds": {
            "min": round(seconds[0], 3),
            "median": round(seconds[len(seconds) // 2], 3),
            "max": round(seconds[-1], 3),
            "total": round(sum(seconds), 3),
        }
        if seconds
        else {},
        "frames": sum(v.frames for v in videos),
        "frames_per_key_frame": round(sum(v.frames for v in videos) / max(1, sum(v.keys for v in videos)), 2),
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _tell(report: dict[str, Any], good: Sequence[Verdict], options: CheckOptions, console: Console) -> None:
    def line(what: str, text: str, style: str | None = None) -> None:
        console.print(f"{what:<11}{text}", style=style, highlight=False, soft_wrap=True)

    table = Table(box=None, pad_edge=False)
    for heading in ("codec", "container", "size", "files", "hours", "frames/s", "frames/key", "MB"):
        table.add_column(heading, justify="left" if heading in ("codec", "container", "size") else "right")
    rows: dict[tuple[str, str, str], list[Verdict]] = {}
    for v in good:
        rows.setdefault((v.codec, v.container, f"{v.width} x {v.height}"), []).append(v)
    ordered = sorted(rows.items(), key=lambda row: -len(row[1]))
    for kinds, some in ordered[:SHOWN]:
        frames, seconds = sum(v.frames for v in some), sum(v.seconds for v in some)
        moving = (f"{seconds / 3600:.3g}", f"{frames / seconds:.4g}") if seconds else ("", "")
        gop = f"{frames / max(1, sum(v.keys for v in some)):.4g}" if seconds else ""
        table.add_row(*kinds, str(len(some)), *moving, gop, f"{sum(v.size for v in some) / 1e6:.4g}")
    if good:
        console.print(table)
    if len(ordered) > SHOWN:
        line("", f"and {len(ordered) - SHOWN} more kinds")
    line("files", f"{report['files']}: {report['good']} good, {len(report['bad'])} bad")
    if s := report["seconds"]:
        line(
            "durations",
            f"{s['min']:.2f} s to {s['max']:.2f} s, median {s['median']:.2f} s, total {s['total'] / 3600:.3g} h",
        )
    if report["missing_captions"]:
        line("captions", f"{report['missing_captions']} files have none; training counts them as unusable")
    if report["ignored"]:
        names = ", ".join([*map(one_line, report["ignored"][:3]), *["..."][: len(report["ignored"]) - 3]])
        line("ignored", f"{len(report['ignored'])} files that are no media by their names: {names}")
    for skip in report["bad"][:SHOWN]:
        line("bad", f"{one_line(skip['name'])}: {one_line(skip['reason'])}", "red")
    if (more := len(report["bad"]) - SHOWN) > 0:
        line("", f"and {more} more" + ("" if options.json else "; --json report.json has them all"))
    if hint := advice(good, options.frames):
        line("hint", hint)
    if "sheet" in report:
        line("sheet", report["sheet"])


def advice(good: Sequence[Verdict], frames: int) -> str:
    """Whether `reencode` would pay, by the pixels that are decoded for `frames` frames of each video."""
    videos = [v for v in good if v.kind == "video"]
    now = sum(v.decoded * v.width * v.height for v in videos)
    then = 0.0
    for v in videos:
        shrunk = min(1.0, SHORT_SIDE / max(1, min(v.width, v.height))) ** 2
        # a wanted frame lies in the middle of its group, on average
        then += min(v.frames, frames * (GOP + 1) / 2) * v.width * v.height * shrunk
    if not videos or now < 2 * then:
        return ""
    mean = sum(v.decoded for v in videos) / len(videos)
    return (
        f"for {frames} frames of a video {mean:.0f} are decoded on average; after `python -m smaug.data reencode` "
        f"({SHORT_SIDE} pixels high or wide, a key frame every {GOP}) 1/{now / then:.0f} of the pixels would be"
    )
