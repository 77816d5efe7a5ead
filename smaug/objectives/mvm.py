"""mvm: what do the masked patches look like? Pixels rebuilt from the visible patches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smaug import ops
from smaug.masks import DECODER_STREAM, MOMENTS
from smaug.model.decoder import Decoder, DecoderConfig
from smaug.model.model import ModelConfig
from smaug.objectives.seen import Removed, Seen


@dataclass(frozen=True)
class Mvm:
    """Mean squared error on the masked patches' pixels, each patch normalised; MAE, He et al. 2022, section 3."""

    weight: float = 1.0
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def heads(self, model: ModelConfig, vocabulary: int) -> Decoder:
        return Decoder(self.decoder, model.video)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert isinstance(heads, Decoder)
        if not any(group.ids.numel() for group in seen.removed):  # a step in which nothing is masked
            return seen.video.features.new_zeros((), dtype=torch.float32)
        chosen = [self._some(group, seen) for group in seen.removed]
        visible = [seen.video.stayed] + (seen.video.left if self.decoder.decoder_input == "exit" else [])
        masked = [ids.flatten(0, 1) for ids in chosen]
        rebuilt = heads(visible, torch.cat(masked) if len(masked) > 1 else masked[0], seen.video.cls)
        total = self.count(seen)
        losses = []
        # split, not slices: the gradient of a slice is a zero tensor of the whole
        parts = rebuilt.split([len(ids) for ids in masked]) if len(masked) > 1 else [rebuilt]
        for group, ids, part in zip(seen.removed, chosen, parts, strict=True):
            pred = part.reshape(len(ids), ids[0].numel(), -1)
            tube = heads.tube
            if group.video.shape[1] == 1:  # an image: the mean over the tube's frames speaks for it
                pred, tube = pred.unflatten(2, (3, tube[0], -1)).mean(3).flatten(2), (1, *tube[1:])
            loss = ops.pixel_loss(pred, group.video, ids.flatten(1), patch=tube)
            losses.append(loss * (ids.numel() / total) if len(parts) > 1 else loss)
        return torch.stack(losses).sum() if len(parts) > 1 else losses[0]

    def count(self, seen: Seen) -> int:
        """Patches that are rebuilt."""
        return sum(len(group.ids) * group.sequences * self._take(group) for group in seen.removed)

    def _take(self, group: Removed) -> int:
        removed = group.ids.shape[1] // group.sequences
        return min(removed, max(1, round(self.decoder.share * removed)))

    def _some(self, group: Removed, seen: Seen) -> Tensor:
        """A random part of what was removed, (B, sequences, R') int32, ascending in each sequence."""
        ids = group.ids.view(len(group.ids), group.sequences, -1)
        take = self._take(group)
        # As `VideoMask.draw` numbers moments, so that a draw does not depend on the batch.
        moment = torch.arange(group.sequences, device=ids.device)
        samples = torch.add(moment, group.samples[:, None], alpha=MOMENTS)
        places, _ = ops.random_mask(
            samples.flatten(), (1, ids.shape[2]), take, seed=seen.seed, draw=seen.epoch, stream=DECODER_STREAM
        )
        return ids.gather(2, places.view(*ids.shape[:2], take).long())
