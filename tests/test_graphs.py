"""Recorded steps are the steps: the same losses, gradients and weights, whatever is replayed in between.

Without a GPU a stand-in records: it computes the same function again on the same tensors, which shows all but CUDA's
own part.
"""

import contextlib
import copy
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smaug import graphs, train
from smaug.blocks import compile_blocks
from smaug.graphs import Graphs
from smaug.objectives.answer import Answer
from smaug.optim import Update
from smaug.recipe import load
from smaug.step import Step
from smaug.testing import relative_error
from tests.test_loop import TINY, losses
from tests.test_step import made, model_of, with_images


def again(run, parameters, pool):
    """In place of `graphs.record`."""
    loss, parts = run()
    left = [loss, *parts.values(), *(p.grad for p in parameters if p.grad is not None)]
    for x in left:  # nothing has been computed yet
        x.fill_(torch.nan)

    def replay():
        loss, parts = run()
        for there, x in zip(left, (loss, *parts.values(), *(p.grad for p in parameters if p.grad is not None))):  # noqa: B905
            there.copy_(x)

    return SimpleNamespace(replay=replay, pool=lambda: pool), (loss, parts)


def trained(recipe, model, batches, run):
    """The losses of some steps, and the weights after them."""
    update, found = Update(model, recipe.optim), []
    for number, batch in enumerate(batches):
        loss, parts = run(batch)
        found.append(torch.stack([loss.detach(), *(part.detach() for part in parts.values())]))
        update(number)
    return torch.stack(found), [p.detach().clone() for p in model.parameters()]


def eagerly(step, autocast):
    def run(batch):
        with autocast():
            loss, parts = step(batch)
        loss.backward()
        return loss, parts

    return run


def varied(loader, device="cpu"):
    """Ten steps: at step 0 nothing is pruned yet, step 6 has images, from step 7 on nothing is masked."""
    batches = [loader.batch(step) for step in range(10)]
    batches[6] = with_images(batches[6])
    return [batch.rounded(256).to(torch.device(device)) for batch in batches]


def of_ten_steps(name):
    recipe, loader, tokenizer = made(name)
    optim = dataclasses.replace(recipe.optim, steps=10, clip=1.0)
    return dataclasses.replace(recipe, optim=optim, unmask_last=0.3), loader, tokenizer


