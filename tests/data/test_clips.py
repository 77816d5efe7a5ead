"""Sets of clips: the embedded one, mapped or live, and one's own, with what is wrong about them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from smaug.data import shapes
from smaug.data.clips import DataConfig, check_share, open_manifest, open_shapes
from smaug.data.decode import DecodeError, middle_segments
from smaug.data.manifest import ManifestError, Skip

SMALL = DataConfig(shapes=(64, 16, 16))


def quiet(what, done, total):
    pass


def test_the_map_and_live_decoding_give_the_same(shapes_cache):
    mapped = open_shapes("test", SMALL, 64, quiet)
    live = open_shapes("test", DataConfig(shapes=SMALL.shapes, cache=False), 64, quiet)
    assert mapped.frames is not None and live.frames is None and len(mapped) == len(live) == 16
    assert mapped.samples == live.samples and mapped.name == "shapes test"
    for number in (0, 1, 15):
        for pick in (lambda n: middle_segments(n, 4), lambda n: [3, 3, 0], range):
            got = mapped.read(number, pick)
            assert got.dtype == np.uint8 and got.shape[1:] == (64, 64, 3)
            assert (got == live.read(number, pick)).all()
    assert (mapped.read(0, range) == mapped.read(1, range)[::-1]).all()  # twins


def test_subsets_are_those_of_the_drawn_scenes(shapes_cache):
    drawn = shapes.draw_split("test", 16)
    clips = open_shapes("test", SMALL, 64, quiet)
    assert [s.captions for s in clips.samples] == [(s.caption,) for s in drawn]
    assert clips.subsets["new_combinations"].tolist() == [s.new_combination for s in drawn]
    assert 0 < clips.subsets["new_combinations"].sum() < 16
    assert open_shapes("train", SMALL, 64, quiet).subsets == {}


def test_a_manifest_of_videos_and_images(tmp_path, shapes_cache):
    shutil.copy(shapes.build(SMALL.shapes) / "train/00000.webm", tmp_path / "a.webm")
    Image.new("RGB", (90, 60), (200, 10, 10)).save(tmp_path / "b.png")
    (tmp_path / "empty.webm").touch()
    rows = "video,image,caption\na.webm,,one\n,b.png,red\na.webm,,two\nempty.webm,,x\n,,y\n"
    (tmp_path / "m.csv").write_text(rows)
    clips = open_manifest([tmp_path / "m.csv"], DataConfig(max_bad=0.5), 32)
    assert [(s.name, s.kind, s.captions) for s in clips.samples] == [
        ("a.webm", "video", ("one", "two")),
        ("b.png", "image", ("red",)),
    ]
    assert clips.skipped == [Skip("m.csv:6", "no file name"), Skip("empty.webm", "0 bytes")]
    assert clips.name == "m.csv" and clips.subsets == {}
    assert clips.read(0, lambda n: [n - 1, 0]).shape == (2, 32, 32, 3)
    assert clips.read(1, lambda n: [0, 0, 0]).shape == (1, 32, 32, 3)
    (tmp_path / "a.webm").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match="not a media file"):
        clips.read(0, range)
    with pytest.raises(ManifestError, match=r"1 of 3 files cannot be used, .* the 10% .* empty\.webm: 0 bytes"):
        open_manifest([tmp_path / "m.csv"], DataConfig(max_bad=0.1), 32)


def test_the_share_of_bad_files():
    bad = [Skip(f"{i}.mp4", "0 bytes") for i in range(5)]
    check_share(bad, 100, 0.05)
    check_share([], 0, 0.0)
    with pytest.raises(ManifestError) as error:
        check_share(bad, 99, 0.05)
    assert "5 of 99 files" in str(error.value) and "--data.max-bad" in str(error.value)
    assert "2.mp4: 0 bytes" in str(error.value) and "3.mp4" not in str(error.value)
