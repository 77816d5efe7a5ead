"""Predicted pixels against those of the patches that were removed; patches that stayed are never read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from smaug.ops.patch_embed import _channels_last, _gather_pixels, _geometry
from smaug.ops.random_mask import _refuse_triton


def _target(video: Tensor, ids: Tensor, patch: Sequence[int], normalise: str, acc: torch.dtype) -> Tensor:
    """(B * R, 3 * t * p * p) of at least one patch, in the weight's order."""
    raw = _gather_pixels(video, ids, patch)
    count = raw.shape[0]
    if _channels_last(video):
        raw = raw.view(count, -1, 3).transpose(1, 2).contiguous()  # (pixel, channel) -> (channel, pixel), as bytes
    x = raw.view(count, -1).to(acc)
    if video.dtype == torch.uint8:
        x.mul_(1 / 255)
    if normalise:
        shaped = x.view(count, 3, -1) if normalise == "patch_channel" else x
        var, mean = torch.var_mean(shaped, -1, keepdim=True)
        x = shaped.sub(mean).mul_(var.add_(1e-6).rsqrt_())
    return x.view(count, -1)


@torch.library.custom_op("smaug::pixel_loss", mutates_args=())
def _pixel_loss(
    pred: Tensor, video: Tensor, ids_removed: Tensor, patch: Sequence[int], normalise: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """-> loss (), and pred - target in pred's dtype for the backward, (0,) unless wanted."""
    acc = torch.promote_types(pred.dtype, torch.float32)
    if pred.numel() == 0:
        return pred.new_zeros((), dtype=acc), pred.new_zeros(pred.shape if wants_grad else (0,))
    flat = pred.reshape(-1, pred.shape[-1])
    # what is wrong on purpose: no chunks
    difference = flat.to(acc) - _target(video, ids_removed, patch, normalise, acc)
    loss = difference.square().mean()
    kept = difference.to(pred.dtype).view(pred.shape) if wants_grad else pred.new_empty(0)
    return loss, kept


@_pixel_loss.register_fake
def _(
    pred: Tensor, video: Tensor, ids_removed: Tensor, patch: Sequence[int], normalise: str, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(pred.dtype, torch.float32)
    return pred.new_empty((), dtype=acc), pred.new_empty(pred.shape if wants_grad else (0,))
