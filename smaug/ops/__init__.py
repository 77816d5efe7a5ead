"""The ops: what each means, in its docstring; each is one registered torch op with a backward, on every device."""

import sys
from typing import Any

import torch

from smaug.ops.attention import FLOPS as _attention_flops
from smaug.ops.attention import attention
from smaug.ops.gather_tokens import FLOPS as _gather_flops
from smaug.ops.gather_tokens import gather_tokens, scatter_tokens
from smaug.ops.implementation import load_kernels
from smaug.ops.layer import SparseAttention
from smaug.ops.noise import FLOPS as _noise_flops
from smaug.ops.patch_embed import FLOPS as _patch_flops
from smaug.ops.patch_embed import patch_embed
from smaug.ops.pixel_loss import FLOPS as _pixel_flops
from smaug.ops.pixel_loss import pixel_loss
from smaug.ops.random_mask import FLOPS as _mask_flops
from smaug.ops.random_mask import keep_count, random_mask
from smaug.ops.select_tokens import FLOPS as _select_flops
from smaug.ops.select_tokens import select_tokens
from smaug.ops.warmup import warmup

_FLOPS: dict[Any, Any] = {
    **_mask_flops,
    **_noise_flops,
    **_patch_flops,
    **_gather_flops,
    **_attention_flops,
    **_select_flops,
    **_pixel_flops,
}


def register_flops() -> None:
    """Tell torch's FlopCounterMode what the ops cost; call it before making one. Calling it again does nothing.

    Not done at import: torch.utils.flop_counter imports Triton, which takes longer than all of smaug.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in _FLOPS.items():
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)


if "torch.utils.flop_counter" in sys.modules:
    register_flops()

if torch.cuda.is_available():  # elsewhere Triton is not even imported
    load_kernels()

__all__ = [
    "SparseAttention",
    "attention",
    "gather_tokens",
    "keep_count",
    "patch_embed",
    "pixel_loss",
    "random_mask",
    "register_flops",
    "scatter_tokens",
    "select_tokens",
    "warmup",
]
