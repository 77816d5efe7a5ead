"""Blocks compiled and blocks recomputed: the same losses and gradients, no graph too many, and less memory."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbols

from benchmarks.timing import peak_memory
from smaug.blocks import checkpoint_blocks, compile_blocks
from smaug.data.loader import VisualGroup
from smaug.device import choose
from smaug.recipe import load
from smaug.run import build, open_loader
from smaug.step import keep_rate, training_step
from tests.test_step import made, model_of, with_images, with_prune

STEPS = 20


def at_work(name):
    """The recipe, and batches over which pruning warms up: of varied captions, every fifth with images in it."""
    recipe, loader, tokenizer = made(name)
    recipe = with_prune(recipe, warmup=0.5)
    recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, steps=2 * STEPS))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch=8))
    loader = open_loader(recipe, loader.clips, tokenizer)
    batches = [loader.batch(step) for step in range(STEPS)]
    return recipe, [with_images(b) if b.step % 5 == 4 else b for b in batches], tokenizer


def results(model, recipe, batch, context=contextlib.nullcontext):
    with context():
        loss, _ = training_step(model, recipe, batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def assert_equal(got, truth, **tolerance):
    torch.testing.assert_close(got[0], truth[0], **tolerance)
    for name, grad in truth[1].items():
        assert (got[1][name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(got[1][name], grad, **tolerance, msg=lambda said, name=name: f"{name}: {said}")


BITS = dict(atol=0, rtol=0)


@pytest.fixture
def fresh():
    """Nothing compiled before, and the process-wide setting of `compile_blocks` taken back."""
    torch.compiler.reset()
    counters.clear()
    with symbols.patch(use_duck_shape=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("mac", 2),  # of blocks on sequences of one length, and on others: a batch with images joins the captions
        pytest.param("dense", 4, marks=pytest.mark.slow),  # and the fusion block's two pieces
        pytest.param("smaug", 7, marks=pytest.mark.slow),  # and the halves of a block that prunes, and the decoder's
    ],
)
def test_a_graph_serves_all_blocks_of_a_kind_and_all_lengths(name, graphs, fresh):
    recipe, batches, tokenizer = at_work(name)
    assert len({b.words.rows for b in batches}) > 5  # lengths of captions do change
    assert not recipe.model.video.prune.blocks or len({keep_rate(recipe, b.step) for b in batches}) == STEPS
    plain, compiled = (model_of(recipe, tokenizer, "auto") for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    compile_blocks(compiled, counter)
    if name == "smaug":
        checkpoint_blocks(compiled)  # computed again, they are the same graphs
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for batch in batches:
        got = results(compiled, recipe, batch)
        if batch.step % 6 == 0 or batch.step == STEPS - 1:
            assert_equal(got, results(plain, recipe, batch), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
def test_inductor_computes_the_same(fast, fresh):
    """In fp32, and in the precision of --fast, in which it rounds at other places."""
    recipe, batches, tokenizer = at_work("mac")
    way = choose(True, "cpu")
    plain, compiled = (model_of(recipe, tokenizer, "auto") for _ in range(2))
    compile_blocks(compiled)
    for batch in batches[::7]:
        got, truth = (results(m, recipe, batch, *[way.autocast] * fast) for m in (compiled, plain))
        assert_equal(got, truth, **(dict(atol=0.02, rtol=0.1) if fast else dict(atol=1e-5, rtol=1e-5)))
    assert not counters["graph_break"]


def test_the_reference_is_not_compiled():
    recipe, _, tokenizer = made("mac")
    with pytest.raises(ValueError, match="add --fast"):
        compile_blocks(model_of(recipe, tokenizer, "reference"))


def test_without_a_compiler_it_says_so(monkeypatch):
    recipe, _, tokenizer = made("mac")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*install one"):
        compile_blocks(model_of(recipe, tokenizer, "auto"))


RECOMPUTED = ["smaug", "mac", pytest.param("dense", marks=pytest.mark.slow), pytest.param("qa", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.parametrize("fast", [False, True])
def test_recomputed_blocks_give_the_same_bits(name, fast):
    recipe, loader, tokenizer = made(name)
    batch = dataclasses.replace(loader.batch(0), step=1)
    way = choose(True, "cpu")
    plain, recomputed = (model_of(recipe, tokenizer, "auto") for _ in range(2))
    checkpoint_blocks(recomputed)
    ran = []
    for block in (*recomputed.video.blocks, *recomputed.text.blocks):
        block.up.register_forward_hook(lambda *_: ran.append(1))
    got, truth = (results(m, recipe, batch, *[way.autocast] * fast) for m in (recomputed, plain))
    assert_equal(got, truth, **BITS)
    assert len(ran) == 2 * (recipe.model.video.depth + recipe.model.text.depth)  # once more, in the backward
    with torch.no_grad():
        training_step(recomputed, recipe, batch)
    assert len(ran) == 3 * (recipe.model.video.depth + recipe.model.text.depth)  # nobody will go backward


def test_a_copy_of_the_model_has_blocks_of_its_own():
    """A teacher, say: its blocks must not go on with the weights of the pupil."""
    recipe, loader, tokenizer = made("mac")
    model = model_of(recipe, tokenizer, "auto")
    checkpoint_blocks(model)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    batch = loader.batch(0)
    assert_equal(results(teacher, recipe, batch), results(model_of(recipe, tokenizer, "auto"), recipe, batch), **BITS)


@pytest.mark.slow
def test_recomputing_saves_memory():
    """mac at size small, two clips: what a step holds at its peak, beside the gradients, falls to less than half."""
    small = load("mac", "small")
    recipe, loader, tokenizer = made("mac")
    recipe = dataclasses.replace(small, data=dataclasses.replace(recipe.data, batch=2))
    batch = open_loader(recipe, loader.clips, tokenizer).batch(0)
    video = torch.randint(256, (2, 4, 224, 224, 3), dtype=torch.uint8)
    batch = dataclasses.replace(batch, groups=(VisualGroup(video, batch.groups[0].samples),))
    peaks = []
    for change in (lambda model: None, checkpoint_blocks):
        model = build(recipe, tokenizer.get_vocab_size(), "auto")
        change(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # it is there before, and so not counted

        def step(model=model):
            training_step(model, recipe, batch)[0].backward()

        peaks.append(peak_memory(step, torch.device("cpu")))
    assert peaks[1] < peaks[0] / 2, peaks
