"""The training step of a recipe in plain, eager PyTorch: the rival of `smaug.step`.

What one writes today from the code that people know: every tube embedded by a Conv3d and the visible ones gathered
(MAE); F.scaled_dot_product_attention on rectangular tensors; patches pruned by the attention of [CLS] and melted into
one token (EViT); captions padded; frames chosen by topk, and the frames of each pair gathered for cross-attention
(Singularity, ALBEF); in the decoder visible and mask tokens side by side, and the loss on the masked ones (VideoMAE).
Texts go through an encoder in one batch, nothing waits for the device, and what is on the host is prepared there.

It uses the modules of our model for their parameters, and none of its ops. With the same random numbers its loss and
its gradients are those of `training_step` (tests/test_eager_step.py). A batch holds clips of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.data.loader import Batch
from smaug.model.decoder import Decoder
from smaug.model.frame_selector import FrameSelector
from smaug.model.fusion import FusionBlock
from smaug.model.layers import Block
from smaug.model.model import Model
from smaug.model.text_encoder import TextEncoder
from smaug.model.video_encoder import VideoEncoder
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import VtcHeads
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.step import keep_rate, video_mask
from smaug.tokens import PackedTokens

Parts = list[tuple[Tensor, Tensor]]  # states (S, n, D) of patches and their ids (S, n) int64


@dataclass(frozen=True)
class Captions:
    """Captions padded to one length, as a tokenizer of Hugging Face returns them."""

    words: Tensor  # (B, L) int64
    places: Tensor  # (B, L) int64, of a word in the whole caption
    mask: Tensor  # (B, L) bool, True where a word is


@dataclass(frozen=True)
class Padded:
    """A batch as a padding loader would give it: made before the clock starts."""

    video: Tensor  # (B, F, H, W, 3) uint8
    captions: Captions  # the views that the step encodes, one after the other: (V * B, L)
    views: dict[str, int]  # which of the V views "contrast", "match" and "masked" are
    masked_at: Tensor  # (n,) int64, the masked words in the flattened (B, L)
    masked_labels: Tensor  # (n,) int64
    video_keys: Tensor  # (B,) int64
    caption_keys: Tensor  # (B,) int64


@dataclass(frozen=True)
class Drawn:
    """What is random in a step."""

    keep: Tensor  # (S, K) int64, the visible patches of each of S sequences, moment * N + patch of its clip
    rebuilt: Tensor  # (S, R) int64, the masked patches that the decoder rebuilds
    uniform: Tensor  # (B, B) in (0, 1), for the negatives


def padded(batch: Batch, views: dict[str, PackedTokens]) -> Padded:
    """views: `smaug.step.text_views` of the batch."""
    (group,) = batch.groups
    distinct = list({id(view): view for view in views.values()}.values())
    length = max(view.max_seqlen for view in distinct)
    words, masks = zip(*(view.to_padded(length) for view in distinct), strict=True)
    places = [view.with_values(view.ids.long()).to_padded(length)[0] for view in distinct]
    at = batch.masked_rows
    if "masked" in views:
        starts = views["masked"].cu_seqlens[:-1].long()
        caption = torch.searchsorted(starts, at, right=True) - 1
        at = caption * length + at - starts[caption]
    return Padded(
        group.video,
        Captions(torch.cat(words), torch.cat(places), torch.cat(masks)),
        {name: next(i for i, v in enumerate(distinct) if v is view) for name, view in views.items()},
        at,
        batch.masked_labels,
        batch.video_keys,
        batch.caption_keys,
    )


class EagerStep(nn.Module):
    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        video = recipe.model.video
        for name, values in (("mean", video.mean), ("std", video.std)):  # of pixels from 0 to 255
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1, 1))

    def draw(self, batch: Padded, step: int) -> Drawn:
        """MAE's way: patches in the order of noise, and the first of them stay."""
        video, clips, device = self.recipe.model.video, len(batch.video), batch.video.device
        times, sequences = video.times(video.frames), video.sequences(video.frames)
        patches = times * video.patches // sequences
        keep = video_mask(self.recipe, step).keep(times, video.patches) // sequences
        order = torch.rand(clips * sequences, patches, device=device).argsort(1)
        order = order + torch.arange(sequences, device=device).repeat(clips)[:, None] * video.patches
        share = next((o.decoder.share for o in self.recipe.objectives.values() if isinstance(o, Mvm)), 0.0)
        rebuilt = round(share * (patches - keep))
        return Drawn(order[:, :keep], order[:, keep : keep + rebuilt], torch.rand(clips, clips, device=device))

    def forward(self, batch: Padded, drawn: Drawn, step: int) -> Tensor:
        """-> the loss, a scalar."""
        model, objectives, clips = self.model, self.recipe.objectives, len(batch.video)
        pixels = (batch.video.permute(0, 4, 1, 2, 3) - self.mean) / self.std
        frames, visible = encode_video(model.video, pixels, drawn.keep, keep_rate(self.recipe, step))
        clip = frames[:, 0].unflatten(0, (clips, -1)).mean(1)
        words = encode_text(model.text, batch.captions).unflatten(0, (-1, clips))
        mask = batch.captions.mask.unflatten(0, (-1, clips))
        same = (batch.video_keys[:, None] == batch.video_keys) | (batch.caption_keys[:, None] == batch.caption_keys)

        parts: dict[str, Tensor] = {}
        scores = torch.zeros_like(drawn.uniform)
        for name, heads in model.heads.items():
            if isinstance(heads, VtcHeads):
                scores = contrast_scores(heads, words[batch.views["contrast"], :, 0], clip)
                parts[name] = contrast(scores, same)
        if model.fusion is not None:
            own = torch.arange(clips, device=same.device)
            texts, videos, copies = [], [], 0
            valid = own[:0].bool()
            for objective in objectives.values():
                if isinstance(objective, Vtm):
                    gumbel = -torch.log(-torch.log(drawn.uniform))
                    ranked = (scores.detach() + gumbel).masked_fill(same, -torch.inf)
                    found, negatives = ranked.topk(objective.negatives, dim=1)
                    copies = 1 + objective.negatives
                    texts, videos = [batch.views["match"]] * copies, [own, *negatives.unbind(1)]
                    valid = torch.cat([torch.ones_like(same[0]), (found > -torch.inf).T.flatten()])
            if "masked" in batch.views:
                texts, videos = [*texts, batch.views["masked"]], [*videos, own]
            fused = self.fuse(words[texts].flatten(0, 1), mask[texts].flatten(0, 1), frames, torch.cat(videos))
            for name, objective in objectives.items():
                if isinstance(objective, Vtm):
                    answers = model.heads[name](fused[: copies * clips, 0]).float()
                    labels = (torch.arange(len(answers), device=same.device) < clips).long()
                    each = F.cross_entropy(answers, labels, reduction="none")
                    parts[name] = (each * valid).sum() / valid.sum()
                if isinstance(objective, Mlm):
                    asked = fused[copies * clips :].flatten(0, 1)[batch.masked_at]
                    parts[name] = F.cross_entropy(model.heads[name](asked).float(), batch.masked_labels)
        for name, heads in model.heads.items():
            if isinstance(heads, Decoder):
                parts[name] = rebuild(heads, visible, batch.video, drawn.rebuilt)
        return sum(
            (objectives[name].weight * part for name, part in parts.items()), torch.zeros((), device=same.device)
        )

    def fuse(self, words: Tensor, mask: Tensor, frames: Tensor, videos: Tensor) -> Tensor:
        """Texts (P, L, D), mask (P, L) bool, each with the frames of a video; frames (S, n, D_v), videos (P,) int64."""
        model = self.model
        assert model.fusion is not None
        own = frames.unflatten(0, (-1, self.recipe.model.video.sequences(self.recipe.model.video.frames)))[videos]
        gate = None
        if model.selector is not None:
            own, gate = select_frames(model.selector, own, words[:, 0])
        for block in model.fusion.blocks:
            assert isinstance(block, FusionBlock)
            words = words + attend(block, block.norm1(words), mask)
            words = words + see(block, block.norm_cross(words), own, gate)
            words = mlp(block, words)
        return model.fusion.norm(words)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x (B, N, ...), ids (B, K) int64 -> (B, K, ...)."""
    return x.gather(1, ids.view(*ids.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def projected(block: Block | FusionBlock, x: Tensor) -> Iterable[Tensor]:
    """Queries, keys and values (B, H, N, E)."""
    return block.attention.qkv(x).unflatten(2, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(block: Block | FusionBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x (B, N, D), mask (B, N) bool -> (B, N, D)."""
    q, k, v = projected(block, x)
    o = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return block.attention.proj(o.transpose(1, 2).flatten(2))


