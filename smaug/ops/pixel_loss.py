"""Predicted pixels against those of the patches that were removed; patches that stayed are never read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import CustomOpDef

from smaug.ops.implementation import reference_of, refuse
from smaug.ops.patch_embed import _channels_last, _gather_pixels, _geometry

# Elements of one chunk: in fp32 about half the second-level cache of one core, six times faster than all at once.
_CHUNK = 1 << 17


def _target(raw: Tensor, last: bool, normalise: str, acc: torch.dtype) -> Tensor:
    """(n, P) pixels in the order of `_gather_pixels` -> (n, P) in the weight's order, what pred should be."""
    count = raw.shape[0]
    if last:
        raw = raw.view(count, -1, 3).transpose(1, 2)  # (pixel, channel) -> (channel, pixel)
    x = raw.to(acc, memory_format=torch.contiguous_format, copy=True)
    scale = 255 if raw.dtype == torch.uint8 else 1
    if normalise:
        # still on the scale of bytes: their sums are exact, so a flat patch is exactly 0
        x = x.view(count, 3 if normalise == "patch_channel" else 1, -1)
        x.sub_(x.mean(-1, keepdim=True))
        # not torch.var_mean: six times slower on a CPU
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        x.mul_(square.div_(x.shape[-1] - 1).add_(1e-6 * scale**2).rsqrt_())
    elif scale != 1:
        x.mul_(1 / scale)
    return x.view(count, -1)


