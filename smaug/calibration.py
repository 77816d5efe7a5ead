"""How fast this CPU does what a training step is made of: `Device.rates` of smaug/cost.py, in a few seconds.

Each operation is timed forward and backward under autograd, as a step runs it, and tells one rate: the time that is
left when all that is known already has been taken off, for each unit of what `cost` counts of it. Nothing here looks at
a recipe.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug import cost, ops
from smaug.cost import HEADS, LENGTHS, WIDTHS, Precision, Work
from smaug.device import Way
from smaug.tokens import packed_uniform

NUMBERS = 1 << 19  # of an operation's input, about: a step's tensors at tiny and small have 1e5 to 1e7
NEAR = 4 << 20  # bytes, more than the second-level cache of a core
WEIGHTS = 1 << 22  # that AdamW is timed on

Took = tuple[float, float]  # seconds of the processor, all threads together, and by the clock


@dataclass(frozen=True)
class Piece:
    tells: str  # which rate
    work: Work
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]  # of its input


def pieces(way: Way) -> Iterator[Piece]:
    """In an order in which each has one rate that is not known yet, but for small shares of later ones (of products in
    "weight", about a fifth of it). Sizes are those that steps have."""
    p = cost.BF16_CPU if way.dtype == torch.bfloat16 else cost.FP32
    up, down = cost.linear(8, 32, 128, p), cost.linear(8, 128, 32, p)
    small = [cost.norm(8, 32, p), up, cost.pointwise(8 * 128, p, keeps=True), down]
    layers = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    yield Piece("launch", cost.total(small), layers, (8, 32))
    rows = torch.randperm(NUMBERS // 128)
    read = Work(bytes=2 * p.stream * NUMBERS, backward_bytes=2 * p.stream * NUMBERS, launches=3)
    yield Piece("moved", read, lambda x: x.index_select(0, rows), (len(rows), 128))
    yield Piece("sum", cost.pointwise(NUMBERS, p, reads=2), lambda x: x + x, (NUMBERS,))
    yield Piece("gelu", cost.pointwise(NUMBERS, p, keeps=True), F.gelu, (NUMBERS,))
    yield Piece("norm", cost.norm(NUMBERS // 256, 256, p), nn.LayerNorm(256), (NUMBERS // 256, 256))
    yield Piece("weight", cost.linear(8, 1024, 1024, p), nn.Linear(1024, 1024), (8, 1024))
    for width in WIDTHS:
        side = NUMBERS // width, width
        yield Piece(f"product {width}", cost.linear(*side, width, p), nn.Linear(width, width), side)
    yield _pixels(64, p, way)
    yield _attention("attention", 2, 4, HEADS[0], p, way)
    for head in HEADS:
        for length in LENGTHS:
            tokens = 1024 if way.impl == "auto" else 256  # the reference takes one sequence after the other
            yield _attention(f"attention {head} x {length}", tokens // length, length, head, p, way)
    yield _keys(p, way)


def _pixels(clips: int, p: Precision, way: Way) -> Piece:
    """Half of the patches of small clips; the weight is what the gradient is for."""
    width, patch, tubelet = 128, 8, 2
    video = torch.randint(256, (clips, tubelet, 64, 64, 3), dtype=torch.uint8)
    ids = torch.arange(0, 64, 2, dtype=torch.int32).expand(clips, -1).contiguous()
    bias, each = torch.zeros(width, dtype=way.dtype), 3 * tubelet * patch**2

    def embed(weight: Tensor) -> Tensor:
        return ops.patch_embed(
            video, ids, weight, bias, patch=(tubelet, patch, patch), mean=(0.5,) * 3, std=(0.25,) * 3, impl=way.impl
        ).values

    pixels = ids.numel() * each
    work = Work(launches=12, amounts={"pixel": pixels, **cost.product(4 * pixels * width, width)})
    return Piece("pixel", work, embed, (width, each))


def _attention(tells: str, sequences: int, length: int, head: int, p: Precision, way: Way, heads: int = 4) -> Piece:
    rows, width = sequences * length, heads * head
    tokens = packed_uniform(torch.empty(rows, 1), length)

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.view(rows, 3, heads, head).unbind(1)
        return ops.attention(q, k, v, tokens.cu_seqlens, lengths_q=tokens.lengths, impl=way.impl).flatten(1)

    return Piece(tells, cost.attention(rows, rows, rows * length, width, heads, p), attend, (rows, 3 * width))


def _keys(p: Precision, way: Way, videos: int = 64, length: int = 64, heads: int = 4, head: int = 32) -> Piece:
    """A word of each of two texts looks at a video."""
    texts, rows, width = 2 * videos, videos * length, heads * head
    words, keys = packed_uniform(torch.empty(texts, 1), 1), packed_uniform(torch.empty(rows, 1), length)
    q = torch.randn(texts, heads, head, dtype=way.dtype, requires_grad=True)
    kv_ids = torch.arange(texts, dtype=torch.int32)[:, None] % videos

    def look(x: Tensor) -> Tensor:
        k, v = x.view(rows, 2, heads, head).unbind(1)
        return ops.attention(
            q, k, v, words.cu_seqlens, keys.cu_seqlens, kv_ids=kv_ids, lengths_q=words.lengths, lengths_k=keys.lengths,
            impl=way.impl,
        ).flatten(1)  # fmt: skip

    seen = texts * length
    return Piece("key", cost.attention(texts, rows, seen, width, heads, p, gathered=seen), look, (rows, 2 * width))


def rates(way: Way, seconds: float = 5.0) -> dict[str, tuple[float, float]]:
    """Seconds of one unit, forward and backward, with the threads there are, measured in about so many seconds."""
    threads, found, todo = torch.get_num_threads(), dict[str, tuple[float, float]](), list(pieces(way))
    share = seconds / (len(todo) + 2) / min(threads, 2)
    try:
        _timed(todo[0], way, share)  # what a first call takes longer is nobody's rate
        for piece in todo:
            each = _typical(functools.partial(_timed, piece, way, share), threads)
            known, units = cost.calibrated(piece.work, found), cost.amounts(piece.work)[piece.tells]
            there, back = (max(0.0, took - rest) / units for took, rest in zip(each, known, strict=True))
            found[piece.tells] = there, back
        found["adamw"] = 0.0, _typical(functools.partial(_adamw, share), threads)[0] / WEIGHTS
    finally:
        torch.set_num_threads(threads)
    return found


def _typical(time_it: Callable[[], list[list[Took]]], threads: int) -> list[float]:
    """Seconds of each thing that is timed: what one thread gets of the processor for it, shortened as much as more of
    them shorten it by the clock, which for products is most of it and for AdamW nothing. By the clock alone, two
    threads whose cores others use were told from 5 to 160 s for the same 20 steps. What others take of caches and
    memory still shows, a third more or so."""
    torch.set_num_threads(1)
    alone = time_it()
    torch.set_num_threads(threads)
    together = time_it() if threads > 1 else alone
    return [
        median(used for used, _ in one) * median(wall for _, wall in many) / median(wall for _, wall in one)
        for one, many in zip(alone, together, strict=True)
    ]


def _timed(piece: Piece, way: Way, seconds: float) -> list[list[Took]]:
    """Its forwards and its backwards. Before each something else uses the near cache, as in a step: small operations
    then take half as long again, code and all."""
    x, other = torch.randn(piece.shape).to(way.dtype).requires_grad_(), torch.ones(NEAR // 4)
    taken: list[list[Took]] = [[], []]
    began = time.perf_counter()
    while len(taken[0]) < 4 or time.perf_counter() - began < seconds:
        other.add_(1)
        begin = _now()
        with way.autocast():  # casts weights once in each
            y = piece.function(x)
        taken[0].append(_since(begin))
        grad = torch.ones_like(y.detach())
        other.add_(1)
        begin = _now()
        y.backward(grad)
        taken[1].append(_since(begin))
        x.grad = None
        if isinstance(piece.function, nn.Module):
            piece.function.zero_grad()
    return [times[1:] for times in taken]


def _adamw(seconds: float) -> list[list[Took]]:
    """Of WEIGHTS, with the norm of all gradients, as `Update` has it."""
    weights = [nn.Parameter(torch.zeros(WEIGHTS // 16)) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer, taken = torch.optim.AdamW(weights, fused=True), list[Took]()
    began = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - began < seconds:
        begin = _now()
        nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        optimizer.step()
        taken.append(_since(begin))
    return [taken[1:]]


def _now() -> Took:
    return time.process_time(), time.perf_counter()


def _since(begin: Took) -> Took:
    used, wall = _now()
    return used - begin[0], wall - begin[1]
