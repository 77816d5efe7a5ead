"""What is compiled: the library's ops, forward and backward, at the shapes of its recipes, written down on meta.

Nothing starts and nothing has values. `OnKernels` stands where a GPU would: each registered op of `smaug.ops` goes to
its Triton launcher, so the autograd around it, and with it the choice of launches, is the library's own.

Recipes train under autocast: parameters, biases and scores are fp32, everything else is bf16. Sizes: `tiny`
(`smaug/model/model.py`: 64 pixels, patch 8, tubelet 4, width 128, heads of 32, decoder 64 wide) and `base` (ViT-B/16 at
224 pixels, heads of 64), tubelet 1 as the recipes have it and 2 as VideoMAE has it. Batches and lengths choose no
kernel (tests/kernels/ holds that), so one of each will do. fp32 products are not here: they use no tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static import padded_attention
from smaug import ops
from smaug.kernels import attention, gather_tokens, launch, noise, patch_embed, pixel_loss, random_mask, select_tokens
from smaug.kernels.launch import Launch
from smaug.tokens import PackedTokens

ARCHITECTURES = (80, 86, 89, 90, 100)
WIDTHS = (32, 64, 72, 80, 88, 96, 128, 256)  # of heads; the recipes have the first two
BF16 = torch.bfloat16

OPS = {
    attention: ("attention", "attention_backward"),
    gather_tokens: ("gather_tokens", "scatter_tokens", "scatter_fill_grad"),
    noise: ("noise",),
    patch_embed: ("patch_embed", "patch_embed_backward"),
    pixel_loss: ("pixel_loss", "pixel_loss_backward"),
    random_mask: ("random_mask",),
    select_tokens: ("select_tokens", "select_tokens_backward"),
}
LAUNCHERS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.smaug, name).default: getattr(module, name) for module, names in OPS.items() for name in names
}


class OnKernels(TorchDispatchMode):
    """Sends the ops of smaug to their launchers, whatever the device of the tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LAUNCHERS.get(func, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], None]
    ours: bool = True


