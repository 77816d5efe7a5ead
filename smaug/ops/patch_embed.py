"""Kept patches of a uint8 video -> embedded tokens; patches that were masked are never read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import CustomOpDef

from smaug.ops.implementation import reference_of, refuse
from smaug.tokens import PackedTokens


def _geometry(video: Tensor, patch: Sequence[int]) -> tuple[int, int, int, int, bool]:
    """B, tubes, rows and columns of patches, channels last."""
    last = _channels_last(video)
    b, f = video.shape[:2]
    h, w = (video.shape[2], video.shape[3]) if last else (video.shape[3], video.shape[4])
    t, ph, pw = patch
    return b, f // t, h // ph, w // pw, last


def _channels_last(video: Tensor) -> bool:
    return video.shape[2] != 3


def _pixel_rows(video: Tensor, ids: Tensor, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The video as rows that lie whole inside a patch, and which rows make up each kept patch, in order.

    Channels first: a row is pw pixels of one channel, (channel, frame, row) of them a patch. Channels last: 3 * pw
    numbers, (frame, row) of them a patch.
    """
    b, _, rows, columns, last = _geometry(video, patch)
    t, ph, pw = patch
    device = video.device
    ids = ids.long()
    tube, row, column = ids // (rows * columns), ids // columns % rows, ids % columns
    clip = torch.arange(b, device=device)[:, None]
    frame = clip * video.shape[1] + tube * t
    y = torch.arange(ph, device=device)
    z = torch.arange(t, device=device)[:, None]
    h = rows * ph
    if last:
        first = (frame * h + row * ph) * columns + column
        inside = (z * h + y) * columns
        width = 3 * pw
    else:
        first = (frame * 3 * h + row * ph) * columns + column
        channel = torch.arange(3, device=device)[:, None, None]
        inside = ((z * 3 + channel) * h + y) * columns
        width = pw
    index = first.reshape(-1, 1) + inside.reshape(-1)
    return video.contiguous().view(-1, width), index.reshape(-1)


def _gather_pixels(video: Tensor, ids: Tensor, patch: Sequence[int]) -> Tensor:
    """(B * K, 3 * t * ph * pw) in the video's dtype, in the order of `_weight_rows`."""
    flat, index = _pixel_rows(video, ids, patch)
    shape = ids.shape[0] * ids.shape[1], 3 * math.prod(patch)
    width = flat.shape[1] * flat.element_size()
    if flat.dtype == torch.uint8 and width % 8 == 0 and flat.storage_offset() % 8 == 0:
        # eight pixels as one int64: an eighth of the work of gathering bytes
        words = flat.view(torch.int64)
        words = words.view(-1) if words.shape[1] == 1 else words
        return words.index_select(0, index).view(torch.uint8).view(shape)
    return flat.index_select(0, index).view(shape)


def _weight_rows(weight: Tensor, patch: Sequence[int], last: bool) -> Tensor:
    """weight (D, 3 * t * p * p) in the order the pixels are gathered: its index is permuted, never the video."""
    if not last:
        return weight
    return weight.view(-1, 3, *patch).permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1)


def _per_channel(values: Sequence[float], like: Tensor, patch: Sequence[int], last: bool) -> Tensor:
    """(3 * t * p * p,) fp32: a channel's number at each place of a gathered patch."""
    t, ph, pw = patch
    each = [like.new_full((1,), v, dtype=torch.float32) for v in values]
    channel = torch.cat(each)
    return channel.repeat(t * ph * pw) if last else channel.repeat_interleave(t * ph * pw, output_size=3 * t * ph * pw)


