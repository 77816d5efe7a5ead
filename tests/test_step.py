"""One training step, whole: its gradients, its two ways, its silence towards the host, and its numbers.

After a change that is meant to alter the numbers, renew the golden losses and say why in the commit:

    python -m tests.test_step
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer

from smaug.data.loader import Batch, Loader, VisualGroup
from smaug.data.text import pack, train_tokenizer
from smaug.masks import TextMask
from smaug.optim import adamw, learning_rate
from smaug.recipe import Recipe, load, names
from smaug.run import build, open_split
from smaug.step import positives, training_step
from smaug.testing import HostReads, relative_error

GOLDEN = Path(__file__).parent / "golden"
STEPS = 5


def made(name: str) -> tuple[Recipe, Loader, Tokenizer]:
    """A recipe on the small embedded set, in batches of 16."""
    recipe = load(name)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=16))
    clips = open_split(recipe, "train", Console(quiet=True))
    tokenizer = train_tokenizer([c for s in clips.samples for c in s.captions], recipe.data.vocabulary)
    loader = Loader(
        clips, tokenizer, recipe.data, frames=recipe.model.video.frames, max_words=recipe.model.text.max_words,
        text_mask=recipe.text_mask, seed=recipe.seed,
    )  # fmt: skip
    return recipe, loader, tokenizer


def model_of(recipe, tokenizer, impl="reference"):
    torch.manual_seed(recipe.seed)
    return build(recipe, tokenizer.get_vocab_size(), impl)


def five_losses(name: str) -> list[float]:
    """The first losses of a recipe on the plain path in fp32."""
    recipe, loader, tokenizer = made(name)
    model = model_of(recipe, tokenizer)
    optimizer = adamw(model, recipe.optim)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optim)
        loss, _ = training_step(model, recipe, loader.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module", params=names())
def setup(request, shapes_cache):
    recipe, loader, tokenizer = made(request.param)
    return recipe, loader.batch(0), tokenizer


def with_images(batch: Batch) -> Batch:
    """The last four clips as pictures: their first frames."""
    (group,) = batch.groups
    stills = VisualGroup(group.video[-4:, :1], group.samples[-4:])
    return dataclasses.replace(batch, groups=(VisualGroup(group.video[:-4], group.samples[:-4]), stills))


def gradients(model, recipe, batch):
    loss, _ = training_step(model, recipe, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("images", [False, True])
def test_every_parameter_learns(setup, images):
    recipe, batch, tokenizer = setup
    batch = with_images(batch) if images else batch
    loss, grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    assert loss.shape == () and loss.isfinite()
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.isfinite().all() and grad.abs().sum() > 0, name


def test_loss_is_the_weighted_sum_of_its_parts(setup):
    recipe, batch, tokenizer = setup
    heavy = {name: dataclasses.replace(o, weight=0.25 + i) for i, (name, o) in enumerate(recipe.objectives.items())}
    recipe = dataclasses.replace(recipe, objectives=heavy)
    with torch.no_grad():
        loss, parts = training_step(model_of(recipe, tokenizer), recipe, batch)
    torch.testing.assert_close(loss, sum(o.weight * parts[name] for name, o in heavy.items()))


@pytest.mark.parametrize("images", [False, True])
def test_fast_and_plain_agree_in_fp32(setup, images):
    recipe, batch, tokenizer = setup
    batch = with_images(batch) if images else batch
    plain, plain_grads = gradients(model_of(recipe, tokenizer, "reference"), recipe, batch)
    fast, fast_grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    assert abs(fast - plain) <= 1e-5 * abs(plain)
    for name, truth in plain_grads.items():
        assert relative_error(fast_grads[name], truth) < 1e-5, name


def test_bf16_is_as_good_as_eager(setup):
    """Against plain fp32, the fast path in bf16 is at most twice as wrong as the plain path in bf16; and neither is
    wrong by more than a tenth of the gradient."""
    recipe, batch, tokenizer = setup
    truth_loss, truth = gradients(model_of(recipe, tokenizer), recipe, batch)
    loss, error = {}, {}
    for impl in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            loss[impl], grads = gradients(model_of(recipe, tokenizer, impl), recipe, batch)
        assert all(g.dtype == torch.float32 for g in grads.values())
        got, want = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, truth))
        error[impl] = relative_error(got, want)
    assert error["auto"] <= 2 * error["reference"] and error["auto"] < 0.1, error
    assert abs(loss["auto"] - truth_loss) < max(2 * abs(loss["reference"] - truth_loss), 2e-3 * truth_loss), loss


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_host_never_asks(setup, impl, autocast):
    recipe, batch, tokenizer = setup
    model, batch = model_of(recipe, tokenizer, impl), with_images(batch)
    optimizer = adamw(model, recipe.optim)
    with HostReads() as reads:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = training_step(model, recipe, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert reads.found == []
    assert len(reads.launched) > 100
    with HostReads() as reads:  # and the counter counts
        loss.item()
    assert reads.found


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", names())
def test_base_on_the_meta_device(name, impl):
    """The full size, forward and backward, without one number: the meta device refuses every host read."""
    recipe = load(name, "base")
    video = recipe.model.video
    with torch.device("meta"):
        model = build(recipe, 30522, impl)
    side, n, images = video.image_size, 12, 4
    groups = [
        VisualGroup(torch.empty(count, frames, side, side, 3, dtype=torch.uint8), torch.arange(count))
        for count, frames in ((n, video.frames), (images, 1))
    ]
    words = [[7] * (3 + i % 5) for i in range(n + images)]
    batch = Batch(
        tuple(groups), pack(words, 2), torch.arange(n + images), torch.arange(n + images), epoch=0,
        names=("",) * (n + images), dense_words=0,
    )  # fmt: skip
    batch = batch.to(torch.device("meta"))
    loss, parts = training_step(model, recipe, batch)
    assert loss.is_meta and loss.shape == () and set(parts) == set(recipe.objectives)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name


def test_order_of_the_batch_does_not_matter(setup):
    recipe, batch, tokenizer = setup
    (group,) = batch.groups
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    starts, ends = batch.words.cu_seqlens[:-1].tolist(), batch.words.cu_seqlens[1:].tolist()
    rows = torch.cat([torch.arange(starts[i], ends[i]) for i in order])
    lengths = tuple(batch.words.lengths[i] for i in order)
    words = dataclasses.replace(
        batch.words, values=batch.words.values[rows], ids=batch.words.ids[rows], lengths=lengths,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
    )  # fmt: skip
    other = dataclasses.replace(
        batch, groups=(VisualGroup(group.video[order], group.samples[order]),), words=words,
        video_keys=batch.video_keys[order], caption_keys=batch.caption_keys[order],
    )  # fmt: skip
    model = model_of(recipe, tokenizer)
    with torch.no_grad():
        loss, shuffled = (training_step(model, recipe, b)[0] for b in (batch, other))
        torch.testing.assert_close(loss, shuffled, atol=0, rtol=1e-6)
        # The masks belong to the clips, not to the places: with another clip's number a clip is masked otherwise.
        wrong = dataclasses.replace(batch, groups=(VisualGroup(group.video, group.samples + 1),))
        assert training_step(model, recipe, wrong)[0] != loss


def test_masks_change_with_the_epoch_and_the_seed(setup):
    recipe, batch, tokenizer = setup
    model = model_of(recipe, tokenizer)
    other_seed = dataclasses.replace(recipe, seed=recipe.seed + 1)
    with torch.no_grad():
        losses = [
            training_step(model, r, b)[0].item()
            for r, b in (
                (recipe, batch), (recipe, batch), (recipe, dataclasses.replace(batch, epoch=1)), (other_seed, batch)
            )
        ]  # fmt: skip
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_positives_share_the_clip_or_the_caption():
    batch = SimpleNamespace(video_keys=torch.tensor([5, 6, 7, 5]), caption_keys=torch.tensor([1, 2, 1, 3]))
    assert positives(batch).int().tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["drop", "mask"])
def test_words_that_are_left_out_are_not_computed(setup, kind, shapes_cache):
    recipe, _, _ = setup
    half = dataclasses.replace(recipe, text_mask=TextMask(0.5, kind))
    _, loader, tokenizer = made(recipe.name)
    loader = Loader(
        loader.clips, tokenizer, recipe.data, frames=recipe.model.video.frames,
        max_words=recipe.model.text.max_words, text_mask=half.text_mask, seed=0,
    )  # fmt: skip
    batch = loader.batch(0)
    assert (batch.words.rows < 0.7 * batch.dense_words) == (kind == "drop")
    assert training_step(model_of(half, tokenizer), half, batch)[0].isfinite()


@pytest.mark.parametrize("name", names())
def test_golden_losses(name, shapes_cache):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert five_losses(name) == pytest.approx(golden["losses"], rel=1e-4), "see the top of this file"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SMAUG_CACHE"] = folder
        GOLDEN.mkdir(exist_ok=True)
        for recipe_name in names():
            golden_file = GOLDEN / f"{recipe_name}.json"
            golden_file.write_text(json.dumps({"losses": five_losses(recipe_name), "torch": torch.__version__}) + "\n")
            print(golden_file, golden_file.read_text(), end="")
