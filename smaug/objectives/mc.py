"""mc: which of a few texts tells of this video? Answered by the match head, one option after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from smaug.model.model import ModelConfig
from smaug.objectives.seen import Seen
from smaug.objectives.vtm import Vtm


@dataclass(frozen=True)
class Mc:
    """Cross-entropy over the options' match logits; LAVENDER, Li et al. 2023, section 3.2, scores options so.

    Its head is that of vtm. Under vtm's name in a recipe it starts from the head that pre-training made.
    """

    weight: float = 1.0

    def heads(self, model: ModelConfig, vocabulary: int) -> nn.Linear:
        return Vtm().heads(model, vocabulary)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert seen.choices is not None
        no, yes = heads(seen.choices.features).float().unbind(1)
        return F.cross_entropy((yes - no).view(len(seen.choices.labels), -1), seen.choices.labels)

    def count(self, seen: Seen) -> None:
        """A pair each."""
