"""Uniform random numbers from a counter: the same on every device, without torch's generators and in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from smaug.ops.implementation import reference_of, refuse
from smaug.ops.random_mask import philox

_LOW32 = 0xFFFFFFFF


@torch.library.custom_op("smaug::noise", mutates_args=())
def _noise(like: Tensor, seed: int, draw: int, stream: int, draw_there: Tensor | None = None) -> Tensor:
    """draw_there () int64 is added to draw: a captured graph reads it anew at every replay."""
    index = torch.arange(like.numel(), device=like.device)
    other = torch.zeros((), dtype=torch.int64, device=like.device)
    key = (other + (seed & _LOW32), other + (seed >> 32 & _LOW32))
    word1 = other + ((stream | draw << 8) & _LOW32)
    if draw_there is not None:
        word1 = (word1 + (draw_there << 8)) & _LOW32
    word = philox((index, word1, other, other), key)[0]
    return (((word >> 9).float() + 0.5) * 2.0**-23).view(like.shape)


@_noise.register_fake
def _(like: Tensor, seed: int, draw: int, stream: int, draw_there: Tensor | None = None) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)


_noise_reference = reference_of(_noise)


def noise(like: Tensor, *, seed: int, draw: int | Tensor = 0, stream: int = 0, impl: str = "auto") -> Tensor:
    """fp32, uniform in (0, 1), of the shape and on the device of `like`, whose values are not read.

        noise[i] = ((word 0 >> 9) + 1/2) / 2^23        i counts the elements in order

    The words are Philox4x32-10's: key (seed low, seed high), counter (i, stream | draw << 8, 0, 0). seed and stream are
    host ints; draw is one, or an int64 tensor () on the device, with the same numbers. 23 bits: with 24, a half more
    would round up to 1. No gradient, no host read.
    """
    seed &= 0xFFFFFFFFFFFFFFFF  # as int64 holds it
    refuse(impl, "noise", like)
    op = _noise_reference if impl == "reference" else _noise
    seed = seed - (1 << 64) if seed >> 63 else seed
    if isinstance(draw, Tensor):
        return op(like.detach(), seed, 0, stream, draw)
    return op(like.detach(), seed, draw, stream)


def _flops(*args: object, out_val: object = None, **kwargs: object) -> int:
    return 0  # integer work


FLOPS = {torch.ops.smaug.noise: _flops, torch.ops.smaug.noise_reference: _flops}