@torch.library.custom_op("smaug::pixel_loss", mutates_args=())
def _pixel_loss(
    pred: Tensor, video: Tensor, ids_removed: Tensor, patch: Sequence[int], normalise: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """-> loss (), and pred - target in pred's dtype for the backward, (0,) unless wanted."""
    acc = torch.promote_types(pred.dtype, torch.float32)
    difference = pred.new_empty(pred.shape if wants_grad else (0,))
    if pred.numel() == 0:
        return pred.new_zeros((), dtype=acc), difference
    width, last = pred.shape[-1], _channels_last(video)
    flat = pred.reshape(-1, width)
    raw = _gather_pixels(video, ids_removed, patch)
    step = max(1, _CHUNK // width) if pred.device.type == "cpu" else flat.shape[0]
    sums = []
    for first in range(0, flat.shape[0], step):
        part = slice(first, first + step)
        x = _target(raw[part], last, normalise, acc)
        torch.sub(flat[part], x, out=x)
        if wants_grad:
            difference.view(-1, width)[part] = x
        sums.append(torch.linalg.vector_norm(x, dim=-1).square_().sum())
    return torch.stack(sums).sum() / pred.numel(), difference


@_pixel_loss.register_fake
def _(
    pred: Tensor, video: Tensor, ids_removed: Tensor, patch: Sequence[int], normalise: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty((), dtype=acc), pred.new_empty(pred.shape if wants_grad else (0,))


@torch.library.custom_op("smaug::pixel_loss_backward", mutates_args=())
def _pixel_loss_backward(grad: Tensor, difference: Tensor) -> Tensor:
    # grad is a scalar tensor: the product is fp32 and rounded once. A CPU is six times faster with a plain number.
    scale = grad * (2 / max(difference.numel(), 1))
    return difference.mul(scale.item() if scale.device.type == "cpu" else scale)


@_pixel_loss_backward.register_fake
def _(grad: Tensor, difference: Tensor) -> Tensor:
    return difference.new_empty(difference.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any, *, op: CustomOpDef) -> tuple[Any, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    return op(grad, *ctx.saved_tensors), *(None,) * 5


_pixel_loss_reference, _pixel_loss_backward_reference = map(reference_of, (_pixel_loss, _pixel_loss_backward))
_pixel_loss.register_autograd(partial(_backward, op=_pixel_loss_backward), setup_context=_setup)
_pixel_loss_reference.register_autograd(partial(_backward, op=_pixel_loss_backward_reference), setup_context=_setup)


def pixel_loss(
    pred: Tensor,
    video: Tensor,
    ids_removed: Tensor,
    *,
    patch: int | tuple[int, int, int],
    normalise: Literal["patch", "patch_channel"] | None = "patch",
    impl: str = "auto",
) -> Tensor:
    """Mean squared error of predicted pixels over the patches that were removed -> scalar, fp32.

        loss = mean over (b, r, p) of (pred - target)^2        target = (x - mean(x)) / sqrt(var(x) + 1e-6)

    pred         (B, R, 3 * t * p * p), a patch in the weight's order: channel, frame, row, column.
    video        uint8 (0..255) or float (0..1), (B, F, 3, H, W) or (B, F, H, W, 3); H, W, F multiples of the patch.
                 As in `patch_embed`: dense in memory, or else copied once; channels come first where both could be.
    ids_removed  (B, R) int, of `random_mask`; tube * N + patch. Not range-checked. R = 0 gives 0.
    patch        p or (t, p, p).
    normalise    x are pixels on the 0..1 scale; mean and the unbiased variance are of one patch ("patch", MAE), or of
                 one channel of it ("patch_channel", as in VideoMAE); None: target = x.

    Only removed patches are read. Gradient to pred alone, (pred - target) * 2 / (B * R * P), for which the forward
    keeps pred - target in pred's dtype. Sums are fp32. Deterministic, no host read. Memory bound: reads pred and a
    byte a pixel. MAE, He et al. 2022; VideoMAE, Tong et al. 2022, adds its 1e-6 to the root, not to the variance.
    """
    size = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    if video.ndim != 5 or (video.shape[2] != 3 and video.shape[4] != 3):
        raise ValueError(f"video must be (B, F, 3, H, W) or (B, F, H, W, 3), but is {tuple(video.shape)}.")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"video must be uint8 or float, but is {video.dtype}; convert it first.")
    if normalise not in ("patch", "patch_channel", None):
        raise ValueError(f'normalise={normalise!r} is unknown; use "patch", "patch_channel" or None.')
    if video.shape[2] == 3 and not video.is_contiguous():
        stored = video.permute(0, 1, 3, 4, 2)
        if stored.is_contiguous() and stored.shape[2] != 3:
            video = stored  # a channels-last picture under a channels-first shape
    b, tubes, rows, columns, last = _geometry(video, size)
    h, w = (video.shape[2], video.shape[3]) if last else (video.shape[3], video.shape[4])
    if (tubes * size[0], rows * size[1], columns * size[2]) != (video.shape[1], h, w):
        raise ValueError(f"{video.shape[1]} frames of {h} x {w} pixels are no whole number of patches {size}.")
    if ids_removed.ndim != 2 or ids_removed.shape[0] != b:
        raise ValueError(f"ids_removed must be ({b}, R), a row a clip, but is {tuple(ids_removed.shape)}.")
    pixels = size[0] * size[1] * size[2]
    if pred.shape != (*ids_removed.shape, 3 * pixels):
        raise ValueError(f"pred must be {(*ids_removed.shape, 3 * pixels)}, but is {tuple(pred.shape)}.")
    if normalise == "patch_channel" and pixels == 1:
        raise ValueError('normalise="patch_channel" needs more than one pixel a patch; use "patch" or None.')
    wants_grad = torch.is_grad_enabled() and pred.requires_grad
    refuse(impl, "pixel_loss", pred)
    op = _pixel_loss_reference if impl == "reference" else _pixel_loss
    return op(pred, video.detach(), ids_removed, size, normalise or "", wants_grad)[0]


def _flops(pred: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    # difference, square and sum; with statistics also two sums, a square, a shift and a scale
    return pred.numel() * (8 if args[3] else 3)


def _backward_flops(grad: Tensor, difference: Tensor, out_val: Any = None) -> int:
    return difference.numel()


FLOPS = {
    torch.ops.smaug.pixel_loss: _flops,
    torch.ops.smaug.pixel_loss_reference: _flops,
    torch.ops.smaug.pixel_loss_backward: _backward_flops,
    torch.ops.smaug.pixel_loss_backward_reference: _backward_flops,
}
