"""What is shown of a clip is what the model does with it, in training and in evaluation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from smaug import ops
from smaug.data.loader import VisualGroup, middle_frames
from smaug.evaluate.retrieval import retrieval
from smaug.model.video_encoder import PruneConfig, VideoEncoder, VideoEncoderConfig
from smaug.objectives.seen import Removed, Seen
from smaug.run import load_run, open_split
from smaug.visualise.look import after_pruning, look, paste

CLIP = 5


@pytest.fixture(scope="module")
def seen(run, clips):
    """`look` at a clip: what it returns, and what the encoder and the decoder meanwhile were given and returned."""
    calls = {"video": [], "mvm": []}
    hooks = [
        part.register_forward_hook(lambda _, given, got, name=name: calls[name].append((given, got)))
        for name, part in (("video", run.model.video), ("mvm", run.model.heads["mvm"]))
    ]
    (group,), _ = middle_frames(clips, [CLIP], 8, view=2)
    shown = look(run, group, clips.samples[CLIP].captions[0])
    for hook in hooks:
        hook.remove()
    return shown, calls, group


def test_what_a_recipe_does_not_do_is_left_out_and_said(folders, seen):
    assert seen[0].absent == ()
    run = load_run(folders / "masked", "cpu")
    (group,), _ = middle_frames(open_split(run.recipe, "val", Console(quiet=True)), [0], 8)
    shown = look(run, group, "a ring")
    assert shown.visible.sum() == run.recipe.video_mask.keep(4, 64) and shown.kept == {}
    assert shown.selected is None and shown.scores is None and shown.rebuilt is None and shown.error is None
    assert shown.attention is None
    rebuilt, pruned, words = shown.absent
    assert "without the mvm objective" in rebuilt and "Nothing is pruned" in pruned
    assert "recipe mac has no fusion encoder" in words
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
    ((_, asked, _), pred), (_, encoded) = calls["mvm"][0], calls["video"][1]
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
    assert shown.error == pytest.approx(loss.item(), rel=1e-5)
    again = paste(group.video[0], removed[0], flat, (2, 8, 8))
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
    assert torch.equal(paste(video, ids, pred, tube), video)
    wrong = paste(video, ids, pred.roll(1, 0), tube) != video
    changed = wrong.view(4 // t, t, 8 // p, p, 12 // p, p, 3).permute(0, 2, 4, 1, 3, 5, 6).flatten(3).any(-1)
    assert changed.flatten().nonzero().flatten().tolist() == ids.tolist()


def test_an_image_is_a_clip_of_one_moment(run):
    """Its one frame is rebuilt from the mean over the tube, and there is nothing to select from."""
    picture = torch.randint(0, 256, (1, 1, 64, 64, 3), dtype=torch.uint8)
    group = VisualGroup(picture, torch.tensor([3]))
    shown = look(run, group, "a ring")
    assert shown.times.tolist() == [[0]] and shown.visible.shape == (1, 8, 8) and shown.visible.sum() == 25
    assert [math.prod(there.shape) for there in shown.kept.values()] == [64, 64]
    assert shown.selected is None and shown.rebuilt.shape == (1, 64, 64, 3)
    assert shown.absent == ("No moments are selected: the text is fused with all of them.",)
    pixels = shown.visible.repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(shown.rebuilt[pixels], shown.frames[pixels])


def test_more_moments_than_the_decoder_has_places_for(run, clips):
    (group,), _ = middle_frames(clips, [CLIP], 16, view=2)
    shown = look(run, group, "a ring")
    assert shown.visible.sum() == 8 * 25 and shown.selected.sum() == 3 and shown.rebuilt is None
    assert shown.absent == ("Nothing is rebuilt: the decoder has places for fewer moments than the clip has here.",)


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
    kept = after_pruning(config, whole, 4)
    assert {block: there.sum() for block, there in kept.items()} == dict(zip((0, 2), counts, strict=True))
    assert np.flatnonzero(kept[2]).tolist() == sorted(whole.stayed[1].flatten().tolist())
