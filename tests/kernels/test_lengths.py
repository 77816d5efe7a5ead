"""No length is compiled in: Triton tells the launches of 50 random batches apart by nothing, forward and backward."""

import random

import pytest
import torch

import smaug.ops  # noqa: F401  before the kernels: it defines the ops they are registered for
from smaug.kernels import attention, gather_tokens, launch, noise, patch_embed, pixel_loss, random_mask, select_tokens

SETS = 50
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
PATCH, MEAN, STD = [2, 16, 16], (0.5,) * 3, (0.25,) * 3


def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def number(r, most):
    """2 to most, as often odd as a multiple of 16; 0 and 1 are cases of their own."""
    return r.choice([r.randint(2, most), 16 * r.randint(1, most // 16)])


def masks(r):
    for kind in ("random", "tube", "block", "frame"):
        keep = 8 * 196 // 2 if kind == "frame" else 8 * r.randint(1, 195)
        args = meta(number(r, 500), dtype=INT64), meta(dtype=INT64), meta(dtype=INT64)
        random_mask.random_mask(*args, 8, 14, 14, keep, kind, 0)


def noises(r):
    like, seed = meta(number(r, 500), number(r, 500), dtype=BF16), r.choice([7, -(2**40)])
    noise.noise(like, seed, number(r, 10**6), 3)
    noise.noise(like, seed, 0, 3, meta(dtype=INT64))


def moves(r):
    sequences, length, rows = number(r, 500), number(r, 2000), number(r, 9000)
    grid, fill = meta(sequences, length, 768, dtype=BF16), meta(768, dtype=FP32)
    for ids, cu_seqlens in ((meta(rows), meta(sequences + 1)), (meta(sequences, number(r, 500)), None)):
        gather_tokens.gather_tokens(grid, ids, cu_seqlens)
        gather_tokens.gather_tokens(grid[:, 1:], ids, cu_seqlens)  # without [CLS]
        gather_tokens.scatter_tokens(meta(*ids.shape, 768, dtype=BF16), ids, length, fill, cu_seqlens)
        gather_tokens.scatter_fill_grad(grid, ids, cu_seqlens)


def selections(r):
    hows = {  # keep, ratio, mass, and whether the result may be too small: then there is more to do, a mode of its own
        "uniform": (1, -1, -1.0, False),
        "count": (1, -1, -1.0, False),
        "ratio": (-1, 999, -1.0, False),
        "mass": (-1, -1, 0.5, False),
        "mass, capacity": (-1, -1, 0.5, True),
    }
    for name, (keep, ratio, mass, small) in hows.items():
        uniform = name == "uniform"
        sequences, kept = number(r, 500), number(r, 16)
        rows = sequences * (kept + 1 + number(r, 200)) if uniform else 2000 + number(r, 9000)
        sizes = [number(r, 1000) if small else rows, number(r, 1000), rows]
        if uniform:
            sizes = [sequences * (kept + 2), sequences * (kept + 1), rows - sequences * (kept + 1)]
        values, scores = meta(rows, 768, dtype=BF16), meta(rows, dtype=FP32)
        cu_seqlens, size = meta(sequences + 1), meta(rows, dtype=FP32)
        rest = 2, kept if keep > 0 else -1, ratio, mass, "mean", uniform
        out = select_tokens.select_tokens(values, scores, cu_seqlens, meta(rows), size, *rest, sizes)
        for of_scores in ((values, scores), (None, None)):
            select_tokens.select_tokens_backward(out[0], *of_scores, cu_seqlens, out[5], *out[7:], "mean", uniform)


def embeddings(r):
    for last, pixels in ((False, torch.uint8), (True, torch.uint8), (False, BF16)):
        clips, tubes, removed = number(r, 300), number(r, 32), number(r, 800)
        picture = (224, 224, 3) if last else (3, 224, 224)
        video, ids = meta(clips, 2 * tubes, *picture, dtype=pixels), meta(clips, tubes * number(r, 100))
        tables = [meta(*shape, dtype=FP32) for shape in ((768, 1536), (768,), (tubes * 196, 768), (2, 768))]
        for per_frame, uniform in ((False, False), (True, False), (True, True)):
            rest = PATCH, MEAN, STD, per_frame, uniform
            grad = patch_embed.patch_embed(video, ids, *tables, *rest, BF16)[0]
            patch_embed.patch_embed_backward(grad, video, ids, tables[0], tubes * 196, 2, *rest, pixels == BF16)
        pred = meta(clips, removed, 1536, dtype=BF16)
        loss, difference = pixel_loss.pixel_loss(pred, video, meta(clips, removed), PATCH, "patch", True)
        pixel_loss.pixel_loss_backward(loss, difference)


def attends(r):
    for scores in ("", "cls", "mean"):
        for cross in (False, True):
            rows, sequences = number(r, 9000), number(r, 100)
            q, k, v = meta(rows, 3, 4, 64, dtype=BF16).unbind(1)
            inputs = [q, k, v, meta(sequences + 1), meta(sequences + 1), None, None, None]
            if cross:
                keys, segments = number(r, 9000), number(r, 100)
                inputs[1:3] = meta(keys, 2, 2, 64, dtype=BF16).unbind(1)
                inputs[4:6] = meta(number(r, 100) + 1), meta(sequences, segments)
                inputs[6:] = meta(sequences, segments, dtype=FP32), meta(keys, dtype=FP32)
            o, lse, _ = attention.attention(*inputs, 0.125, scores, [], [])
            for grads in ((o, None), (o, lse)):
                attention.attention_backward(*grads, *inputs[:3], o, lse, *inputs[3:], 0.125, True, [], [])


RUNS = [masks, noises, moves, selections, embeddings, attends]


def variants(run, r, architecture):
    with launch.record(architecture) as launches:
        run(r)
    return [(found.name, launch.specialisation(found, architecture)) for found in launches]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_lengths_do_not_recompile(run, architecture):
    first = variants(run, random.Random(0), architecture)
    for number in range(1, SETS):
        assert variants(run, random.Random(number), architecture) == first, number


def test_every_kernel_is_among_them():
    modules = attention, gather_tokens, noise, patch_embed, pixel_loss, random_mask, select_tokens
    # device functions take what they are given, and say nothing of it
    kernels = {x.__name__ for m in modules for x in vars(m).values() if getattr(x, "do_not_specialize", None)}
    assert kernels == {name for run in RUNS for name, _ in variants(run, random.Random(0), 80)}
