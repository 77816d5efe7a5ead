"""Sets of clips: the embedded one, mapped or live, and one's own, with what is wrong about them."""

import math
import shutil

import pytest
import torch
from PIL import Image

from smaug.data import shapes
from smaug.data.clips import DataConfig, check_share, open_manifest, open_shapes
from smaug.data.frames import FrameSampler, every_frame, middle_segments
from smaug.data.manifest import ManifestError, Skip

SMALL = DataConfig(shapes=(64, 16, 16))


def quiet(what, done, total):
    pass


def test_the_map_and_live_decoding_give_the_same(shapes_cache):
    mapped = open_shapes("test", SMALL, 64, quiet)
    live = open_shapes("test", DataConfig(shapes=SMALL.shapes, cache=False), 64, quiet)
    assert mapped.frames is not None and live.frames is None and len(mapped) == len(live) == 16
    assert mapped.samples == live.samples and mapped.name == "shapes test"
    numbers = (0, 1, 15)
    for pick in (lambda times: middle_segments(len(times), 4), lambda times: [3, 3, 0], every_frame):
        views = [(pick, None, False)] * 3
        for one, other in zip(mapped.read(numbers, views), live.read(numbers, views), strict=True):
            assert one.frames.dtype == torch.uint8 and one.frames.shape[1:] == (64, 64, 3)
            assert torch.equal(one.frames, other.frames)
            assert (one.decoder, other.decoder) == ("map", "pyav")
    twins = mapped.read((0, 1), views[:2])
    assert torch.equal(twins[0].frames, twins[1].frames.flip(0))


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
    video, image = clips.read((0, 1), [(lambda times: [len(times) - 1, 0], None, False)] * 2)
    assert video.frames.shape == (2, 32, 32, 3) and image.frames.shape == (1, 32, 32, 3)
    (tmp_path / "a.webm").write_bytes(b"nothing")
    (bad,) = clips.read((0,), [(every_frame, None, False)])
    assert (bad.frames, bad.reason, bad.decoder) == (None, "not a media file", "pyav")
    with pytest.raises(ManifestError, match=r"2 of 4 files cannot be used, .* the 10% .* empty\.webm: 0 bytes"):
        open_manifest([tmp_path / "m.csv"], DataConfig(max_bad=0.1), 32)


def test_the_share_of_bad_files():
    bad = [Skip(f"{i}.mp4", "0 bytes") for i in range(5)]
    check_share(bad, 100, 0.05)
    check_share([], 0, 0.0)
    with pytest.raises(ManifestError) as error:
        check_share(bad, 99, 0.05)
    assert "5 of 99 files" in str(error.value) and "--data.max-bad" in str(error.value)
    assert "2.mp4: 0 bytes" in str(error.value) and "3.mp4" not in str(error.value)
    assert "--data.decoder" not in str(error.value)
    with pytest.raises(ManifestError, match=r"dali does not read all kinds: try --data\.decoder auto"):
        check_share(bad, 5, 0.05, "dali")
    for decoder in ("auto", "pyav", "dali, else pyav", "dali", "torchcodec"):
        with pytest.raises(ManifestError) as error:
            check_share(bad, 99, 0.05, decoder)
        assert ("try --data.decoder auto" in str(error.value)) == (decoder in ("dali", "torchcodec"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0}, {"workers": -1}, {"clip_seconds": 0.0}, {"clip_seconds": math.nan}, {"max_bad": -1.0},
        {"max_bad": 5.0}, {"crop": (0.0, 0.0)}, {"crop": (1.0, 0.5)}, {"crop": (0.5, 3.0)}, {"format": "msrvtt"},
    ],
)  # fmt: skip
def test_fields_out_of_range_are_refused_before_a_run_begins(wrong):
    with pytest.raises(ValueError, match=f"--data.{next(iter(wrong)).replace('_', '-')}"):
        DataConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"stride": -1}, {"clips": 0}, {"share": 0.0}, {"share": 3.0}])
def test_a_sampler_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=f"--data.sampler.{next(iter(wrong))}"):
        FrameSampler(**wrong)
