"""The picture of a clip: its numbers are those of the model, and what is not as asked is told in a sentence."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from smaug import ops, train, visualise
from smaug.data.loader import middle_frames
from smaug.evaluate.retrieval import retrieval
from smaug.model.video_encoder import PruneConfig, VideoEncoder, VideoEncoderConfig
from smaug.objectives.seen import Removed, Seen
from smaug.run import load_run, open_split

# Two pruning blocks, four moments of two frames: the smallest model to which everything happens.
SMALL = [
    "--model.video.width=32", "--model.video.depth=3", "--model.video.heads=2", "--model.video.frames=8",
    "--model.video.tubelet=2", "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--data.batch=16", "--data.shapes", "64", "16", "16", "--optim.steps=4",
]  # fmt: skip
MORE = [
    "--model.fusion.heads=2", "--model.selector.keep=3", "--model.video.prune.blocks", "0", "2",
    "--video-mask.ratio=0.6",
]  # fmt: skip
CLIP = 5


@pytest.fixture(scope="module")
def folders(shapes_cache, tmp_path_factory):
    """Runs of four steps: one whose recipe does all there is to see, and one that only masks."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, more in {"whole": ["smaug", *SMALL, *MORE], "masked": ["mac", *SMALL]}.items():
            patch.setattr(sys, "argv", ["smaug", *more, "--run-dir", str(folder / name)])
            assert train.main() == 0
    return folder


@pytest.fixture(scope="module")
def run(folders):
    loaded = load_run(folders / "whole", "cpu")
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module")
def clips(run):
    return open_split(run.recipe, "test", Console(quiet=True))


@pytest.fixture(scope="module")
def seen(run, clips):
    """`look` at a clip: what it returns, and what the encoder and the decoder meanwhile were given and returned."""
    calls = {"video": [], "mvm": []}
    hooks = [
        part.register_forward_hook(lambda _, given, got, name=name: calls[name].append((given, got)))
        for name, part in (("video", run.model.video), ("mvm", run.model.heads["mvm"]))
    ]
    (group,), _ = middle_frames(clips, [CLIP], 8, view=2)
    words = visualise.pack_caption(run.tokenizer, clips.samples[CLIP].captions[0], run.model)
    shown = visualise.look(run.model, run.recipe, group, words)
    for hook in hooks:
        hook.remove()
    return shown, calls, group


def test_a_picture_is_written(folders, call, clips):
    caption = clips.samples[CLIP].captions[0]
    code, out, err = call(visualise.main, folders / "whole", "--clip", CLIP, "--out", "clip.png")
    assert code == 0 and not err
    assert out.splitlines()[-1] == f'wrote      clip.png: clip {CLIP} of shapes test, "{caption}"'
    with Image.open("clip.png") as picture:
        assert picture.format == "PNG"
        # six rows (two blocks prune) and four columns of cells of 256 pixels, and little else
        assert 4 * 256 < picture.width < 4 * 256 + 400 and 6 * 256 < picture.height < 6 * 256 + 250
        colours = picture.convert("RGB").getcolors(1 << 22)
    assert len(colours) > 1000
    # another text may select other moments, and is no formula
    assert (
        call(visualise.main, folders / "whole", "--clip", CLIP, "--out", "other.png", "--text", "costs $_{ or \\frac$")[
            0
        ]
        == 0
    )
    assert Path("other.png").read_bytes() != Path("clip.png").read_bytes()


def test_rows_that_a_recipe_does_not_have_are_left_out(folders, call):
    assert call(visualise.main, folders / "masked", "--clip", 0, "--out", "clip.png", "--split", "val")[0] == 0
    with Image.open("clip.png") as picture:
        assert 2 * 256 < picture.height < 2 * 256 + 250
    run = load_run(folders / "masked", "cpu")
    (group,), _ = middle_frames(open_split(run.recipe, "val", Console(quiet=True)), [0], 8)
    shown = visualise.look(run.model, run.recipe, group, visualise.pack_caption(run.tokenizer, "a ring", run.model))
    assert shown.visible.sum() == run.recipe.video_mask.keep(4, 64) and shown.kept == {}
    assert shown.selected is None and shown.scores is None and shown.rebuilt is None
    assert shown.times.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_frames_are_those_of_the_encoder(seen, clips):
    shown, _, group = seen
    assert np.array_equal(shown.frames, group.video[0].numpy())
    (in_time,) = clips.read([CLIP], [(lambda times: range(0, 16, 2), None, False)])
    for moment, places in enumerate(shown.times):
        assert places.tolist() == [moment, moment + 4]  # recipe smaug spreads a tube over the clip
        assert np.array_equal(shown.frames[2 * moment : 2 * moment + 2], in_time.frames[places])


