"""mlm: which words were masked? Answered from the words that are left and the video's frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from smaug.model.layers import init_linear
from smaug.model.model import ModelConfig
from smaug.objectives.seen import Seen


class MlmHead(nn.Module):
    """BERT's: a layer, then a score for each word; Devlin et al. 2019, section 3.1."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.words = nn.Linear(width, vocabulary)
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.norm(F.gelu(self.transform(x)))).float()


@dataclass(frozen=True)
class Mlm:
    """Cross-entropy over the vocabulary at the masked places alone; the others never reach the vocabulary's matrix."""

    weight: float = 1.0
    ratio: float = 0.5  # of a caption's words; Singularity's rate. They become [MASK]

    def heads(self, model: ModelConfig, vocabulary: int) -> MlmHead:
        return MlmHead(model.text.width, vocabulary)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        assert seen.masked is not None
        logits = heads(seen.masked.features)
        if not len(logits):  # captions of one word each; their mean would be no number, and so the whole batch's
            zero: Tensor = logits.sum()
            return zero
        return F.cross_entropy(logits, seen.masked.labels)

    def count(self, seen: Seen) -> Tensor:
        assert seen.masked is not None
        return (seen.masked.labels >= 0).sum()
