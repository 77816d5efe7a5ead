"""A whole training step at size tiny: forward, backward, AdamW.

    pytest benchmarks/bench_train_step.py --benchmark-only

`fast` and `reference` are our two ways in one precision. `eager` is the same step, on the same weights, in the PyTorch
that one writes today (`eager_step.py`), `eager_compiled` that one under torch.compile, `eager_dense` that one with
nothing masked, pruned or rebuilt: what a step costs without the method.
"""

import dataclasses

import pytest
import torch

from benchmarks.eager_step import EagerStep, padded
from benchmarks.timing import compiled
from smaug.data.loader import Batch, VisualGroup
from smaug.data.text import pack
from smaug.masks import VideoMask
from smaug.model.video_encoder import PruneConfig
from smaug.objectives.mvm import Mvm
from smaug.optim import adamw
from smaug.recipe import load
from smaug.run import build
from smaug.step import text_views, training_step

VOCABULARY, CLS, MASK = 200, 2, 4


def batch_of(recipe, pairs, device):
    """Noise in the shapes of the embedded data set, from the middle of a run, at which patches are pruned; time does
    not depend on what is seen. Half of each caption's words are masked."""
    generator = torch.Generator().manual_seed(0)
    video = recipe.model.video
    clips = torch.randint(
        0, 256, (pairs, video.frames, video.image_size, video.image_size, 3), dtype=torch.uint8, generator=generator
    )
    lengths = torch.randint(6, 14, (pairs,), generator=generator).tolist()
    captions = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    words = pack(captions, CLS)
    rows = [first + 1 + i for first, n in zip(words.first_rows().tolist(), lengths, strict=True) for i in range(n // 2)]
    return Batch(
        (VisualGroup(clips, torch.arange(pairs)),), words=words, contrast=words,
        masked=pack(captions, CLS, [torch.arange(n // 2, n) for n in lengths], MASK),
        masked_rows=torch.tensor(rows), masked_labels=words.values[rows],
        masked_counts=tuple(n // 2 for n in lengths), video_keys=torch.arange(pairs), caption_keys=torch.arange(pairs),
        epoch=0, step=recipe.optim.steps // 2, names=("",) * pairs,
    ).to(device)  # fmt: skip


def dense(recipe):
    """The recipe with every patch in it, and so without mvm."""
    video = dataclasses.replace(recipe.model.video, prune=PruneConfig())
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, video=video),
        video_mask=VideoMask(0.0, recipe.video_mask.kind),
        objectives={name: o for name, o in recipe.objectives.items() if not isinstance(o, Mvm)},
    )


def loss_of(provider, model, recipe, batch):
    """A function that runs the forward -> the loss."""
    if provider in ("fast", "reference"):
        return lambda: training_step(model, recipe, batch)[0]
    theirs, eager = padded(batch, text_views(recipe, batch)), EagerStep(model, recipe).to(batch.video_keys.device)
    forward = compiled(eager) if provider == "eager_compiled" else eager
    return lambda: forward(theirs, eager.draw(theirs, batch.step), batch.step)


@pytest.mark.parametrize("provider", ["fast", "reference", "eager", "eager_compiled", "eager_dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["smaug", "mac"])
def test_train_step(timed, device, name, dtype, provider):
    recipe, pairs = load(name), 32
    if provider == "eager_dense":
        recipe = dense(recipe)
    batch = batch_of(recipe, pairs, device)
    torch.manual_seed(0)
    model = build(recipe, VOCABULARY, "reference" if provider == "reference" else "auto").to(device)
    loss, optimizer = loss_of(provider, model, recipe, batch), adamw(model, recipe.optim)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    video = recipe.model.video
    times = video.times(video.frames)
    kept = recipe.video_mask.keep(times, video.patches)
    shape = f"{name}, {pairs} pairs, {kept} of {times * video.patches} tokens kept, width {video.width}"
    timed(step, shape, dtype, countable=provider != "eager_compiled")