def test_visible_patches_are_those_of_training(seen, run):
    shown, calls, group = seen
    keep = run.recipe.video_mask.keep(4, 64)
    assert shown.visible.shape == (4, 8, 8) and shown.visible.sum() == keep == 4 * 25
    drawn, _ = run.recipe.video_mask.draw(group.samples, (4, 8, 8), seed=run.recipe.seed, epoch=0, impl="auto")
    assert np.flatnonzero(shown.visible).tolist() == drawn[0].tolist()
    whole, masked = (groups[0][1] for (groups,), _ in calls["video"])
    assert whole.shape == (1, 256) and torch.equal(masked, drawn)  # the rebuilding saw no others


def evaluated(run, clips):
    """What encoder and selector return when retrieval evaluates this clip alone."""
    found = {}
    hooks = [
        part.register_forward_hook(lambda _, given, got, name=name: found.update({name: got}))
        for name, part in (("video", run.model.video), ("selector", run.model.selector))
    ]
    frames = clips.frames[CLIP : CLIP + 1]
    alone = replace(clips, samples=[clips.samples[CLIP]], frames=frames, subsets={})
    retrieval(run.model, alone, run.tokenizer, frames=8, max_bad=0.0)
    for hook in hooks:
        hook.remove()
    return found["video"], found["selector"][0]


def test_pruning_and_selection_are_those_of_evaluation(seen, run, clips):
    shown, _, _ = seen
    video, selected = evaluated(run, clips)
    prune = run.recipe.model.video.prune
    first, second = prune.count(64, prune.keep), prune.count(prune.count(64, prune.keep), prune.keep)
    assert list(shown.kept) == [0, 2] and 64 > first > second
    assert (shown.kept[0].sum((1, 2)) == first).all() and (shown.kept[2].sum((1, 2)) == second).all()
    assert not (shown.kept[2] & ~shown.kept[0]).any()
    assert np.flatnonzero(shown.kept[2]).tolist() == video.stayed[1].flatten().tolist()
    assert np.flatnonzero(~shown.kept[0]).tolist() == sorted(video.left[0][1].flatten().tolist())

    assert shown.selected.sum() == run.recipe.model.selector.keep == 3
    assert np.flatnonzero(shown.selected).tolist() == selected[0].tolist()
    best = np.sort(shown.scores)[-3]
    assert np.array_equal(shown.selected, shown.scores >= best) and (np.abs(shown.scores) <= 1).all()


def test_rebuilt_shows_the_decoder(seen, run):
    shown, calls, group = seen
    ((_, asked), pred), (_, encoded) = calls["mvm"][0], calls["video"][1]
    removed = torch.from_numpy(np.flatnonzero(~shown.visible)).int()[None]
    assert torch.equal(asked.view(1, -1), removed)  # all of them, not the share of a training step

    pixels = shown.visible.repeat(2, axis=0).repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(shown.rebuilt[pixels], shown.frames[pixels])
    assert (shown.rebuilt[~pixels] != shown.frames[~pixels]).mean() > 0.5

    # the same prediction as the objective's, which knows the order of patches and pixels
    objective = run.recipe.objectives["mvm"]
    everything = replace(objective, decoder=replace(objective.decoder, share=1.0))
    parts = [Removed(group.video, group.samples, removed, 4)]
    with torch.no_grad():
        loss = everything(run.model.heads["mvm"], Seen(encoded, None, None, parts, 0, 0))
    flat = pred.flatten(0, 1)
    torch.testing.assert_close(ops.pixel_loss(flat[None], group.video, removed, patch=(2, 8, 8)), loss)
    again = visualise.paste(group.video[0], removed[0], flat, (2, 8, 8))
    assert np.array_equal(again.numpy(), shown.rebuilt)


