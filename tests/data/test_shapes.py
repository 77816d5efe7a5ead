"""The embedded set: captions are true, only order tells twins apart, and no build that was disturbed is trusted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from smaug.data import shapes
from smaug.data.decode import read_frames
from smaug.data.frames import every_frame
from smaug.data.shapes import CANVAS, FRAMES, NEW_COMBINATIONS, REVERSE, STEP, draw_scene, draw_split

TINY = (6, 4, 2)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng, new=i % 5 == 0) for i in range(300)]


@pytest.fixture(scope="module")
def clips():
    """120 clips that grow and their 120 twins, decoded at training size: (240, FRAMES, 64, 64, 3), twins neighbours."""
    rng = np.random.default_rng(1)
    some = (draw_scene(rng, new=False) for _ in range(400))
    growing = [s if s.change == "grows" else s.reversed() for s in some if s.change not in STEP][:120]
    both = [s for scene in growing for s in (scene, scene.reversed())]
    return np.stack([read_frames(shapes.encode(shapes.render(s)), every_frame, 64) for s in both])


def coverage(shape, diameter, centre):
    """(CANVAS, CANVAS) in 0..1: how much of each pixel belongs to the object."""
    frame = np.zeros((CANVAS, CANVAS, 3), np.float32)
    shapes._paste(frame, shape, "white", diameter, centre)
    return frame[..., 0] / shapes.COLOURS["white"][0]


def objects(scene):
    """Coverage of the changing object in each frame, and that of the still one."""
    dy, dx = STEP.get(scene.change, (0, 0))
    first, last = scene.diameters
    changing = [
        coverage(
            scene.shape,
            (first * (FRAMES - 1 - t) + last * t) // (FRAMES - 1),
            (scene.centre[0] + dy * scene.speed * t, scene.centre[1] + dx * scene.speed * t),
        )
        for t in range(FRAMES)
    ]
    return changing, coverage(scene.still_shape, scene.still_diameter, scene.still_centre)


def test_files_are_vp9_in_webm(shapes_cache):
    folder = shapes.build((64, 16, 16))
    for path in [folder / "train/00000.webm", folder / "test/00015.webm"]:
        assert path.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # EBML
        with av.open(str(path)) as container:
            assert "webm" in container.format.name
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.width, stream.height) == ("vp9", 128, 128)
            assert [frame.key_frame for frame in container.decode(stream)] == [True] * 16


def test_what_a_clip_shows_is_what_was_drawn(scenes):
    for scene in scenes[:8]:
        frames = shapes.render(scene)
        decoded = read_frames(shapes.encode(frames), every_frame, CANVAS)
        assert np.abs(decoded.astype(int) - frames).mean() < 4
        changing, still = objects(scene)
        sizes = []
        for frame, one in zip(frames, changing, strict=True):
            for shown, colour in ((one, scene.colour), (still, scene.still_colour)):
                assert np.abs(frame[shown == 1].astype(int) - shapes.COLOURS[colour]).max() <= 1
            sizes.append((one > 0.5).sum())
        if scene.change not in STEP:
            growing = sizes if scene.change == "grows" else sizes[::-1]
            # Every third: the arms of a cross jump by a pixel now and then.
            assert (np.diff(growing[::3]) > 0).all() and growing[-1] > 1.7 * growing[0]


def test_a_move_goes_where_its_caption_says(scenes):
    seen = set()
    for scene in (s for s in scenes if s.change in STEP):
        frames = shapes.render(scene).astype(int)
        masks, _ = objects(scene)
        dy, dx = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[scene.change.split()[1]]
        moved = np.roll(masks[0] == 1, (dy * scene.speed * 3, dx * scene.speed * 3), (0, 1))
        assert np.abs(frames[3][moved] - shapes.COLOURS[scene.colour]).max() <= 1
        seen.add(scene.change)
    assert seen == set(STEP)


def test_draws_are_deterministic():
    for split in shapes.SPLITS:
        assert draw_split(split, 20) == draw_split(split, 20)
    assert draw_split("val", 20) != draw_split("test", 20)
    assert len({s.caption for s in draw_split("train", 64)} & {s.caption for s in draw_split("test", 64)}) < 8
    # What is drawn and written may only change together with VERSION: then renew the number.
    drawn = json.dumps([s.caption for split in shapes.SPLITS for s in draw_split(split, 50)])
    assert (shapes.VERSION, zlib.crc32(drawn.encode())) == (3, 3606130233)


def test_twins_are_the_reverse(scenes):
    for scene in scenes:
        twin = scene.reversed()
        assert twin.change == REVERSE[scene.change] and twin.reversed() == scene
        assert twin.caption == scene.caption.replace(scene.change, twin.change) != scene.caption
        assert twin.new_combination == scene.new_combination
    for scene in scenes[:40]:
        assert (shapes.render(scene.reversed()) == shapes.render(scene)[::-1]).all()
    for split in ("val", "test"):
        drawn = draw_split(split, 40)
        assert all(drawn[i ^ 1] == scene.reversed() for i, scene in enumerate(drawn))


@pytest.mark.parametrize("split", ["val", "test"])
def test_500_held_out_captions_are_unique_and_a_fifth_is_new(split):
    drawn = draw_split(split, 500)
    assert len({s.caption for s in drawn}) == len({s.content for s in drawn}) == 500
    assert sum(s.new_combination for s in drawn) == 100


def test_new_combinations_are_never_in_train():
    train = draw_split("train", 6000)
    shown = {pair for s in train for pair in ((s.colour, s.shape), (s.still_colour, s.still_shape))}
    assert shown.isdisjoint(NEW_COMBINATIONS) and not any(s.new_combination for s in train)
    assert len(shown) + len(NEW_COMBINATIONS) == len(shapes.COLOURS) * len(shapes.SHAPES)
    assert {c for c, _ in shown} == set(shapes.COLOURS) and {s for _, s in shown} == set(shapes.SHAPES)
    changes = Counter(s.change for s in train)
    assert changes["grows"] + changes["shrinks"] > 0.65 * len(train)
    assert set(changes) == set(REVERSE) and all(changes[c] > 0.05 * len(train) for c in REVERSE)
    assert abs(changes["grows"] / changes["shrinks"] - 1) < 0.1
    assert 0.45 < np.mean([s.still_first for s in train]) < 0.55
    assert all(s.colour != s.still_colour for s in train)


def test_each_object_covers_six_patches_and_none_hides_another(scenes):
    for scene in scenes:
        changing, still = objects(scene)
        for one in changing:
            for shown in (one, still):
                patches = (shown > 0.5).reshape(8, 16, 8, 16).any((1, 3))  # 16 canvas pixels: 8 at training size
                assert patches.sum() >= 6, scene
            assert not ((one > 0) & (still > 0)).any(), scene


def test_decoded_twins_hold_the_same_frames_bit_for_bit(clips):
    """So that no model blind to order, however clever, can tell them: not by traces of the codec either."""
    assert (clips[0::2] == clips[1::2, ::-1]).all()
    for scene in [s for s in draw_split("test", 200) if s.change in STEP][:10]:
        one, other = (read_frames(shapes.encode(shapes.render(s)), every_frame, 64) for s in (scene, scene.reversed()))
        assert (one == other[::-1]).all()


@pytest.mark.slow
def test_a_classifier_needs_the_order(clips):
    x = clips.astype(np.float32)
    colours = np.array(list(shapes.COLOURS.values()), np.float32)
    areas = np.stack([((x - c) ** 2).sum(-1) < 2500 for c in colours], -1).sum((2, 3))  # (240, FRAMES, 6)
    # Traces of the codec: how smooth a frame is, in the order of the object's size.
    rough = np.stack([np.abs(np.diff(x, axis=a)).mean((2, 3, 4)) for a in (2, 3)], -1)
    by_size = np.lexsort((x.mean((2, 3, 4)), areas.sum(-1)))
    blind = [x.mean((1, 2, 3)), x.var((1, 2, 3)), np.sort(areas, 1), np.take_along_axis(rough, by_size[..., None], 1)]
    label = np.tile([1.0, -1.0], 120)

    def accuracy(parts, train=160):
        features = np.concatenate([p.reshape(len(p), -1).astype(np.float64) for p in parts], 1)
        features = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-9)
        gram = features[:train].T @ features[:train] + 0.1 * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, features[:train].T @ label[:train])
        return np.mean(np.sign(features[train:] @ weights) == label[train:])

    assert abs(accuracy(blind) - 0.5) < 3 * 0.5 / 80**0.5
    assert accuracy([areas]) > 0.95


def run(code: str, cache: Path, **kw) -> subprocess.Popen:
    head = "import os, zlib\nfrom smaug.data import shapes\nstop = lambda *a: os.kill(os.getpid(), 9)\n"
    kw = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kw}
    return subprocess.Popen([sys.executable, "-c", head + code], env={**os.environ, "SMAUG_CACHE": str(cache)}, **kw)


def content(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): zlib.crc32(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMAUG_CACHE", str(tmp_path_factory.mktemp("undisturbed")))
        folder = shapes.build(TINY)
        shapes.decoded(folder, "train", 32)
        return folder


MOMENTS = {
    "first clip": "shapes.build({clips}, lambda what, done, total: done == 1 and stop())",
    "last clip": "shapes.build({clips}, lambda what, done, total: done == total and stop())",
    "before the checksums": "shapes.json.dumps = stop\nshapes.build({clips})",
    "before the name": "shapes.os.rename = stop\nshapes.build({clips})",
    "while decoding": """