def meta(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def floats(*shape: int, grad: bool = False) -> Tensor:
    return meta(*shape, dtype=torch.float32, grad=grad)


def attention_of_one_projection(e: int, dtype: torch.dtype = BF16, scores: str | None = None) -> None:
    """A block of an encoder, of [CLS] and patches or of words; pruning blocks ask for scores."""
    heads = 4
    q, k, v = meta(64 * 197, 3, heads, e, dtype=dtype, grad=True).unbind(1)
    out = ops.attention(q, k, v, ints(65), key_scores=scores)  # type: ignore[arg-type]
    (out[0] if scores else out).sum().backward()


def attention_to_frames(e: int, gate: bool) -> None:
    """A fusion block: words of a pair to the frames that its row of kv_ids names, weighed by the selector's gate."""
    q = meta(96 * 20, 4, e, grad=True)
    k, v = meta(64 * 197, 2, 4, e, grad=True).unbind(1)
    bias = floats(96, 2, grad=True) if gate else None
    ops.attention(q, k, v, ints(97), ints(65), kv_ids=ints(96, 2), segment_bias=bias).sum().backward()


def attention_with_everything(e: int) -> None:
    """All that the op offers at once: the most registers."""
    q, k, v = meta(640, 4, e, grad=True), meta(640, 2, e, grad=True), meta(640, 2, e, grad=True)
    o, lse, _ = ops.attention(
        *(q, k, v, ints(6), ints(6)),
        kv_ids=ints(5, 3),
        segment_bias=floats(5, 3, grad=True),
        key_bias=floats(640, grad=True),
        return_lse=True,
        key_scores="mean",
    )
    (o.sum() + lse.sum()).backward()


def embedding(
    d: int, pixels: int, patch: tuple[int, int, int], last: bool, parameters: torch.dtype, video: torch.dtype
) -> None:
    """Kept patches of clips, [CLS] of each moment in front. A float video asks for its gradient."""
    frames, side = 4 * patch[0], pixels // patch[1]
    clip = (frames, pixels, pixels, 3) if last else (frames, 3, pixels, pixels)
    n, kept = 4 * side * side, 4 * (side * side // 2)
    table = {name: meta(*shape, dtype=parameters, grad=True) for name, shape in dict(
        weight=(d, 3 * patch[0] * patch[1] * patch[2]), bias=(d,), position=(n, d), prefix=(1, d)).items()}  # fmt: skip
    values, *_ = torch.ops.smaug.patch_embed(
        *(meta(64, *clip, dtype=video, grad=video.is_floating_point), ints(64, kept), *table.values()),
        *(list(patch), [0.5] * 3, [0.25] * 3, True, True, BF16),  # the registered op: meta has no autocast
    )
    values.sum().backward()


def rebuilt_pixels(pixels: int, patch: tuple[int, int, int], last: bool, normalise: Any = "patch") -> None:
    frames, removed = 4 * patch[0], 200
    clip = (frames, pixels, pixels, 3) if last else (frames, 3, pixels, pixels)
    pred = meta(64, removed, 3 * patch[0] * patch[1] * patch[2], grad=True)
    video = meta(64, *clip, dtype=torch.uint8)
    ops.pixel_loss(pred, video, ints(64, removed), patch=patch, normalise=normalise).backward()


def masks(grid: tuple[int, int, int], keep: int, kind: Any = "random") -> None:
    seed = meta(dtype=torch.int64)
    ops.random_mask(meta(64, dtype=torch.int64), grid, keep, kind=kind, seed=seed, draw=seed)


def moved_rows(d: int) -> None:
    """gather and scatter with what fills the holes, and their gradients."""
    ids, cu = ints(64 * 157), ints(65)
    ops.gather_tokens(meta(64, 1568, d, grad=True), ids, cu).sum().backward()
    x, fill = meta(64 * 157, d, grad=True), floats(d, grad=True)
    ops.scatter_tokens(x, ids, 1568, fill, cu).sum().backward()


def pruned(d: int, scores_grad: bool = False, lengths: int | None = 197, **how: Any) -> None:
    rows, sequences = 64 * 197, 64
    values, scores = meta(rows, d, grad=True), floats(rows, grad=scores_grad)
    tokens = PackedTokens(values, ints(sequences + 1), ints(rows), floats(rows), 197, lengths)
    out, _, _ = ops.select_tokens(tokens, scores, prefix=1, **how)[:3]
    out.values.sum().backward()


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
    for name, d in (("tiny", 128), ("base", 768)):
        case(name, moved_rows, d)
        case(f"{name}, count", pruned, d, keep=137, fuse="mean")
    for e in WIDTHS:
        case("self", attention_of_one_projection, e)
        if e <= 64:
            case("self, cls scores", attention_of_one_projection, e, scores="cls")
            case("to frames", attention_to_frames, e, gate=e == 64)
    for e in (32, 64, 128):
        case("padded", padded_attention.forward_and_backward, e, ours=False)
    case("base, ratio, scores learn", pruned, 768, True, None, keep=0.7, fuse="sum")
    case("base, mass", pruned, 768, False, None, mass=0.9, fuse="mean", capacity=8000)
    case("base, tubelet 2, bf16 weights", embedding, 768, 224, (2, 16, 16), False, BF16, u8)
    case("base, tubelet 2, bf16 video learns", embedding, 768, 224, (2, 16, 16), False, BF16, BF16)
    for e in (64, 80, 96, 128, 256):
        case("everything", attention_with_everything, e)
    for e in WIDTHS:
        case("self", attention_of_one_projection, e, torch.float16)
    return made


def recorded(architecture: int) -> list[tuple[Case, Launch]]:
    """Every launch of every case, with the configurations that an architecture gets."""
    found = []
    for case in cases():
        with launch.record(architecture) as launches, OnKernels():
            case.run()
        found += [(case, each) for each in launches]
    return found
