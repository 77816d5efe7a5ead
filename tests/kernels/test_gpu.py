"""What only a GPU can show: 16-bit precision, equal bits over repeats, no host read, graph capture, a whole step.

Nobody has run these yet: the kernels were written without a device. Start here when there is one.
"""

import contextlib
import dataclasses

import pytest
import torch

from smaug import device, ops
from smaug.data.text import train_tokenizer
from smaug.recipe import load, names
from smaug.run import build, open_loader, open_split
from smaug.step import training_step
from smaug.testing import offsets, relative_error
from smaug.tokens import packed_ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
LENGTHS = (1, 33, 0, 64, 17, 200, 3)
IMAGE = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@contextlib.contextmanager
def no_host_read():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda", dtype).requires_grad_()


def attention(impl, dtype, width=64):
    q, k, v = (rows(sum(LENGTHS), 4, width, dtype=dtype, seed=i) for i in range(3))
    cu_seqlens, lengths = offsets(LENGTHS, "cuda"), LENGTHS
    bias = rows(sum(LENGTHS), dtype=torch.float32, seed=3)
    o, lse = ops.attention(
        q, k, v, cu_seqlens, lengths_q=lengths, key_bias=bias, return_lse=True, impl=impl
    )  # fmt: skip
    grads = torch.autograd.grad((o.float() * rows(*o.shape, dtype=torch.float32, seed=4)).sum(), (q, k, v, bias))
    return [o.detach(), lse.detach(), *grads]


def patch_embed(impl, dtype):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (3, 4, 64, 64, 3), generator=generator, dtype=torch.uint8).cuda()
    ids, _ = ops.random_mask(torch.arange(3).cuda(), (2, 4, 4), 11, seed=0)
    weight, bias = rows(128, 3 * 2 * 16 * 16, dtype=dtype), rows(128, dtype=dtype, seed=1)
    tokens = ops.patch_embed(video, ids, weight, bias, patch=(2, 16, 16), **IMAGE, impl=impl)
    out = tokens.values.float() * rows(*tokens.values.shape, dtype=torch.float32, seed=2)
    return [tokens.values.detach(), *torch.autograd.grad(out.sum(), (weight, bias))]


def select_tokens(impl, dtype):
    x, scores = rows(sum(LENGTHS), 128, dtype=dtype), rows(sum(LENGTHS), dtype=torch.float32, seed=1)
    tokens = packed_ragged(x, offsets(LENGTHS, "cuda"), lengths=LENGTHS)
    kept, _, _ = ops.select_tokens(tokens, scores, keep=0.3, prefix=1, impl=impl)
    out = kept.values.float() * rows(*kept.values.shape, dtype=torch.float32, seed=2)
    return [kept.values.detach(), *torch.autograd.grad(out.sum(), (x, scores))]


def gather_tokens(impl, dtype):
    x, ids = rows(3, 50, 128, dtype=dtype), torch.tensor([[0, 7, 49], [1, 2, 3], [10, 20, 30]]).cuda()
    out = ops.gather_tokens(x, ids, impl=impl)
    back = ops.scatter_tokens(out, ids, 50, rows(128, dtype=dtype, seed=1), impl=impl)
    return [back.detach(), *torch.autograd.grad((back.float() * rows(3, 50, 128, seed=2)).sum(), x)]


def pixel_loss(impl, dtype):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (3, 4, 64, 64, 3), generator=generator, dtype=torch.uint8).cuda()
    _, ids = ops.random_mask(torch.arange(3).cuda(), (2, 4, 4), 11, seed=0)
    pred = rows(*ids.shape, 3 * 2 * 16 * 16, dtype=dtype)
    loss = ops.pixel_loss(pred, video, ids, patch=(2, 16, 16), impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, pred)]


CALLS = [attention, patch_embed, select_tokens, gather_tokens, pixel_loss]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_the_formula(call, dtype):
    """Of the same precision, against fp32; the rule of FlashAttention's own tests."""
    truth = call("reference", torch.float32)
    for got, same, exact in zip(call("triton", dtype), call("reference", dtype), truth, strict=True):
        assert got.isfinite().all() or not exact.isfinite().all()
        finite = exact.isfinite()
        floor = 2e-6 if dtype == torch.float32 else 1e-4
        assert relative_error(got[finite], exact[finite]) <= 2 * relative_error(same[finite], exact[finite]) + floor


