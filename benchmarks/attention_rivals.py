"""Attention of packed sequences by whoever offers it, and the grid of lengths they are compared on.

A provider is `build(q, k, v, lengths) -> run`, and `run()` gives o (T, H, E) for packed q, k, v (T, H, E). What a user
makes once a batch (row numbers, masks, nested offsets) is made by build, outside the time; what every layer has to do
(bringing rows into a rectangle and out of it) is inside. One that cannot run here raises Unavailable with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.timing import compiled
from smaug import ops
from smaug.testing import offsets

Run = Callable[[], Tensor]
PATCHES = 196  # of a frame of 224 pixels, patch 16
KEEP = (0.1, 0.4, 1.0)
BATCH = (16, 64)  # frames: two and eight clips of eight
HEADS, WIDTH = 12, 64
DISTRIBUTIONS = ("equal", "spread", "longtail")


class Unavailable(Exception):
    """Why a provider cannot run: the device, the dtype, or what is not installed."""


def lengths_of(distribution: str, keep: float, batch: int) -> list[int]:
    """`batch` lengths around keep * 196 tokens, the same for everybody.

    equal: what a count mask leaves, plus [CLS]. spread: a fifth to nine fifths of that, uniformly, as pruning by mass
    leaves. longtail: exponential, cut at four times the mean, as captions and mixed images and videos are.
    """
    mean = max(1, round(keep * PATCHES)) + 1
    if distribution == "equal":
        return [mean] * batch
    draw = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    if distribution == "spread":
        return [max(1, round(mean * (0.2 + 1.6 * u))) for u in draw.tolist()]
    return [max(1, min(4 * mean, round(-mean * float((1 - u).log())))) for u in draw]


def inputs(lengths: list[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """q, k, v and the gradient of o, the same for everybody; they require gradients."""
    generator = torch.Generator().manual_seed(1)
    shape = sum(lengths), HEADS, WIDTH
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(4)]


def smaug(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    cu, host = offsets(lengths, q.device), tuple(lengths)
    return lambda: ops.attention(q, k, v, cu, lengths_q=host)


def looped_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    def run() -> Tensor:
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)

    return run


def _padded(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    """Rows into a rectangle (S, H, longest, E), attend, and out again; equal lengths are a view, with no mask."""
    longest, heads, width = max(lengths), *q.shape[1:]
    if min(lengths) == longest:
        return lambda: (
            attend(*(x.view(-1, longest, heads, width).transpose(1, 2) for x in (q, k, v)), None)
            .transpose(1, 2)
            .reshape(q.shape)
        )
    mask = torch.arange(longest, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    rows = mask.flatten().nonzero()[:, 0]
    keys = mask[:, None, None]

    def rectangle(x: Tensor) -> Tensor:
        full = x.new_zeros(mask.numel(), heads, width).index_copy(0, rows, x)
        return full.view(*mask.shape, heads, width).transpose(1, 2)

    return lambda: attend(*map(rectangle, (q, k, v)), keys).transpose(1, 2).flatten(0, 1).index_select(0, rows)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As timm, MAE and EViT write it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


padded_sdpa = functools.partial(_padded, _sdpa)
eager = functools.partial(_padded, _softmax)


@functools.cache
def _compiled_softmax() -> Callable[..., Tensor]:
    return compiled(_softmax, dynamic=True)


def eager_compiled(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    return _padded(_compiled_softmax(), q, k, v, lengths)


def nested_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    cu, longest, shortest = offsets(lengths, q.device).long(), max(lengths), min(lengths)

    def run() -> Tensor:
        parts = (
            torch.nested.nested_tensor_from_jagged(x, cu, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).values()

    return run


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return compiled(flex_attention, dynamic=False)


def flex_mask(lengths: list[int], device: torch.device):
    """The block mask of a document mask, made anew for each batch of lengths."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    rows = len(document)
    return create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, rows, rows, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    if q.device.type == "cpu":
        if torch.is_grad_enabled():
            raise Unavailable("FlexAttention has no backward on a CPU")
        q, k, v = q.detach(), k.detach(), v.detach()  # it refuses tensors that could ask for one
    mask = flex_mask(lengths, q.device)

    def run() -> Tensor:
        return _compiled_flex()(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return run


def _elsewhere(module: str, name: str, q: Tensor):
    """A function of a library that has no CPU path, or why not."""
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module}.{name} is not installed") from error
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"{module}.{name} takes 16-bit CUDA tensors alone")
    return function


def _varlen(module: str, name: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    function, cu, longest = _elsewhere(module, name, q), offsets(lengths, q.device), max(lengths)
    return lambda: function(q, k, v, cu, cu, longest, longest)


torch_varlen = functools.partial(_varlen, "torch.nn.attention.varlen", "varlen_attn")
flash_attn = functools.partial(_varlen, "flash_attn", "flash_attn_varlen_func")


def xformers(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    function = _elsewhere("xformers.ops", "memory_efficient_attention", q)
    mask = importlib.import_module("xformers.ops.fmha").attn_bias.BlockDiagonalMask.from_seqlens(lengths)
    return lambda: function(q[None], k[None], v[None], attn_bias=mask)[0]


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor, list[int]], Run]] = {
    "smaug": smaug,
    "eager": eager,
    "eager_compiled": eager_compiled,
    "padded_sdpa": padded_sdpa,
    "looped_sdpa": looped_sdpa,
    "nested_sdpa": nested_sdpa,
    "flex": flex,
    "torch_varlen": torch_varlen,
    "flash_attn": flash_attn,
    "xformers": xformers,
}