def _pixels(video: Tensor, ids: Tensor, patch: Sequence[int], mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    raw = _gather_pixels(video, ids, patch)
    if video.dtype == torch.uint8:
        # x - 128 is exact in bf16 and centred, so the sums cancel nothing
        return raw.bitwise_xor(128).view(torch.int8).to(dtype)
    return ((raw.to(torch.promote_types(raw.dtype, torch.float32)) - mean) / std).to(dtype)


def _places(ids: Tensor, tubes: int, n: int, prefix: int, per_frame: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Row of every kept patch in the packed result (B * K,), rows of the prefixes (S, n) and cu_seqlens (S + 1,)."""
    b, k = ids.shape
    device = ids.device
    clip = torch.arange(b, device=device)[:, None]
    position = torch.arange(k, device=device)
    if per_frame:
        first_id = (torch.arange(tubes + 1, device=device, dtype=ids.dtype) * n).expand(b, -1).contiguous()
        before = torch.searchsorted(ids.contiguous(), first_id)
        total = k + tubes * prefix
        start = clip * total + before[:, :-1] + torch.arange(tubes, device=device) * prefix
        rows = clip * total + position + (ids.long() // n + 1) * prefix
        starts = start.reshape(-1)
        end = starts.new_full((1,), b * total)
    else:
        total = k + prefix
        rows = clip * total + position + prefix
        starts = clip.reshape(-1) * total
        end = starts.new_full((1,), b * total)
    prefix_rows = starts[:, None] + torch.arange(prefix, device=device) if prefix else None
    return rows.reshape(-1), prefix_rows, torch.cat([starts, end]).to(torch.int32)


def _even(k: int, tubes: int, per_frame: bool, uniform: bool) -> int | None:
    """Kept patches of a sequence where the host knows it, so that rows are views and nothing is indexed."""
    if not per_frame:
        return k
    return k // tubes if uniform else None


@torch.library.custom_op("smaug::patch_embed", mutates_args=())
def _patch_embed(
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, tubes, grid_rows, columns, last = _geometry(video, patch)
    n_patches, d, k = grid_rows * columns, weight.shape[0], ids_keep.shape[1]
    n = 0 if prefix is None else prefix.shape[0]
    acc = torch.promote_types(weight.dtype, torch.float32)
    mean_, std_ = (_per_channel(x, weight, patch, last) for x in (mean, std))
    w = _weight_rows(weight.to(acc), patch, last)
    offset = weight.new_zeros(d, dtype=acc) if bias is None else bias.to(acc)
    if video.dtype == torch.uint8:
        # (x / 255 - mean) / std = (x - 128) * w / (255 std) + (128 / 255 - mean) / std, the second a constant
        offset = offset + w @ ((128 / 255 - mean_) / std_).to(acc)
        w = w / (255 * std_)
    pixels = _pixels(video, ids_keep, patch, mean_, std_, dtype)
    tokens = torch.mm(pixels, w.to(dtype).t())
    if position is None:
        shift = offset.to(dtype)
    else:
        table = (position.to(acc) + offset).to(dtype)
        shift = table[(ids_keep if position.shape[0] != n_patches else ids_keep % n_patches).reshape(-1).long()]

    count = b * tubes if per_frame else b
    values = weight.new_empty((b * k + count * n, d), dtype=dtype)
    ids = ids_keep.new_empty(values.shape[0], dtype=torch.int32)
    each = _even(k, tubes, per_frame, uniform)
    if each is not None:
        cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=video.device) * (n + each)
        shape = (count, n + each)
        body = values.view(*shape, d)[:, n:]
        torch.add(tokens.view(count, each, d), shift.view(-1, each, d) if position is not None else shift, out=body)
        if prefix is not None:
            values.view(*shape, d)[:, :n] = prefix.to(dtype)
        ids.view(shape)[:, :n] = -1
        ids.view(shape)[:, n:] = ids_keep.reshape(count, each)
    else:
        rows, prefix_rows, cu_seqlens = _places(ids_keep, tubes, n_patches, n, per_frame)
        values.index_copy_(0, rows, tokens.add_(shift))
        ids.fill_(-1)
        ids.index_copy_(0, rows, ids_keep.reshape(-1).to(torch.int32))
        if prefix is not None and prefix_rows is not None:
            values.index_copy_(0, prefix_rows.reshape(-1), prefix.to(dtype).repeat(count, 1))
    size = values.new_ones(values.shape[0], dtype=torch.float32)
    return values, cu_seqlens, ids, size


@_patch_embed.register_fake
def _(
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, tubes, _, _, _ = _geometry(video, patch)
    count = b * tubes if per_frame else b
    total = b * ids_keep.shape[1] + (0 if prefix is None else count * prefix.shape[0])
    return (
        weight.new_empty((total, weight.shape[0]), dtype=dtype),
        weight.new_empty((count + 1,), dtype=torch.int32),
        weight.new_empty((total,), dtype=torch.int32),
        weight.new_empty((total,), dtype=torch.float32),
    )


@torch.library.custom_op("smaug::patch_embed_backward", mutates_args=())
def _patch_embed_backward(
    grad: Tensor,
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    positions: int,
    prefixes: int,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    video_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, tubes, grid_rows, columns, last = _geometry(video, patch)
    n_patches, d, k = grid_rows * columns, weight.shape[0], ids_keep.shape[1]
    acc = torch.promote_types(weight.dtype, torch.float32)
    mean_, std_ = (_per_channel(x, weight, patch, last) for x in (mean, std))
    count = b * tubes if per_frame else b
    each = _even(k, tubes, per_frame, uniform)
    if each is not None:
        shaped = grad.reshape(count, prefixes + each, d)
        dtokens = shaped[:, prefixes:].reshape(b * k, d)
        dprefix = shaped[:, :prefixes].to(acc).sum(0)
    else:
        rows, prefix_rows, _ = _places(ids_keep, tubes, n_patches, prefixes, per_frame)
        dtokens = grad.index_select(0, rows)
        dprefix = grad.new_zeros((0, d), dtype=acc) if prefix_rows is None else grad[prefix_rows].to(acc).sum(0)
    dtokens_acc = dtokens.to(acc)
    if positions:
        index = ids_keep.reshape(-1).long()
        if positions == n_patches:
            index = index % n_patches
        # sorted sums, as an embedding's: deterministic on every device
        dposition = torch.ops.aten.embedding_dense_backward(dtokens_acc, index, positions, -1, False)
    else:
        dposition = grad.new_zeros((0, d), dtype=acc)
    dbias = dtokens_acc.sum(0)
    pixels = _pixels(video, ids_keep, patch, mean_, std_, grad.dtype)
    dweight = torch.mm(dtokens.t(), pixels).to(acc)
    if video.dtype == torch.uint8:
        dweight = dweight / (255 * std_) + dbias[:, None] * ((128 / 255 - mean_) / std_)
    if last:
        dweight = dweight.view(d, *patch, 3).permute(0, 4, 1, 2, 3).reshape(d, -1)
    if video_grad:
        w = _weight_rows(weight.to(acc), patch, last) / std_
        dpixels = torch.mm(dtokens, w.to(dtokens.dtype)).to(video.dtype)
        flat, index = _pixel_rows(video, ids_keep, patch)
        dvideo = video.new_zeros(flat.shape).index_copy_(0, index, dpixels.view(-1, flat.shape[1])).view(video.shape)
    else:
        dvideo = video.new_empty(0)
    return dweight, dbias, dposition, dprefix, dvideo


@_patch_embed_backward.register_fake
def _(
    grad: Tensor,
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    positions: int,
    prefixes: int,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    per_frame: bool,
    uniform: bool,
    video_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = weight.shape[0]
    acc = torch.promote_types(weight.dtype, torch.float32)
    return (
        weight.new_empty((d, weight.shape[1]), dtype=acc),
        weight.new_empty((d,), dtype=acc),
        weight.new_empty((positions, d), dtype=acc),
        weight.new_empty((prefixes, d), dtype=acc),
        video.new_empty(video.shape if video_grad else (0,)),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    video, ids_keep, weight, bias, position, prefix, patch, mean, std, per_frame, uniform, _ = inputs
    ctx.save_for_backward(video, ids_keep, weight)
    ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, position, prefix)]
    ctx.rows = [0 if x is None else x.shape[0] for x in (position, prefix)]
    ctx.rest = (patch, mean, std, per_frame, uniform)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any, op: CustomOpDef) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    video, ids_keep, weight = ctx.saved_tensors
    video_grad = ctx.needs_input_grad[0]
    dweight, dbias, dposition, dprefix, dvideo = op(grad, video, ids_keep, weight, *ctx.rows, *ctx.rest, video_grad)
    grads = [
        g.to(t) if t is not None else None
        for g, t in zip((dweight, dbias, dposition, dprefix), ctx.dtypes, strict=True)
    ]
    return (dvideo if video_grad else None, None, *grads, *(None,) * 6)


_patch_embed_reference, _patch_embed_backward_reference = map(reference_of, (_patch_embed, _patch_embed_backward))
_patch_embed.register_autograd(partial(_backward, op=_patch_embed_backward), setup_context=_setup)
_patch_embed_reference.register_autograd(partial(_backward, op=_patch_embed_backward_reference), setup_context=_setup)


def patch_embed(
    video: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: int | tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    prefix_per: Literal["clip", "frame"] = "clip",
    uniform: bool = False,
    impl: str = "auto",
) -> PackedTokens:
    """Embed the kept patches of a video, and read no others -> PackedTokens of B * (K + n) or B * (K + F * n) rows.

    video     uint8 (0..255) or float (0..1), (B, F, 3, H, W) or (B, F, H, W, 3); H, W, F multiples of the patch.
              Dense in memory, or else copied once. Where both could be meant, channels come first.
    ids_keep  (B, K) int, ascending in each clip; tube * N + patch, N = rows * columns. Not range-checked.
    weight    (D, 3 * t * p * p), the Conv3d's, flattened: channel, frame, row, column. bias (D,).
    patch     p or (t, p, p). mean, std: three Python floats on the 0..1 scale.
    position  (N, D), the same in every frame, or (F * N, D).
    prefix    (n, D): [CLS] or registers, at the front of each sequence, ids -1, no position added.
    prefix_per "clip": a sequence is a clip, K + n rows. "frame": a sequence is a frame (a tube where t > 1) with a
              prefix of its own; its length depends on the mask and ``lengths`` is None, unless ``uniform=True``
              promises K / F patches of every frame (kind="tube"); an untrue promise mixes up frames.

        token = weight @ ((pixel / 255 - mean) / std) + bias + position[id]

    The result has the weight's dtype, or autocast's. uint8 pixels are centred to x - 128, exact in bf16, and mean and
    std fold into the weight in fp32. Channels-last video permutes the weight's index, not the video.
    Gradients: weight, bias, position, prefix; video only if it is float and asks. No host read.
    Cost: 2 * B * K * 3tp^2 * D FLOPs forward, the same again for dweight. MAE (He et al. 2022), section 3, embeds all
    patches and drops most; the numbers are the same.
    """
    size = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    if video.ndim != 5 or (video.shape[2] != 3 and video.shape[4] != 3):
        raise ValueError(f"video must be (B, F, 3, H, W) or (B, F, H, W, 3), but is {tuple(video.shape)}.")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"video must be uint8 or float, but is {video.dtype}; convert it first.")
    if not video.is_contiguous() and video.shape[2] == 3 and video.permute(0, 1, 3, 4, 2).is_contiguous():
        video = video.permute(0, 1, 3, 4, 2)  # a channels-last picture under a channels-first shape
        if video.shape[2] == 3:
            video = video.permute(0, 1, 4, 2, 3)  # three rows of pixels: the shape alone would not tell
    b, tubes, rows, columns, last = _geometry(video, size)
    h, w = (video.shape[2], video.shape[3]) if last else (video.shape[3], video.shape[4])
    if (tubes * size[0], rows * size[1], columns * size[2]) != (video.shape[1], h, w):
        raise ValueError(f"{video.shape[1]} frames of {h} x {w} pixels are no whole number of patches {size}.")
    if weight.shape[-1] != 3 * size[0] * size[1] * size[2] or weight.ndim != 2:
        raise ValueError(f"weight must be (D, {3 * size[0] * size[1] * size[2]}), but is {tuple(weight.shape)}.")
    n = rows * columns
    # two comparisons: torch.compile does not find a symbolic number in a tuple
    if position is not None and position.shape[0] != n and position.shape[0] != tubes * n:
        raise ValueError(f"position must have {n} or {tubes * n} rows, but has {position.shape[0]}.")
    if ids_keep.ndim != 2 or ids_keep.shape[0] != b:
        raise ValueError(f"ids_keep must be ({b}, K), a row a clip, but is {tuple(ids_keep.shape)}.")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("mean and std must hold three numbers each, one a channel.")
    if prefix_per not in ("clip", "frame"):
        raise ValueError(f'prefix_per={prefix_per!r} is unknown; use "clip" or "frame".')
    k, per_frame = ids_keep.shape[1], prefix_per == "frame"
    if per_frame and uniform and k % tubes:
        raise ValueError(f"uniform=True needs the same count in all {tubes} frames, but {k} patches do not divide.")
    kind = video.device.type
    dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else weight.dtype
    refuse(impl, "patch_embed", video)
    values, cu_seqlens, ids, token_size = (_patch_embed_reference if impl == "reference" else _patch_embed)(
        video, ids_keep, weight, bias, position, prefix, size, mean, std, per_frame, uniform, dtype
    )
    n_prefix = 0 if prefix is None else prefix.shape[0]
    each = _even(k, tubes, per_frame, uniform)
    lengths = None if each is None else each + n_prefix
    longest = min(n, k) + n_prefix if lengths is None else lengths
    return PackedTokens(values, cu_seqlens, ids, token_size, longest, lengths)


def _flops(video: Tensor, ids_keep: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * ids_keep.numel() * weight.numel()


def _backward_flops(
    grad: Tensor, video: Tensor, ids_keep: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return 2 * ids_keep.numel() * weight.numel() * (2 if args[-1] else 1)


FLOPS = {
    torch.ops.smaug.patch_embed: _flops,
    torch.ops.smaug.patch_embed_reference: _flops,
    torch.ops.smaug.patch_embed_backward: _backward_flops,
    torch.ops.smaug.patch_embed_backward_reference: _backward_flops,
}
