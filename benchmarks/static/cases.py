"""What is compiled: the library's ops, forward and backward, at the shapes of its recipes, written down on meta.

Nothing starts and nothing has values. `OnKernels` stands where a GPU would: each registered op of `smaug.ops` goes to
its Triton launcher, so the autograd around it, and with it the choice of launches, is the library's own. traffic.py
runs the same cases with values, on the CPU.

Recipes train under autocast: parameters, biases and scores are fp32, everything else is bf16. Sizes: `tiny`
(`smaug/model/model.py`: 64 pixels, patch 8, tubelet 4, width 128, heads of 32, decoder 64 wide) and `base` (ViT-B/16 at
224 pixels, heads of 64), tubelet 1 as the recipes have it and 2 as VideoMAE has it. Batches and lengths choose no
kernel (tests/kernels/ holds that), so few of each will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.static import padded_attention
from smaug import ops
from smaug.kernels import launch
from smaug.kernels.launch import Launch
from smaug.ops.noise import noise
from smaug.ops.warmup import OnKernels
from smaug.tokens import PackedTokens

ARCHITECTURES = (80, 86, 89, 90, 100)
WIDTHS = (32, 64, 72, 80, 88, 96, 128, 256)  # of heads; the recipes have the first two
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], None]
    ours: bool = True


RAGGED = (12, 24, 36, 48, 60, 72, 84, 96)  # tokens of a sequence: what sparse recipes leave
EVEN = (197,)  # a whole picture of ViT-B/16 and its [CLS]

device, lengths = "meta", RAGGED  # "cpu" and either, where traffic.py counts


def zeros(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    if device != "meta" and dtype == BF16:
        dtype = torch.float16  # Triton's interpreter has no bf16
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


def floats(*shape: int, grad: bool = False) -> Tensor:
    return zeros(*shape, dtype=torch.float32, grad=grad)


def ints(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def starts(lengths: Sequence[int]) -> Tensor:
    return ints([0, *itertools.accumulate(lengths)])


def attention_of_one_projection(e: int, dtype: torch.dtype = BF16, scores: str | None = None) -> None:
    """A block of an encoder, of [CLS] and patches or of words; pruning blocks ask for scores."""
    q, k, v = zeros(sum(lengths), 3, 1, e, dtype=dtype, grad=True).unbind(1)
    out = ops.attention(q, k, v, starts(lengths), key_scores=scores)  # type: ignore[arg-type]
    (out[0] if scores else out).sum().backward()


def attention_to_frames(e: int, gate: bool, dtype: torch.dtype = BF16) -> None:
    """A fusion block: words of a pair to the frames that its row of kv_ids names, weighed by the selector's gate."""
    captions, frames = [20] * 8, len(lengths)
    q = zeros(sum(captions), 1, e, dtype=dtype, grad=True)
    k, v = zeros(sum(lengths), 2, 1, e, dtype=dtype, grad=True).unbind(1)
    ids = ints([[i % frames, (i + 1) % frames] for i in range(8)])
    bias = floats(8, 2, grad=True) if gate else None
    ops.attention(q, k, v, starts(captions), starts(lengths), kv_ids=ids, segment_bias=bias).sum().backward()


def attention_with_everything(e: int, dtype: torch.dtype = BF16) -> None:
    """All that the op offers at once: the most registers."""
    rows, s = sum(lengths), len(lengths)
    q, k, v = (zeros(rows, heads, e, dtype=dtype, grad=True) for heads in (2, 1, 1))
    o, lse, _ = ops.attention(
        *(q, k, v, starts(lengths), starts(lengths)),
        kv_ids=ints([[i, (i + 1) % s, -1] for i in range(s)]),
        segment_bias=floats(s, 3, grad=True),
        key_bias=floats(rows, grad=True),
        return_lse=True,
        key_scores="mean",
    )
    (o.sum() + lse.sum()).backward()


def embedding(
    d: int, pixels: int, patch: tuple[int, int, int], last: bool, parameters: torch.dtype, video: torch.dtype,
    out: torch.dtype = BF16,
) -> None:  # fmt: skip
    """Every second patch of clips, [CLS] of each moment in front. A float video asks for its gradient."""
    clips, frames, side = 64, 4 * patch[0], pixels // patch[1]
    clip = (frames, pixels, pixels, 3) if last else (frames, 3, pixels, pixels)
    n = 4 * side * side
    table = {name: zeros(*shape, dtype=parameters, grad=True) for name, shape in dict(
        weight=(d, 3 * patch[0] * patch[1] * patch[2]), bias=(d,), position=(n, d), prefix=(1, d)).items()}  # fmt: skip
    values, *_ = torch.ops.smaug.patch_embed(
        *(zeros(clips, *clip, dtype=video, grad=video.is_floating_point), ints([range(0, n, 2)] * clips)),
        *(*table.values(), list(patch), [0.5] * 3, [0.25] * 3, True, True),  # the registered op: meta has no autocast
        torch.float16 if device != "meta" and out == BF16 else out,
    )
    values.sum().backward()


def rebuilt_pixels(
    pixels: int, patch: tuple[int, int, int], last: bool, normalise: Any = "patch", dtype: torch.dtype = BF16
) -> None:
    clips, frames, removed = 2, 4 * patch[0], 200
    clip = (frames, pixels, pixels, 3) if last else (frames, 3, pixels, pixels)
    pred = zeros(clips, removed, 3 * patch[0] * patch[1] * patch[2], dtype=dtype, grad=True)
    video = zeros(clips, *clip, dtype=torch.uint8)
    ops.pixel_loss(pred, video, ints([range(removed)] * clips), patch=patch, normalise=normalise).backward()