@pytest.mark.parametrize("width", [72, 80, 88, 96, 128, 256])
def test_attention_at_other_widths(width):
    for got, exact in zip(
        attention("triton", torch.bfloat16, width), attention("reference", torch.float32, width), strict=True
    ):
        finite = exact.isfinite()
        assert relative_error(got[finite], exact[finite]) < 2e-2


@pytest.mark.parametrize("width", [64, 72])
def test_attention_reads_nothing_beyond_a_sequence(width):
    """A sequence of NaN spoils no other. On sm_90 and sm_100 the hardware sees to it, by a bound that rests on 64-bit
    addresses that wrap (triton.tools.ragged_tma), which no compiler and no interpreter can show."""
    spoiled = torch.arange(sum(LENGTHS)).cuda()
    spoiled = ((spoiled >= 34) & (spoiled < 98)) | (spoiled >= 315)  # the sequences of 64 and, the last, of 3 rows

    def run(fill):
        inputs = [rows(sum(LENGTHS), 4, width, seed=i).detach() for i in range(3)]
        inputs = [x.masked_fill(spoiled[:, None, None], fill).requires_grad_() for x in inputs]
        o = ops.attention(*inputs, offsets(LENGTHS, "cuda"), impl="triton")
        return [x[~spoiled] for x in (o.detach(), *torch.autograd.grad(o, inputs, rows(*o.shape, seed=3).detach()))]

    for clean, beside in zip(run(0.0), run(torch.nan), strict=True):
        assert clean.isfinite().all() and torch.equal(clean, beside)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_repeats_are_equal_to_the_bit_and_read_nothing_on_the_host(call):
    first = call("triton", torch.bfloat16)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, call("triton", torch.bfloat16), strict=True))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_reference_starts_no_kernel(call):
    from smaug.kernels import launch

    with launch.record() as launches:
        call("reference", torch.float32)
    assert not launches


def test_masks_are_those_of_the_cpu():
    samples = torch.arange(64) * 1_000_003
    for kind, keep in (("random", 200), ("tube", 196), ("block", 101), ("frame", 196)):
        on_cpu = ops.random_mask(samples, (4, 14, 14), keep, kind=kind, seed=7, draw=3)
        on_gpu = ops.random_mask(samples.cuda(), (4, 14, 14), keep, kind=kind, seed=7, draw=3)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@pytest.fixture(params=names())
def step(request, shapes_cache):
    from rich.console import Console

    recipe = load(request.param)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=16))
    clips = open_split(recipe, "train", Console(quiet=True))
    tokenizer = train_tokenizer([c for s in clips.samples for c in s.captions], recipe.data.vocabulary)
    batch = dataclasses.replace(open_loader(recipe, clips, tokenizer).batch(0), step=recipe.optim.steps // 2)

    def run(way):
        torch.manual_seed(0)
        model = build(recipe, tokenizer.get_vocab_size(), way.impl).to(way.device)
        here = batch.to(way.device)
        with way.autocast():
            training_step(model, recipe, here)[0].backward()  # compiles
        model.zero_grad()
        guard = no_host_read() if way.device.type == "cuda" else contextlib.nullcontext()
        with guard, way.autocast():
            loss, _ = training_step(model, recipe, here)
            loss.backward()
        return loss.item()

    return run


def test_a_step_on_the_kernels_reads_nothing_and_has_the_loss_of_the_plain_one(step):
    assert abs(step(device.choose(True, "cuda")) / step(device.choose(False, "cpu")) - 1) < 0.02


def test_attention_is_captured_in_a_graph():
    q, k, v = (rows(sum(LENGTHS), 4, 64, seed=i).detach() for i in range(3))
    cu_seqlens = offsets(LENGTHS, "cuda")
    want = ops.attention(q, k, v, cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.attention(q, k, v, cu_seqlens)
    graph.replay()
    assert torch.equal(got, want)
