"""Which code an op runs: what `impl` means, the same for all of them.

"auto"       on a CUDA device the Triton kernel, elsewhere the path in the op's own file.
"triton"     the kernel, or a RuntimeError that says why it cannot run.
"reference"  never the kernel, in the backward neither: the path in the op's own file, on every device.
"""

from __future__ import annotations

import importlib
import warnings

import torch
from torch import Tensor
from torch.library import CustomOpDef

KERNELS = {  # by file of smaug.kernels, the registered ops it has launchers for
    "attention": ("attention", "attention_backward"),
    "gather_tokens": ("gather_tokens", "scatter_tokens", "scatter_fill_grad"),
    "noise": ("noise",),
    "patch_embed": ("patch_embed", "patch_embed_backward"),
    "pixel_loss": ("pixel_loss", "pixel_loss_backward"),
    "random_mask": ("random_mask",),
    "select_tokens": ("select_tokens", "select_tokens_backward"),
}

_status = ""


def load_kernels() -> str:
    """Registers the Triton kernels for CUDA tensors -> "ok", or one sentence that says why they cannot run here."""
    global _status  # not functools.cache: torch.compile looks through it, and cannot trace the imports
    if not _status:
        from smaug.kernels import triton_status

        _status = triton_status()
        if _status == "ok":
            for name in KERNELS:
                importlib.import_module(f"smaug.kernels.{name}")
        else:
            warnings.warn(f"smaug.ops runs on PyTorch's own operations on this GPU: {_status}", stacklevel=2)
    return _status


def refuse(impl: str, op: str, x: Tensor) -> None:
    """Raises where `impl` cannot be obeyed for a call of the op on x."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl={impl!r} is unknown to {op}; use "auto", "triton" or "reference".')
    if impl == "triton" and x.device.type not in ("cuda", "meta"):
        raise RuntimeError(
            f'{op}: impl="triton" runs on CUDA tensors, and these are on the {x.device.type}; use impl="auto".'
        )
    if impl == "triton" and x.device.type == "cuda" and load_kernels() != "ok":
        raise RuntimeError(f'{op}: impl="triton" cannot run: {load_kernels()} Use impl="auto".')


def reference_of(op: CustomOpDef) -> CustomOpDef:
    """The op once more as smaug::<name>_reference, which impl="reference" calls: nobody registers a kernel for it.

    A name of its own, and not `op.set_kernel_enabled("cuda", False)` around the call: that ends before the backward
    begins, and inside torch.compile before anything has run. Its autograd is the caller's to register.
    """
    assert op._abstract_fn is not None
    reference = torch.library.custom_op(f"{op._qualname}_reference", op._init_fn, mutates_args=())
    reference.register_fake(op._abstract_fn)
    return reference
