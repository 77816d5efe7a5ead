"""`shapes`: the embedded data set. Really encoded video whose captions need colour, shape and the order of time.

A clip shows two objects of different colours on a textured ground. One of them changes: mostly it grows or shrinks,
sometimes it moves left, right, up or down on a canvas that wraps round, so that no single frame tells which.
Every validation and test clip has a time-reversed twin with the reversed caption; a model blind to order cannot tell
the two apart and tops out at R@1 = 50 %. Test captions are unique, and 20 % of the test's clips show a colour on a
shape that training never combines.

Files are VP9 in WebM, 128 x 128, 16 frames at 8 per second, each a key frame, so that a twin's decoded frames are its
sister's bit for bit, in reverse; and one `{split}.jsonl` a split. The set is built aside, checksummed and renamed into
place, so a directory with the final name is whole. Then the clips are decoded once by the normal decoder into
`frames-{size}-{split}.u8`, (clips, 16, size, size, 3) uint8, in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from smaug.data.decode.pyav import read_frames
from smaug.data.frames import every_frame

CANVAS = 128  # pixels; hardware decoders refuse much smaller VP9
FRAMES = 16
RATE = 8  # frames a second
SPLITS = ("train", "val", "test")
VERSION = 3  # raise it whenever a clip or a caption would come out differently
DECODED = 2  # raise it whenever the decoder would give other pixels: maps in caches are then made anew

COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 190, 60),
    "blue": (45, 75, 235),
    "yellow": (240, 225, 45),
    "purple": (170, 45, 210),
    "white": (250, 250, 250),
}
SHAPES = ("square", "triangle", "cross", "ring")
REVERSE = {
    "grows": "shrinks",
    "shrinks": "grows",
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
}
STEP = {"moves left": (0, -1), "moves right": (0, 1), "moves up": (-1, 0), "moves down": (1, 0)}  # (y, x) a frame
# Two colours never meet on the same shape here, so every colour and every shape is still seen in training.
NEW_COMBINATIONS = frozenset((colour, SHAPES[(2 * i) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SHARE_MOVES = 0.3
SHARE_NEW = 0.2
TEXTURES = 64


class DamagedError(RuntimeError):
    """A file of the built set is not what was written; the sentence says which, and what to do."""


@dataclass(frozen=True)
class Scene:
    """One clip. Positions are centres in canvas pixels at frame 0, (y, x); diameters are in pixels."""

    colour: str
    shape: str
    change: str  # a key of REVERSE; what the first object does
    centre: tuple[int, int]
    diameters: tuple[int, int]  # at the first and the last frame; equal for an object that moves
    speed: int  # pixels a frame
    still_colour: str
    still_shape: str
    still_centre: tuple[int, int]
    still_diameter: int
    still_first: bool  # which of the two the caption mentions first
    texture: int

    @property
    def caption(self) -> str:
        changing, still = f"the {self.colour} {self.shape}", f"the {self.still_colour} {self.still_shape}"
        if self.still_first:
            return f"{still} beside {changing} that {self.change}"
        return f"{changing} {self.change} beside {still}"

    @property
    def content(self) -> tuple[str, ...]:
        """What a caption says, whichever object it mentions first."""
        return (self.colour, self.shape, self.still_colour, self.still_shape, self.change)

    @property
    def new_combination(self) -> bool:
        return not NEW_COMBINATIONS.isdisjoint({(self.colour, self.shape), (self.still_colour, self.still_shape)})

    def reversed(self) -> Scene:
        """The same frames in the opposite order, and the caption that is then true."""
        if self.change in STEP:
            travelled = self.speed * (FRAMES - 1)
            dy, dx = STEP[self.change]
            end = ((self.centre[0] + dy * travelled) % CANVAS, (self.centre[1] + dx * travelled) % CANVAS)
            return replace(self, change=REVERSE[self.change], centre=end)
        return replace(self, change=REVERSE[self.change], diameters=self.diameters[::-1])


def read_scene(row: dict[str, Any]) -> Scene:
    """The inverse of `asdict`, of a scene as `{split}.jsonl` holds it."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Scene(**fields)


