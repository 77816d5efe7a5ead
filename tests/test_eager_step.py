"""The step in eager PyTorch (benchmarks/eager_step.py) is the same step; so its cost can be held against ours."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from smaug.data.text import train_tokenizer
from smaug.masks import PAIR_STREAM, noise
from smaug.objectives.mvm import Mvm
from smaug.objectives.seen import Removed
from smaug.recipe import load
from smaug.run import build, open_loader, open_split
from smaug.step import text_views, training_step, video_mask
from smaug.testing import relative_error

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.eager_step import Drawn, EagerStep, padded

del sys.path[0]  # or transformers finds our folder `kernels`, takes it for its own package and fails


def same_draw(recipe, batch):
    """What our step draws, by its counter-based generator."""
    (group,), video = batch.groups, recipe.model.video
    sequences, count = video.sequences(video.frames), len(batch)
    keep, removed = video_mask(recipe, batch.step).draw(
        group.samples, video.grid(video.frames), seed=recipe.seed, epoch=batch.epoch, impl="auto"
    )
    rebuilt = removed[:, :0].view(count * sequences, 0)
    for objective in recipe.objectives.values():
        if isinstance(objective, Mvm):
            seen = SimpleNamespace(seed=recipe.seed, epoch=batch.epoch)
            rebuilt = objective._some(Removed(group.video, group.samples, removed, sequences), seen).flatten(0, 1)
    uniform = noise(count**2, seed=recipe.seed, step=batch.step, stream=PAIR_STREAM, device=keep.device)
    return Drawn(keep.view(count * sequences, -1).long(), rebuilt.long(), uniform.view(count, count))


@pytest.mark.parametrize("name, frames_kept", [("smaug", 0), ("smaug", 1), ("mac", 0), ("dense", 0), ("dense", 2)])
def test_the_eager_step_is_the_same_step(name, frames_kept, shapes_cache):
    """fp32, loss within 1e-5 and gradients within 1e-5 of their norm: two orders of summation."""
    recipe = load(name)
    selector = dataclasses.replace(recipe.model.selector, keep=frames_kept)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, selector=selector),
        data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=16),
    )
    clips = open_split(recipe, "train", Console(quiet=True))
    tokenizer = train_tokenizer([c for s in clips.samples for c in s.captions], recipe.data.vocabulary)
    batch = dataclasses.replace(open_loader(recipe, clips, tokenizer).batch(0), step=recipe.optim.steps // 2)
    model = build(recipe, tokenizer.get_vocab_size(), "auto")
    eager, theirs = EagerStep(model, recipe), padded(batch, text_views(recipe, batch))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, grads = gradients(training_step(model, recipe, batch)[0])
    other, other_grads = gradients(eager(theirs, same_draw(recipe, batch), batch.step))
    assert abs(other - loss) <= 1e-5 * loss
    for name, grad in grads.items():
        assert grad.abs().max() > 0 and relative_error(other_grads[name], grad) < 1e-5, name
    drawn = eager.draw(theirs, batch.step)  # and by itself it draws as much, but not the same
    assert [x.shape for x in vars(drawn).values()] == [x.shape for x in vars(same_draw(recipe, batch)).values()]
    assert abs(eager(theirs, drawn, batch.step) - loss) > 2e-5 * loss  # twice what counts as equal
