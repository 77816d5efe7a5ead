"""What warmup compiles is what a launch asks for; no device is needed, as kernels/launch.py answers for one."""

import dataclasses

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import DataDependentOutputException

from smaug import ops
from smaug.data.text import train_tokenizer
from smaug.kernels import launch
from smaug.ops.warmup import OnKernels
from smaug.recipe import load
from smaug.run import build, open_loader, open_split
from smaug.step import training_step
from smaug.testing import offsets
from smaug.tokens import packed_uniform

CU = offsets((30, 34))
BF16 = dict(device_type="cpu", dtype=torch.bfloat16)  # tensors on the CPU stand for those of a GPU


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of capability 9.0, as far as choosing and compiling kernels needs one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("smaug.kernels.triton_status", lambda: "ok")
    monkeypatch.setattr(launch, "_architecture", 90)
    with launch._offline(90):
        yield


def attention():
    """Of views at addresses that 16 divides, and of a bias at one that it does not."""
    qkv, bias = torch.randn(64, 3, 4, 32, requires_grad=True), torch.randn(65, requires_grad=True)
    o, _ = ops.attention(*qkv.unbind(1), CU, key_bias=bias[1:], key_scores="mean")
    o.float().sum().backward()


def patch_embed():
    video = torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8)
    ids, removed = torch.arange(8, dtype=torch.int32).repeat(2, 1), torch.arange(8, 16, dtype=torch.int32).repeat(2, 1)
    weight, position = torch.randn(128, 192, requires_grad=True), torch.randn(16, 128, requires_grad=True)
    tokens = ops.patch_embed(
        video, ids, weight, patch=8, mean=(0.5,) * 3, std=(0.2,) * 3, position=position, prefix=position[:1]
    )
    ops.pixel_loss(tokens.values[:16].view(2, 8, 128).repeat(1, 1, 2)[:, :, :192], video, removed, patch=8).backward()


def moved_and_pruned():
    x, scores = torch.randn(64, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    kept, _, _ = ops.select_tokens(packed_uniform(x.bfloat16(), 16), scores, keep=0.5, prefix=1)
    back = ops.scatter_tokens(kept.values[None], torch.arange(40)[None], 50, torch.randn(128, requires_grad=True))
    ops.gather_tokens(back, torch.arange(9)[None]).float().sum().backward()


def masks():
    ops.random_mask(torch.arange(3), (2, 4, 4), 11, seed=torch.tensor(1), draw=torch.tensor(0))


@pytest.mark.parametrize("call", [attention, patch_embed, moved_and_pruned, masks], ids=lambda call: call.__name__)
def test_real_tensors_ask_for_what_was_compiled(call, device, monkeypatch):
    compiled = []

    def note(kernel, *args, grid, **meta):
        compiled.append(launch.Launch(kernel, grid, args, meta))

    with monkeypatch.context() as patch, torch.autocast(**BF16):
        patch.setattr("triton.runtime.jit.JITFunction.warmup", note)
        with ops.warmup() as names:
            call()
    with launch.record(90) as launches, OnKernels(), torch.autocast(**BF16):
        call()
    assert [found.name for found in compiled] == [found.name for found in launches]
    assert names == list(dict.fromkeys(found.name for found in launches))
    for mine, real in zip(compiled, launches, strict=True):
        assert launch.specialisation(mine, 90) == launch.specialisation(real, 90), real.name
        assert mine.grid == real.grid, real.name


def test_nothing_is_left_to_compile(device):
    """Triton's own cache, which a launch looks into first, gets no new entry."""
    call = attention
    with ops.warmup() as names, torch.autocast(**BF16):
        call()
    assert names[0] == "attention_forward" and len(names) == 5
    with launch.record(90) as launches, OnKernels(), torch.autocast(**BF16):
        call()
    for found in launches:
        cache = found.kernel.device_caches[90][0]
        before = dict(cache)
        launch.compile_for(found, 90)
        assert before and dict(cache) == before, found.name


def test_a_training_step_leaves_the_model_as_it_was(device, monkeypatch, shapes_cache):
    monkeypatch.setattr("triton.runtime.jit.JITFunction.warmup", lambda *args, **kwargs: None)
    recipe = load("smaug")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=16))
    clips = open_split(recipe, "train", Console(quiet=True))
    tokenizer = train_tokenizer([c for s in clips.samples for c in s.captions], recipe.data.vocabulary)
    batch = dataclasses.replace(open_loader(recipe, clips, tokenizer).batch(0), step=recipe.optim.steps // 2)
    model = build(recipe, tokenizer.get_vocab_size(), "auto")
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    before = [p.detach().clone() for p in model.parameters()]
    with ops.warmup() as names, torch.autocast(**BF16):
        training_step(model, recipe, batch)[0].backward()
    assert {"_mask", "_embed", "_select", "attention_scores", "_differences", "_dweight", "_backward"} <= set(names)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(first.grad, torch.ones_like(first)) and all(p.grad is None for p in others)


def test_an_error_of_the_block_leaves_no_gradient_and_compiles_nothing(device, monkeypatch):
    monkeypatch.setattr("triton.runtime.jit.JITFunction.warmup", lambda *args, **kwargs: pytest.fail("compiled"))
    qkv = torch.randn(64, 3, 4, 32, requires_grad=True)
    with pytest.raises(ZeroDivisionError), ops.warmup():
        ops.attention(*qkv.unbind(1), CU).sum().backward()
        raise ZeroDivisionError
    assert qkv.grad is None
    with pytest.raises(DataDependentOutputException), ops.warmup():
        ops.attention(*qkv.unbind(1), CU).sum().item()


def test_without_a_device_nothing_is_compiled():
    qkv = torch.randn(64, 3, 4, 32, requires_grad=True)
    with ops.warmup() as names:
        assert ops.attention(*qkv.unbind(1), CU).shape == (64, 4, 32)
    assert names == []