shapes.decoded(shapes.build({clips}), 'train', 32, lambda what, done, total: done == 3 and stop())""",
    "before the map's name": "shapes.os.replace = stop\nshapes.decoded(shapes.build({clips}), 'train', 32)",
    "between the map's names": """
replace = os.replace
shapes.os.replace = lambda a, b: stop() if str(b).endswith('.u8') else replace(a, b)
shapes.decoded(shapes.build({clips}), 'train', 32)""",
}


@pytest.mark.parametrize(
    "moment",
    [moment if moment.startswith("before") else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS],
)
def test_a_killed_build_leaves_nothing_that_is_trusted(moment, tmp_path, monkeypatch, undisturbed):
    process = run(MOMENTS[moment].replace("{clips}", str(TINY)), tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))
    final = tmp_path / undisturbed.name
    encoded = {k: v for k, v in content(undisturbed).items() if not k.startswith("frames-")}
    if "map" in moment or moment == "while decoding":
        assert encoded.items() <= content(final).items() and not (final / "frames-32-train.u8").exists()
    else:
        assert not final.exists()
    assert list(tmp_path.rglob(".*aside*"))  # what it left ...
    folder = shapes.build(TINY)
    frames = shapes.decoded(folder, "train", 32)
    assert folder == final and content(folder) == content(undisturbed)
    assert (frames == np.stack([read_frames(folder / f"train/{i:05d}.webm", every_frame, 32) for i in range(6)])).all()
    assert not list(tmp_path.rglob(".*aside*"))  # ... is gone


def test_a_failed_build_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))

    def full(frames):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shapes, "encode", full)
        shapes.build(TINY)
    assert list(tmp_path.iterdir()) == []
    folder = shapes.build(TINY)
    before = content(folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shapes.os, "posix_fallocate", lambda *a: full(None))
        shapes.decoded(folder, "val", 32)
    assert content(folder) == before


def test_asides_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f".shapes-v{shapes.VERSION}-6-4-2.aside"
    here = socket.gethostname()
    # Its own number too: in containers every process has the same few numbers.
    gone = [tmp_path / f"{name}-{here}-{dead.pid}", tmp_path / f"{name}-{here}-{os.getpid()}"]
    stay = [tmp_path / f"{name}-{here}-1", tmp_path / f"{name}-another-host-{dead.pid}"]
    for folder in gone + stay:
        (folder / "train").mkdir(parents=True)
    shapes.build(TINY)
    assert not any(p.exists() for p in gone) and all(p.exists() for p in stay)


def test_a_half_deleted_folder_is_built_anew(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))
    (tmp_path / undisturbed.name / "train").mkdir(parents=True)
    (tmp_path / undisturbed.name / "train/00003.webm").write_bytes(b"x")
    encoded = {k: v for k, v in content(undisturbed).items() if not k.startswith("frames-")}
    assert content(shapes.build(TINY)) == encoded


@pytest.mark.slow
def test_two_builds_at_once_both_succeed(tmp_path, undisturbed):
    code = f"f = shapes.decoded(shapes.build({TINY}), 'train', 32)\nprint(zlib.crc32(f.data))"
    pair = [run(code, tmp_path) for _ in range(2)]
    said = [(p.communicate(timeout=60), p.returncode) for p in pair]
    assert [code for _, code in said] == [0, 0], said
    assert said[0][0][0] == said[1][0][0]
    assert content(tmp_path / undisturbed.name) == content(undisturbed)
    assert not list(tmp_path.rglob(".*aside*"))


def test_whoever_is_second_takes_the_first_one_s(tmp_path, monkeypatch, undisturbed):
    """The same race, made certain: the other finishes between our last clip and our renaming."""
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))

    def other(what, done, total):
        if done == total:
            shutil.copytree(undisturbed, tmp_path / undisturbed.name)

    folder = shapes.build(TINY, other)
    assert content(folder) == content(undisturbed) and [p.name for p in tmp_path.iterdir()] == [folder.name]
    with ThreadPoolExecutor(1) as pool:  # and one who decodes while another does
        monkeypatch.setattr(shapes, "_aside", lambda final: final.with_name(f".{final.name}.mine"))
        again = pool.submit(shapes.decoded, folder, "val", 32).result()
    assert (again == shapes.decoded(folder, "val", 32)).all()


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


@pytest.mark.parametrize("damage", ["flip", "truncate", "gone"])
def test_a_damaged_clip_is_named(damage, tmp_path, undisturbed):
    folder = copy(undisturbed, tmp_path)
    clip = folder / "val/00002.webm"
    data = bytearray(clip.read_bytes())
    data[len(data) // 2] ^= 1
    clip.write_bytes(data if damage == "flip" else data[:-50])
    if damage == "gone":
        clip.unlink()
    with pytest.raises(RuntimeError, match=r"val/00002\.webm is damaged; delete .* and run again") as error:
        shapes.decoded(folder, "val", 32)
    assert str(folder) in str(error.value)
    assert not list(folder.glob("*val*.u8")) and not list(folder.glob(".*"))
    shapes.decoded(folder, "train", 32)  # the others are as good as before


@pytest.mark.parametrize("damage", ["flip", "truncate", "longer", "no sum", "empty sum", "other sum"])
def test_a_damaged_map_is_made_anew(damage, tmp_path, undisturbed):
    folder = copy(undisturbed, tmp_path)
    path, sums = folder / "frames-32-train.u8", folder / "frames-32-train.json"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage in ("truncate", "longer"):
        path.write_bytes(data[:-4096] if damage == "truncate" else data + b"\0")
    elif damage == "no sum":
        sums.unlink()
    else:
        sums.write_text("" if damage == "empty sum" else '{"crc32": 5}')
    made = []
    frames = shapes.decoded(folder, "train", 32, lambda what, done, total: made.append(done))
    assert made == [1, 2, 3, 4, 5, 6] and frames.tobytes() == data
    assert content(folder) == content(undisturbed)
    made.clear()
    shapes.decoded(folder, "train", 32, lambda what, done, total: made.append(done))
    assert made == []
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 0


def test_rows_say_what_is_in_the_files(shapes_cache):
    folder = shapes.build((64, 16, 16))
    for split, n in zip(shapes.SPLITS, (64, 16, 16), strict=True):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
        drawn = draw_split(split, n)
        assert [r["caption"] for r in rows] == [s.caption for s in drawn]
        assert [r["new_combination"] for r in rows] == [s.new_combination for s in drawn]
        assert [r["video"] for r in rows] == [f"{split}/{i:05d}.webm" for i in range(n)]
        assert [r.get("twin") for r in rows] == [None if split == "train" else i ^ 1 for i in range(n)]
        assert (folder / rows[5]["video"]).read_bytes() == shapes.encode(shapes.render(drawn[5]))


@pytest.mark.parametrize("clips", [(64, 15, 16), (64, 16, 3), (1, 2, 2), (64, 0, 2), (64, 2, -2)])
def test_odd_numbers_of_clips_are_refused(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="even numbers of val and test clips; not"):
        shapes.build(clips)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SMAUG_CACHE", str(tmp_path / "a"))
    assert shapes.cache_folder() == tmp_path / "a"
    monkeypatch.setenv("SMAUG_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shapes.cache_folder() == tmp_path / ".cache/smaug"
