"""Uniform random numbers on the GPU: a word of Philox an element, nothing is read but a draw that is there.

Writes 4 bytes an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smaug.kernels.launch import configured, launch


@triton.jit(do_not_specialize=["count", "seed_low", "seed_high", "word1"])
def _noise(out, draw, count, seed_low, seed_high, word1, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    zero = tl.full((), 0, tl.int32)
    if draw is not None:  # added to that in word1
        word1 += (tl.load(draw) << 8).to(tl.int32)
    word, _, _, _ = tl.philox(key, index, word1.to(tl.int32), zero, zero)
    tl.store(out + index, ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07, mask=index < count)  # 2^-23


def _int32(x: int) -> int:
    """The low 32 bits, signed: one type for every seed and draw, so that no step compiles anew."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def noise(like: Tensor, seed: int, draw: int, stream: int, draw_there: Tensor | None = None) -> Tensor:
    """`smaug::noise`; bit-equal to the reference. Fewer than 2^31 elements."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    count = out.numel()
    words = (_int32(x) for x in (seed, seed >> 32, stream | draw << 8))
    how = configured(_noise, dict(BLOCK=512, num_warps=4), out.dtype, 0)  # 4 numbers a thread
    launch(_noise, (triton.cdiv(count, how["BLOCK"]),), out, draw_there, count, *words, **how)
    return out


torch.library.register_kernel("smaug::noise", "cuda", noise)