@pytest.mark.parametrize("tube", [(1, 4, 4), (2, 4, 4), (4, 2, 2)])
def test_a_perfect_prediction_gives_the_video_back(tube):
    video = torch.randint(0, 256, (4, 8, 12, 3), dtype=torch.uint8)
    t, p, _ = tube
    patches = torch.stack([
        video[f : f + t, y : y + p, x : x + p].permute(3, 0, 1, 2).reshape(-1)  # channel, frame, row, column
        for f in range(0, 4, t) for y in range(0, 8, p) for x in range(0, 12, p)
    ]).double() / 255  # fmt: skip
    target = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + 1e-6).sqrt()
    ids = torch.arange(1, len(target), 3, dtype=torch.int32)
    pred = target[ids.long()].float()
    assert ops.pixel_loss(pred[None], video[None], ids[None], patch=tube) < 1e-9
    assert torch.equal(visualise.paste(video, ids, pred, tube), video)
    wrong = visualise.paste(video, ids, pred.roll(1, 0), tube) != video
    changed = wrong.view(4 // t, t, 8 // p, p, 12 // p, p, 3).permute(0, 2, 4, 1, 3, 5, 6).flatten(3).any(-1)
    assert changed.flatten().nonzero().flatten().tolist() == ids.tolist()


def test_an_image_is_a_clip_of_one_moment(run):
    """Its one frame is rebuilt from the mean over the tube, and there is nothing to select from."""
    picture = torch.randint(0, 256, (1, 1, 64, 64, 3), dtype=torch.uint8)
    group = visualise.VisualGroup(picture, torch.tensor([3]))
    shown = visualise.look(run.model, run.recipe, group, visualise.pack_caption(run.tokenizer, "a ring", run.model))
    assert shown.times.tolist() == [[0]] and shown.visible.shape == (1, 8, 8) and shown.visible.sum() == 25
    assert [math.prod(there.shape) for there in shown.kept.values()] == [64, 64]
    assert shown.selected is None and shown.rebuilt.shape == (1, 64, 64, 3)
    pixels = shown.visible.repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(shown.rebuilt[pixels], shown.frames[pixels])


def test_more_moments_than_the_decoder_has_places_for(run, clips):
    (group,), _ = middle_frames(clips, [CLIP], 16, view=2)
    shown = visualise.look(run.model, run.recipe, group, visualise.pack_caption(run.tokenizer, "a ring", run.model))
    assert shown.visible.sum() == 8 * 25 and shown.selected.sum() == 3 and shown.rebuilt is None


@pytest.mark.parametrize(
    ("attend", "rate", "counts"),  # of patches after blocks 0 and 2, rounded up
    [
        ("clip", 0.59, [10, 6]),  # of all 16
        ("frame", 0.59, [4 * 3, 4 * 2]),  # of 4 at each moment
        ("frame", 0.7, [4 * 3, 4 * 3]),  # 2.1 of 3 is 3: nothing leaves any more
        ("frame", 0.9, [16, 16]),
    ],
)
def test_pruning_of_whole_clips_and_of_moments(attend, rate, counts):
    """Blocks are named in any order, and one that the encoder does not have."""
    prune = PruneConfig(blocks=(2, 9, 0), keep=rate)
    config = VideoEncoderConfig(width=32, heads=2, image_size=16, tubelet=1, attend=attend, prune=prune)
    ids = torch.arange(4 * 4, dtype=torch.int32)[None]
    whole = VideoEncoder(config)([(torch.randint(0, 256, (1, 4, 16, 16, 3), dtype=torch.uint8), ids)])
    kept = visualise.after_pruning(config, whole, 4)
    assert {block: there.sum() for block, there in kept.items()} == dict(zip((0, 2), counts, strict=True))
    assert np.flatnonzero(kept[2]).tolist() == sorted(whole.stayed[1].flatten().tolist())


def test_grey_lies_over_what_is_not_there():
    images = np.full((2, 4, 4, 3), 10, dtype=np.uint8)
    there = np.array([[[True, False], [True, True]], [[False, False], [False, True]]])
    grey = visualise.greyed(images, there, 1.0)[..., 0]
    assert (grey[0, :2, 2:] == 190).all() and (grey == 190).sum() == 4 * 4 and (grey == 10).sum() == 4 * 4
    assert visualise.greyed(images, there[:, :1, :1], 0.5)[1].tolist() == np.full((4, 4, 3), 100).tolist()


def test_what_cannot_be_drawn_is_told_in_a_sentence(folders, call, tmp_path, monkeypatch):
    def refused(folder, *arguments):
        code, _, err = call(visualise.main, folder, *arguments)
        assert code == 1 and err.startswith("smaug: ") and err.count("\n") == 1, err
        assert not list(tmp_path.rglob("*.png"))
        return err

    whole, out = folders / "whole", ["--out", "clip.png"]
    assert "holds no run" in refused(tmp_path / "nothing", "--clip", 0, *out)
    assert "shapes test has the clips 0 to 15" in refused(whole, "--clip", 16, *out)
    assert "--clip -1" in refused(whole, "--clip", -1, *out)
    assert "there is no folder gone" in refused(whole, "--clip", 0, "--out", "gone/clip.png")
    assert "must end in .png" in refused(whole, "--clip", 0, "--out", "clip.jpg")
    assert "uses all moments" in refused(folders / "masked", "--clip", 0, *out, "--text", "a ring")
    code, _, err = call(visualise.main, whole, *out)
    assert code == 2 and "--clip" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -c constraints.txt -e '.[plots]'" in refused(whole, "--clip", 0, *out)
