"""Which code an op runs: what `impl` means, the same for all of them.

"auto"       on a CUDA device the Triton kernel, elsewhere the path in the op's own file.
"triton"     the kernel, or a RuntimeError that says why it cannot run.
"reference"  never the kernel. In the backward of an op other than attention this cannot be kept: there the registered
             backward runs, and that is the kernel where one is registered.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from typing import Any

from torch import Tensor

KERNELS = ("attention", "gather_tokens", "noise", "patch_embed", "pixel_loss", "random_mask", "select_tokens")


@functools.cache
def load_kernels() -> str:
    """Registers the Triton kernels for CUDA tensors -> "ok", or one sentence that says why they cannot run here."""
    from smaug.kernels import triton_status

    status = triton_status()
    if status == "ok":
        for name in KERNELS:
            importlib.import_module(f"smaug.kernels.{name}")
    else:
        warnings.warn(f"smaug.ops runs on PyTorch's own operations on this GPU: {status}", stacklevel=2)
    return status


def running(impl: str, op: str, x: Tensor, registered: Any) -> contextlib.AbstractContextManager[None]:
    """Obeys or refuses `impl` for a call on x of the registered op; the call belongs inside of what this returns."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl={impl!r} is unknown to {op}; use "auto", "triton" or "reference".')
    if impl == "triton" and x.device.type not in ("cuda", "meta"):
        raise RuntimeError(
            f'{op}: impl="triton" runs on CUDA tensors, and these are on the {x.device.type}; use impl="auto".'
        )
    if impl == "triton" and x.device.type == "cuda" and load_kernels() != "ok":
        raise RuntimeError(f'{op}: impl="triton" cannot run: {load_kernels()} Use impl="auto".')
    if impl == "reference" and x.device.type == "cuda" and load_kernels() == "ok":
        return registered.set_kernel_enabled("cuda", False)
    return contextlib.nullcontext()