def draw_scene(rng: np.random.Generator, new: bool) -> Scene:
    """A random scene; with `new`, its changing or its still object has a combination kept out of training."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    seen = [p for p in pairs if p not in NEW_COMBINATIONS]
    unseen = sorted(NEW_COMBINATIONS)
    objects = [seen[rng.integers(len(seen))], seen[rng.integers(len(seen))]]
    if new:
        objects[rng.integers(2)] = unseen[rng.integers(len(unseen))]
    while objects[0][0] == objects[1][0]:
        objects[1] = seen[rng.integers(len(seen))] if objects[1] not in NEW_COMBINATIONS else objects[1]
        objects[0] = seen[rng.integers(len(seen))] if objects[0] not in NEW_COMBINATIONS else objects[0]
    moves = rng.random() < SHARE_MOVES
    change = str(rng.choice(list(STEP) if moves else ["grows", "shrinks"]))
    # The two live in opposite halves, so they never hide each other; a mover's half lies along its path.
    upright = bool(rng.integers(2)) if not moves else STEP[change][0] == 0  # halves are top and bottom
    side = int(rng.integers(2))

    def place(half: int) -> tuple[int, int]:
        across, along = half * 64 + 32 + int(rng.integers(-1, 2)), int(rng.integers(31, CANVAS - 30))
        return (across, along) if upright else (along, across)

    # 37: a square or triangle of 36 pixels, not far from the edges of patches, covers only 4 or 5 of them.
    small, large = int(rng.integers(37, 41)), int(rng.integers(54, 61))
    held = int(rng.integers(40, 57))
    diameters = {"grows": (small, large), "shrinks": (large, small)}.get(change, (held, held))
    return Scene(
        *objects[0], change, place(side), diameters, int(rng.integers(5, 7)),
        *objects[1], place(1 - side), int(rng.integers(40, 57)),
        bool(rng.integers(2)), int(rng.integers(TEXTURES)),
    )  # fmt: skip


def draw_split(split: str, clips: int) -> list[Scene]:
    """The scenes of a split. In val and test, clips 2i and 2i + 1 are twins and no two captions say the same."""
    rng = np.random.default_rng([VERSION, SPLITS.index(split)])
    if split == "train":
        return [draw_scene(rng, new=False) for _ in range(clips)]
    scenes: list[Scene] = []
    contents: set[tuple[str, ...]] = set()
    new_pairs = round(clips // 2 * SHARE_NEW)
    while len(scenes) < clips:
        scene = draw_scene(rng, new=len(scenes) // 2 < new_pairs)
        twin = scene.reversed()
        if contents.isdisjoint({scene.content, twin.content}):
            contents |= {scene.content, twin.content}
            scenes += [scene, twin]
    return scenes[:clips]


@functools.cache
def _sprite(shape: str, diameter: int) -> np.ndarray:
    """Coverage of each pixel, (diameter, diameter, 1) float32 in 0..1, from 4 x 4 samples a pixel."""
    x = (np.arange(diameter * 4) + 0.5) / (diameter * 2) - 1
    y, x = x[:, None], x[None, :]
    inside = {
        "square": (abs(x) <= 0.88) & (abs(y) <= 0.88),
        "triangle": (abs(x) <= (y + 1) / 2) & (y <= 0.9),
        "cross": (abs(x) <= 0.33) | (abs(y) <= 0.33),
        "ring": (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    }[shape]
    return inside.reshape(diameter, 4, diameter, 4).mean((1, 3), dtype=np.float32)[..., None]


@functools.cache
def _texture(number: int) -> np.ndarray:
    """A gray, slightly coloured, cloudy ground, (CANVAS, CANVAS, 3) uint8, without seams."""
    rng = np.random.default_rng([VERSION, 9, number])
    ground = np.full((CANVAS, CANVAS, 3), rng.uniform(60, 130), np.float32)
    for cells, strength in ((4, 22.0), (8, 12.0), (16, 8.0)):
        noise = rng.uniform(-1, 1, (cells, cells, 1)) + 0.4 * rng.uniform(-1, 1, (cells, cells, 3))
        ground += strength * _smooth_upscale(noise.astype(np.float32))
    return ground.astype(np.uint8)


def _smooth_upscale(noise: np.ndarray) -> np.ndarray:
    cells = len(noise)
    at = np.arange(CANVAS) * cells / CANVAS
    low, part = at.astype(int) % cells, (at % 1)[:, None, None].astype(np.float32)
    rows = noise[low] * (1 - part) + noise[(low + 1) % cells] * part
    part = part.transpose(1, 0, 2)
    return rows[:, low] * (1 - part) + rows[:, (low + 1) % cells] * part


def render(scene: Scene) -> np.ndarray:
    """Frames of a scene, (FRAMES, CANVAS, CANVAS, 3) uint8."""
    ground = _texture(scene.texture).copy()
    _paste(ground, scene.still_shape, scene.still_colour, scene.still_diameter, scene.still_centre)
    frames = np.repeat(ground[None], FRAMES, axis=0)
    dy, dx = STEP.get(scene.change, (0, 0))
    first, last = scene.diameters
    for t, frame in enumerate(frames):
        # Integer arithmetic, symmetric in time: a twin's frame t is bit for bit its sister's frame 15 - t.
        diameter = (first * (FRAMES - 1 - t) + last * t) // (FRAMES - 1)
        centre = (scene.centre[0] + dy * scene.speed * t, scene.centre[1] + dx * scene.speed * t)
        _paste(frame, scene.shape, scene.colour, diameter, centre)
    return frames


def _paste(frame: np.ndarray, shape: str, colour: str, diameter: int, centre: tuple[int, int]) -> None:
    rows = np.arange(centre[0] - diameter // 2, centre[0] - diameter // 2 + diameter) % CANVAS
    columns = np.arange(centre[1] - diameter // 2, centre[1] - diameter // 2 + diameter) % CANVAS
    at = np.ix_(rows, columns)
    under = frame[at].astype(np.float32)
    frame[at] = under + (np.asarray(COLOURS[colour], np.float32) - under) * _sprite(shape, diameter)


def encode(frames: np.ndarray) -> bytes:
    """VP9 in WebM of (F, H, W, 3) uint8, 8 frames a second."""
    file = io.BytesIO()
    # bitexact: the same frames give the same bytes; a track's number would be drawn at random
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(RATE))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "deadline": "realtime", "cpu-used": "8", "threads": "1",  # speed
            "crf": "24", "b": "0", "qmin": "24", "qmax": "24",  # constant quality
            # Every frame a key frame. With one key frame a clip, its traces in the others told twins apart without
            # their order: 95 % for a linear classifier of frames sorted by the size of the object.
            "g": "1", "lag-in-frames": "0",
        }  # fmt: skip
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def cache_folder() -> Path:
    """Where built data lives: $SMAUG_CACHE, else ~/.cache/smaug."""
    return Path(os.environ.get("SMAUG_CACHE") or Path.home() / ".cache" / "smaug")


Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, out of how much


def build(clips: tuple[int, int, int], report: Report = lambda what, done, total: None) -> Path:
    """The folder with the encoded clips and `{split}.jsonl`; renders and encodes them if they are not there yet.

    Renaming the finished folder is the last act, so a build that was killed leaves nothing that a later run trusts.
    """
    if min(clips) < 2 or clips[1] % 2 or clips[2] % 2:
        raise ValueError(f"shapes needs at least 2 clips a split, and even numbers of val and test clips; not {clips}")
    folder = cache_folder() / f"shapes-v{VERSION}-{'-'.join(map(str, clips))}"
    if (folder / "checksums.json").exists():
        return folder
    scenes = [(split, i, s) for split, n in zip(SPLITS, clips, strict=True) for i, s in enumerate(draw_split(split, n))]
    with _made_aside(folder) as aside:
        for split in SPLITS:
            (aside / split).mkdir()

        def write(item: tuple[str, int, Scene]) -> tuple[str, int]:
            split, i, scene = item
            name, data = f"{split}/{i:05d}.webm", encode(render(scene))
            (aside / name).write_bytes(data)
            return name, zlib.crc32(data)

        checksums = dict(_in_threads(write, scenes, "encoding the shapes data set", report))
        for split in SPLITS:
            with open(aside / f"{split}.jsonl", "w") as f:
                for _, i, scene in (s for s in scenes if s[0] == split):
                    row = {
                        "video": f"{split}/{i:05d}.webm",
                        "caption": scene.caption,
                        "new_combination": scene.new_combination,
                        **({"twin": i ^ 1} if split != "train" else {}),
                        "scene": asdict(scene),
                    }
                    f.write(json.dumps(row) + "\n")
        (aside / "checksums.json").write_text(json.dumps(checksums))
    return folder


def decoded(folder: Path, split: str, size: int, report: Report = lambda what, done, total: None) -> np.ndarray:
    """Every frame of a split at size x size pixels, a read-only map of (clips, FRAMES, size, size, 3) uint8.

    Decoded once by the normal decoder, checked against its checksum each time it is opened.
    """
    names = [json.loads(line)["video"] for line in (folder / f"{split}.jsonl").open()]
    shape = (len(names), FRAMES, size, size, 3)
    path, sums = folder / f"frames-{size}-{split}.u8", folder / f"frames-{size}-{split}.json"
    if path.exists() and sums.exists() and path.stat().st_size == math.prod(shape):
        frames = np.memmap(path, np.uint8, "r", shape=shape)
        if sums.read_text() == _map_sums(frames):
            return frames
    checksums = json.loads((folder / "checksums.json").read_text())

    def read(i: int) -> None:
        clip = folder / names[i]
        data = clip.read_bytes() if clip.exists() else b""
        if zlib.crc32(data) != checksums[names[i]]:
            raise DamagedError(f"{clip} is damaged; delete {folder} and run again to build it anew")
        read_frames(data, every_frame, size, out=frames[i])

    aside, sums_aside = _aside(path), _aside(sums)
    try:
        with naming(path), open(aside, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, math.prod(shape))  # writing to a map on a full disk is a bus error
        frames = np.memmap(aside, np.uint8, "r+", shape=shape)
        for _ in _in_threads(read, list(range(len(names))), f"decoding the {split} clips", report):
            pass
        frames.flush()
        # The checksum is written first: a map without one is not trusted, nor is one that differs from it.
        with naming(sums):
            sums_aside.write_text(_map_sums(frames))
        os.replace(sums_aside, sums)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        sums_aside.unlink(missing_ok=True)
    return np.memmap(path, np.uint8, "r", shape=shape)


def _map_sums(frames: np.ndarray) -> str:
    return json.dumps({"crc32": zlib.crc32(frames.data), "decoded": DECODED})


def _in_threads(work: Callable[[Any], Any], items: list[Any], what: str, report: Report) -> Iterator[Any]:
    """Results in order. Threads suffice: the codecs release the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done, result in enumerate(pool.map(work, items), start=1):
                report(what, done, len(items))
                yield result
        except BaseException:  # Ctrl-C included: without this the pool would finish thousands of clips first
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk is told by an error that names no file while one is written; a person needs to know which disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end; gone if anything goes wrong."""
    aside = _aside(folder)
    aside.mkdir(parents=True)
    try:
        with naming(folder):
            yield aside
        try:
            os.rename(aside, folder)
        except OSError:  # something has the name already
            if (folder / "checksums.json").exists():  # another process was faster; its folder is as good
                shutil.rmtree(aside)
            elif folder.exists():  # left by a deletion that was interrupted
                shutil.rmtree(folder)
                os.rename(aside, folder)
            else:
                raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(final: Path) -> Path:
    """Where to make what will be renamed to `final`. Removes what processes that were killed left of earlier tries."""
    mine = f".{final.name}.aside-{socket.gethostname()}-"  # the host: a cache folder may be shared by several machines
    for old in final.parent.glob(f"{mine}*"):
        pid = old.name.removeprefix(mine)
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():  # its own: containers reuse their few numbers
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
    return final.with_name(f"{mine}{os.getpid()}")
