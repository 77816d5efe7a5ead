"""A step in parts has the loss and the gradients of the whole one, and needs less memory."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from smaug.micro_batches import backward_in_parts
from smaug.recipe import names
from smaug.step import Step
from smaug.testing import HostReads, relative_error
from tests.test_step import cancelled, made, model_of, with_images, with_prune

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.timing import peak_memory

del sys.path[0]  # or transformers finds our folder `kernels`, takes it for its own package and fails


QUICK = {"smaug", "mac"}


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names()])
def test_parts_compute_what_the_whole_does(name, images, shapes_cache):
    recipe, loader, tokenizer = made(name)
    batch = dataclasses.replace(loader.batch(0), step=1)
    batch = with_images(batch) if images else batch
    step = Step(model_of(recipe, tokenizer, "auto"), recipe)
    loss, means = step(batch)
    loss.backward()
    truth = gradients(step.model)
    for pairs in (7, 2):
        in_parts, means_in_parts = backward_in_parts(step, batch, pairs)
        torch.testing.assert_close(in_parts, loss.detach(), rtol=1e-6, atol=0)
        assert means_in_parts.keys() == means.keys()
        found = gradients(step.model)
        assert found.keys() == truth.keys()
        for key in found.keys() - set(cancelled(recipe)):
            assert relative_error(found[key], truth[key]) < 1e-5, (pairs, key)


def test_patches_that_are_pruned_at_random_are_the_same(shapes_cache):
    """Their random numbers are those of their places in the whole batch."""
    recipe, loader, tokenizer = made("smaug")
    step = Step(model_of(recipe, tokenizer, "auto"), with_prune(recipe, score="random"))
    step.model.video.config = step.recipe.model.video
    batch = dataclasses.replace(loader.batch(0), step=1)
    loss, _ = step(batch)
    torch.testing.assert_close(backward_in_parts(step, batch, 3)[0], loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", [2, 100])
def test_the_contrast_has_fp32_gradients_in_bf16_too(part, shapes_cache):
    recipe, loader, tokenizer = made("mac")
    vtc = dataclasses.replace(recipe.objectives["vtc"], part=part)
    recipe = dataclasses.replace(recipe, objectives=recipe.objectives | {"vtc": vtc})
    step, batch = Step(model_of(recipe, tokenizer, "auto"), recipe), loader.batch(0)

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    with bf16():
        loss, _ = step(batch)
    loss.backward()
    truth = gradients(step.model)
    backward_in_parts(step, batch, 3, bf16)
    found = gradients(step.model)
    for key in (k for k in truth if k.startswith("heads.vtc.")):
        assert relative_error(found[key], truth[key]) < 1e-4, key


def test_it_holds_the_activations_of_one_part_and_reads_nothing(shapes_cache):
    recipe, loader, tokenizer = made("mac")
    step, batch = Step(model_of(recipe, tokenizer, "auto"), recipe), loader.batch(0)
    whole = peak_memory(lambda: step(batch)[0].backward(), torch.device("cpu"))
    assert peak_memory(lambda: backward_in_parts(step, batch, 2), torch.device("cpu")) < 0.6 * whole
    with HostReads() as reads:
        backward_in_parts(step, batch, 2)
    assert reads.found == []
