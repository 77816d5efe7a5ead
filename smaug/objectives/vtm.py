"""vtm: does this text tell of this video? Answered from the fused [CLS], with hard negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.data.loader import IGNORED
from smaug.model.layers import init_linear
from smaug.model.model import ModelConfig
from smaug.objectives.seen import Seen


@dataclass(frozen=True)
class Vtm:
    """Cross-entropy over no / yes. The step draws `negatives` videos a text, in proportion to exp(vtc score).

    ALBEF, Li et al. 2021, section 3.3, with the draw made by Gumbel-argmax so that nothing is read from the device.
    """

    weight: float = 1.0
    negatives: int = 2  # videos a text, none of the same clip or with the same caption
    # The whole caption, or what the contrast sees of it: without its motion word it may fit the negative as well.
    words: Literal["whole", "contrast"] = "whole"
    # Neighbouring pairs of a batch, as drawn, of which each is the others' candidate; 0: all that a process has. Fixed
    # when a run begins, so that it may go on with fewer processes: frames of videos are not sent from one to another.
    among: int = 0

    def heads(self, model: ModelConfig, vocabulary: int) -> nn.Linear:
        head = nn.Linear(model.text.width, 2)
        init_linear(head)
        return head

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert seen.pairs is not None
        labels = torch.where(seen.pairs.valid, seen.pairs.labels, IGNORED)
        return F.cross_entropy(heads(seen.pairs.features).float(), labels, ignore_index=IGNORED)

    def count(self, seen: Seen) -> Tensor:
        assert seen.pairs is not None
        return seen.pairs.valid.sum()