def masks(grid: tuple[int, int, int], keep: int, kind: Any = "random") -> None:
    seed, samples = (zeros(*shape, dtype=torch.int64) for shape in ((), (4,)))
    ops.random_mask(samples, grid, keep, kind=kind, seed=seed, draw=seed)


def random_numbers(rows: int, columns: int) -> None:
    noise(floats(rows, columns), seed=0)
    noise(floats(rows, columns), seed=0, draw=zeros(dtype=torch.int64))


def moved_rows(d: int, dtype: torch.dtype = BF16) -> None:
    """gather and scatter with what fills the holes, and their gradients."""
    sequences, length, kept = 2, 400, 40
    ids, cu = ints([*range(0, length, 10)] * sequences), starts([kept] * sequences)
    ops.gather_tokens(zeros(sequences, length, d, dtype=dtype, grad=True), ids, cu).sum().backward()
    x, fill = zeros(kept * sequences, d, dtype=dtype, grad=True), floats(d, grad=True)
    ops.scatter_tokens(x, ids, length, fill, cu).sum().backward()


def pruned(d: int, scores_grad: bool = False, lengths: int | None = 197, dtype: torch.dtype = BF16, **how: Any) -> None:
    sequences = 4
    rows = sequences * 197
    values, scores = zeros(rows, d, dtype=dtype, grad=True), floats(rows, grad=scores_grad)
    with torch.no_grad():
        scores.copy_(torch.arange(rows) * 0.618 % 1)  # in no order
    tokens = PackedTokens(values, starts([197] * sequences), ints(range(rows)), floats(rows), 197, lengths)
    out, _, _ = ops.select_tokens(tokens, scores, prefix=1, **how)[:3]
    out.values.sum().backward()


def padded_attention_of_one_projection(e: int) -> None:
    q, k, v = (zeros(len(lengths), 1, max(lengths), e) for _ in range(3))
    real = ints(lengths)
    o, lse = padded_attention.padded_attention(q, k, v, real)
    padded_attention.padded_attention_backward(o, q, k, v, o, lse, real)


def cases() -> list[Case]:
    """In the order in which they are compiled: what the recipes run comes first."""
    made: list[Case] = []

    def case(name: str, run: Callable[..., None], *args: Any, ours: bool = True, **kwargs: Any) -> None:
        made.append(Case(name, lambda: run(*args, **kwargs), ours))

    u8, fp32 = torch.uint8, torch.float32
    case("tiny, channels last", embedding, 128, 64, (4, 8, 8), True, fp32, u8)
    case("base, channels last", embedding, 768, 224, (1, 16, 16), True, fp32, u8)
    for last in (True, False):
        order = "channels last" if last else "channels first"
        case(f"base, tubelet 2, {order}", embedding, 768, 224, (2, 16, 16), last, fp32, u8)
        case(f"base, tubelet 2, {order}", rebuilt_pixels, 224, (2, 16, 16), last)
    case("tiny, channels last", rebuilt_pixels, 64, (4, 8, 8), True)
    case("base, channels last", rebuilt_pixels, 224, (1, 16, 16), True)
    for name, grid, keep in (("tiny", (1, 8, 8), 32), ("base", (1, 14, 14), 98), ("base, clips", (8, 14, 14), 157)):
        case(name, masks, grid, keep)
    for kind in ("tube", "block", "frame"):
        case(f"base, {kind}", masks, (8, 14, 14), 392, kind)
    case("negatives", random_numbers, 2, 64)
    for name, d in (("tiny", 128), ("base", 768)):
        case(name, moved_rows, d)
        case(f"{name}, count", pruned, d, keep=137, fuse="mean")
    for e in WIDTHS:
        case("self", attention_of_one_projection, e)
        if e <= 64:
            case("self, cls scores", attention_of_one_projection, e, scores="cls")
            case("to frames", attention_to_frames, e, gate=e == 64)
    for e in (32, 64, 128):
        case("padded", padded_attention_of_one_projection, e, ours=False)
    case("base, ratio, scores learn", pruned, 768, True, None, keep=0.7, fuse="sum")
    case("base, mass", pruned, 768, False, None, mass=0.9, fuse="mean", capacity=500)
    case("base, tubelet 2, bf16 weights", embedding, 768, 224, (2, 16, 16), False, BF16, u8)
    case("base, tubelet 2, bf16 video learns", embedding, 768, 224, (2, 16, 16), False, BF16, BF16)
    for e in (64, 80, 96, 128, 256):
        case("everything", attention_with_everything, e)
    for e in WIDTHS:
        case("self", attention_of_one_projection, e, torch.float16)
    # Without autocast: fp32 products, which tensor cores do not make.
    for e in (32, 64, 96, 128):
        case("self", attention_of_one_projection, e, fp32)
    for e in (32, 64):
        case("to frames", attention_to_frames, e, e == 64, fp32)
    case("everything", attention_with_everything, 64, fp32)
    case("tiny, channels last", embedding, 128, 64, (4, 8, 8), True, fp32, u8, fp32)
    case("base, tubelet 2, channels last", embedding, 768, 224, (2, 16, 16), True, fp32, u8, fp32)
    case("base, tubelet 2, fp32 video learns", embedding, 768, 224, (2, 16, 16), False, fp32, fp32, fp32)
    case("base, tubelet 2, channels last", rebuilt_pixels, 224, (2, 16, 16), True, "patch", fp32)
    case("base", moved_rows, 768, fp32)
    case("base, count", pruned, 768, dtype=fp32, keep=137, fuse="mean")
    return made


def recorded(architecture: int) -> list[tuple[Case, Launch]]:
    """Every launch of every case, with the configurations that an architecture gets."""
    found = []
    for case in cases():
        with launch.record(architecture) as launches, OnKernels():
            case.run()
        found += [(case, each) for each in launches]
    return found