def attend_and_score(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Also how much attention each token got from [CLS], a mean over heads, (B, N)."""
    q, k, v = projected(block, x)
    with torch.no_grad():  # EViT forms all of the attention; its first row is enough
        received = (
            (q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1, dtype=torch.float32)[:, :, 0].mean(1)
        )
    o = F.scaled_dot_product_attention(q, k, v)
    return block.attention.proj(o.transpose(1, 2).flatten(2)), received


def mlp(block: Block | FusionBlock, x: Tensor) -> Tensor:
    return x + block.down(F.gelu(block.up(block.norm2(x))))


def run(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    assert isinstance(block, Block)
    return mlp(block, x + attend(block, block.norm1(x), mask))


def encode_video(encoder: VideoEncoder, pixels: Tensor, keep: Tensor, rate: float) -> tuple[Tensor, Parts]:
    """pixels (B, 3, F, H, W) -> frames (S, n, D), [CLS] first; and the visible patches: those that stayed to the end,
    and those that left at each pruning block, as they left."""
    config, clips = encoder.config, len(pixels)
    tube = (config.tubelet, config.patch, config.patch)
    weight, bias = encoder.patch_embed.weight.unflatten(1, (3, *tube)), encoder.patch_embed.bias
    x = F.conv3d(pixels, weight, bias, stride=tube).flatten(2).transpose(1, 2)
    x = x + (encoder.time[:, None] + encoder.position).flatten(0, 1)
    x = take(x, keep.reshape(clips, -1)).reshape(*keep.shape, -1)
    x = torch.cat([encoder.cls.to(x.dtype).expand(len(x), 1, -1), x], 1)

    ids, left, fused = keep, [], 0
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        patches = x.shape[1] - 1 - fused
        stay = config.prune.count(patches, rate) if number in config.prune.blocks else patches
        if stay == patches:
            x = run(block, x)
            continue
        o, received = attend_and_score(block, block.norm1(x))
        x = x + o
        cls, others, melted = x.split([1, patches, fused], 1)
        received = received[:, 1 : 1 + patches]
        order = received.argsort(1, descending=True)
        kept, gone = take(others, order).split([stay, patches - stay], 1)
        weight = received.gather(1, order[:, stay:])
        weight = weight / weight.sum(1, keepdim=True)
        extra = (gone * weight[..., None]).sum(1, keepdim=True).to(x.dtype)
        ids, ids_gone = ids.gather(1, order).split([stay, patches - stay], 1)
        left.append((gone, ids_gone))
        x, fused = mlp(block, torch.cat([cls, kept, melted, extra], 1)), fused + 1
    stayed = x[:, 1 : x.shape[1] - fused]
    if encoder.temporal:
        cls = x[:, 0].unflatten(0, (clips, -1)) + encoder.time.to(x.dtype)
        for block in encoder.temporal:
            cls = run(block, cls)
        x = torch.cat([cls.flatten(0, 1)[:, None], x[:, 1:]], 1)
    return encoder.norm(x), [(stayed, ids), *left]


def encode_text(encoder: TextEncoder, captions: Captions) -> Tensor:
    """-> (B, L, D)."""
    x = encoder.word(captions.words) + F.embedding(captions.places, encoder.position)
    for block in encoder.blocks:
        x = run(block, x, captions.mask)
    return encoder.norm(x)


def contrast_scores(heads: VtcHeads, text: Tensor, video: Tensor) -> Tensor:
    """(B, D) and (B, D_v) -> (B, B) logits."""
    temperature = heads.log_temperature.exp().clamp(0.001, 0.5)
    texts, videos = (F.normalize(x.float(), dim=-1) for x in (heads.text(text), heads.video(video)))
    with torch.autocast(text.device.type, enabled=False):
        return texts @ videos.T / temperature


def contrast(scores: Tensor, same: Tensor) -> Tensor:
    target = same.float()
    rows, columns = target / target.sum(1, keepdim=True), target.T / target.sum(0)[:, None]
    return (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, columns)) / 2


def select_frames(selector: FrameSelector, frames: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Each pair's best frames: frames (P, M, n, D_v), text (P, D) -> (P, keep, n, D_v) in their order, and a gate
    (P, keep) of value 0 with the gradient of their probability."""
    if selector.config.keep >= frames.shape[1]:
        return frames, None
    meets = F.normalize(selector.text(text).float(), dim=-1)
    scores = (F.normalize(selector.frame(frames[:, :, 0]).float(), dim=-1) * meets[:, None]).sum(-1) * 8.0
    best = scores.topk(selector.config.keep, dim=1).indices.sort(dim=1).values
    probability = scores.softmax(1).gather(1, best)
    return take(frames, best), probability - probability.detach()


def see(block: FusionBlock, x: Tensor, frames: Tensor, gate: Tensor | None) -> Tensor:
    """Cross-attention: x (P, L, D) to frames (P, M, n, D_v)."""
    q = block.query(x).unflatten(2, (block.heads, -1)).transpose(1, 2)
    k, v = block.key_value(frames.flatten(1, 2)).unflatten(2, (2, block.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = None
    if gate is not None and gate.shape[1] > 1:
        bias = gate.to(q.dtype).repeat_interleave(frames.shape[2], 1)[:, None, None]
    o = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    if gate is not None and gate.shape[1] == 1:
        o = o * (1 + gate[..., None]).to(o.dtype)
    return block.proj(o)


def rebuild(decoder: Decoder, visible: Parts, video: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error on the masked patches (S, R), each normalised by its own mean and variance."""
    states = decoder.enter(torch.cat([states for states, _ in visible], 1))
    tokens = decoder.mask_token.to(states.dtype).expand(*masked.shape, -1)
    x = torch.cat([states, tokens], 1) + decoder.position[torch.cat([*(ids for _, ids in visible), masked], 1)]
    for block in decoder.blocks:
        x = run(block, x)
    pred = decoder.pixels(decoder.norm(x[:, -masked.shape[1] :]))

    clips, (t, p, _) = len(video), decoder.tube
    b, f, h, w, _ = video.shape
    patches = video.view(b, f // t, t, h // p, p, w // p, p, 3).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).flatten(1, 3)
    target = take(patches, masked.reshape(clips, -1)).float() / 255
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(pred.float().view_as(target), target)