@pytest.mark.parametrize("name", ["smaug", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mac", "qa"))])
def test_recorded_steps_are_the_steps(shapes_cache, monkeypatch, name):
    """To the bit. Of smaug steps 2 and 8 are recorded, the second of their kind; 0 and 6 never are."""
    recipe, loader, tokenizer = of_ten_steps(name)
    model = model_of(recipe, tokenizer, "auto")
    other, batches = copy.deepcopy(model), varied(loader)
    want, weights = trained(recipe, model, batches, eagerly(Step(model, recipe), contextlib.nullcontext))

    eager = []
    plain = Graphs._run
    monkeypatch.setattr(Graphs, "_run", lambda self, batch: eager.append(batch.step) or plain(self, batch))
    monkeypatch.setattr(graphs, "record", again)
    recorded = Graphs(Step(other, recipe), contextlib.nullcontext)
    got, other_weights = trained(recipe, other, batches, recorded)
    # the stand-in runs as the step that it has recorded, and draws as the step that it is given
    assert len(recorded.recorded) > 0 and 6 in eager
    assert name != "smaug" or eager == [0, 1, *[2] * 5, 6, 7, *[8] * 3]
    assert torch.equal(got, want) and got.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(other_weights, weights, strict=True))


def test_what_is_recorded(shapes_cache, monkeypatch):
    """What recurs among the last steps, and no more than a few."""
    recipe, loader, tokenizer = of_ten_steps("dense")
    ran = []
    monkeypatch.setattr(Graphs, "_run", lambda self, batch: ran.append(len(batch)) or (torch.ones(()), {}))
    monkeypatch.setattr(graphs, "record", again)
    recorded = Graphs(Step(model_of(recipe, tokenizer), recipe), contextlib.nullcontext)
    batch = loader.batch(0)

    def kind(number):
        return dataclasses.replace(batch.rounded(64), answers=torch.zeros(number))

    for _ in range(3):
        recorded(batch)  # not rounded
    assert not recorded.recorded
    for number in range(graphs.RECENT + 1):
        recorded(kind(number))
    recorded(kind(0))  # too long ago
    assert not recorded.recorded and len(recorded.recent) == graphs.RECENT
    for number in range(graphs.MOST + 2):
        recorded(kind(number))
        recorded(kind(number))
    assert len(recorded.recorded) == graphs.MOST


@pytest.mark.parametrize(
    ("device", "fast", "ranks", "micro_batch", "said"),
    [
        ("cpu", True, 1, 0, "needs a CUDA device, and this run is on the cpu"),
        ("cuda", True, 2, 0, "records the steps of a single process, and these are 2"),
        ("cuda", False, 1, 0, "records the Triton kernels: add --fast"),
        ("cuda", True, 1, 4, "records steps of whole batches: leave out --micro-batch"),
        ("cuda", True, 1, 0, ""),
    ],
)
def test_what_it_refuses(monkeypatch, device, fast, ranks, micro_batch, said):
    monkeypatch.setattr(graphs.distributed, "ranks", lambda: ranks)
    monkeypatch.setattr(graphs, "load_kernels", lambda: "ok")
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        graphs.check(load("smaug"), torch.device(device), "auto" if fast else "reference", micro_batch)
    both = dataclasses.replace(load("smaug"), objectives={**load("smaug").objectives, "answer": Answer(by="decoder")})
    with pytest.raises(ValueError, match=said or "both masked words and answers"):
        graphs.check(both, torch.device(device), "auto" if fast else "reference", micro_batch)
    monkeypatch.setattr(graphs, "load_kernels", lambda: "no Triton.")
    with pytest.raises(ValueError, match="without it the run would start"):
        graphs.check(load("smaug"), torch.device(device), "auto" if fast else "reference", micro_batch)


def test_a_cpu_is_refused(call):
    code, _, err = call(train.main, "smaug", *TINY, "--cuda-graphs")
    assert code == 1 and err.count("\n") == 1 and "--cuda-graphs needs a CUDA device" in err
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_run(call, monkeypatch):
    code, _, err = call(train.main, "smaug", *TINY, "--max-steps=6")
    assert code == 0, err
    want, recorded = losses(), []
    monkeypatch.setattr(graphs, "check", lambda *_: None)
    monkeypatch.setattr(graphs, "record", lambda *given: recorded.append(1) or again(*given))
    code, out, err = call(train.main, "smaug", *TINY, "--max-steps=6", "--cuda-graphs", "--run-dir=other")
    assert code == 0, err
    assert out.count("\ngraphs  ") == 1 and recorded
    assert losses("other") == pytest.approx(want, rel=1e-4)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried much.\nmore")

    monkeypatch.setattr(graphs, "record", fails)
    code, _, err = call(train.main, "smaug", *TINY, "--max-steps=6", "--cuda-graphs", "--run-dir=third")
    assert code == 1 and err.count("\n") == 1 and "Try --micro-batch 8 without --cuda-graphs or a smaller" in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("name", ["smaug", "mac", "dense", "singularity", "qa", "mc"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(shapes_cache, name, compiled):
    """Step by step on the same weights; then trained beside the loader's thread, in memory that does not grow.

    Nobody has run it yet.
    """
    recipe, loader, tokenizer = of_ten_steps(name)
    model = model_of(recipe, tokenizer, "auto").cuda()
    if compiled:
        compile_blocks(model)
    step, bf16 = Step(model, recipe), functools.partial(torch.autocast, "cuda", torch.bfloat16)
    recorded, eager = Graphs(step, bf16), eagerly(step, bf16)
    for batch in varied(loader, "cuda"):
        loss = eager(batch)[0].detach()
        want = [p.grad for p in recorded.parameters]
        got, _ = recorded(batch)
        assert torch.allclose(got, loss, rtol=1e-3)
        assert not got.requires_grad
        for p, grad in zip(recorded.parameters, want, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or p.grad.data_ptr() != grad.data_ptr()
            assert grad is None or relative_error(p.grad, grad) < 1e-2
        graphs.forget(recorded.parameters)
    assert recorded.recorded

    update, used = Update(model, recipe.optim), []
    for number, batch in enumerate(loader.ahead(1, 31, torch.device("cuda"), graphs.BUCKET)):
        loss, _ = recorded(dataclasses.replace(batch, step=1))
        update(number)
        used.append(torch.cuda.memory_reserved())
    assert loss.isfinite() and used[10] == used[-1]
