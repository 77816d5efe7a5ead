"""answer: open-ended questions. By a class for each answer of a list, or by a small decoder that spells answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.model.fusion import Fusion, FusionConfig
from smaug.model.layers import init_linear
from smaug.model.model import ModelConfig
from smaug.objectives.seen import Seen
from smaug.tokens import PackedTokens


class Classifier(nn.Module):
    """From the fused [CLS] to a score for each answer; ALPRO, Li et al. 2022, appendix: two layers."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.scores = nn.Linear(2 * width, answers)
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, answers) fp32 logits."""
        return self.scores(self.norm(F.gelu(self.up(x)))).float()


class Speller(nn.Module):
    """The next word of an answer, from its beginning and all fused words of the question; Singularity, Lei et al. 2023,
    section 3: a decoder of as many layers as the fusion encoder has.

    A beginning is a sequence of its own, whose last word is asked. Answers have one to five words, so that computes
    little more than a causal mask would; all beginnings of all answers to a question share its keys and values.
    """

    def __init__(self, width: int, max_words: int, config: FusionConfig, vocabulary: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(max_words, width) * 0.02)
        self.layers = Fusion(width, width, config)
        self.words = nn.Linear(width, vocabulary)
        init_linear(self.words)
        nn.init.normal_(self.word.weight, std=0.02)

    def forward(self, begun: PackedTokens, questions: PackedTokens, question_ids: Tensor) -> Tensor:
        """begun: n beginnings as `text.pack` lays them out; questions: S sequences of fused words; question_ids (n,)
        int64, whose each is -> (n, vocabulary) fp32 logits of the word that follows."""
        x = F.embedding(begun.values, self.word.weight) + F.embedding(begun.places, self.position)
        texts = [begun.with_values(x.to(questions.values.dtype))]
        last = begun.cu_seqlens[1:] - 1
        kv_ids = question_ids.to(torch.int32)[:, None]
        fused = self.layers(texts, questions, kv_ids, None, rows=last, lengths=1)
        return self.words(fused.values).float()


@dataclass(frozen=True)
class Answer:
    """Cross-entropy over the list of answers, or over the words of the answer.

    An answer that is not in the list can never be given: it counts as an error, and the evaluation prints how many are.
    """

    weight: float = 1.0
    by: Literal["classifier", "decoder"] = "classifier"
    top: int = 1500  # answers of the list, the most frequent of training, where --data.answers names none
    answers: tuple[str, ...] = ()  # the list; filled in when a run begins
    decoder: FusionConfig = FusionConfig(depth=1)

    def heads(self, model: ModelConfig, vocabulary: int) -> nn.Module:
        if self.by == "classifier":
            return Classifier(model.text.width, len(self.answers) or self.top)  # top: before the data has been seen
        # From BERT its layers are the fusion encoder's in kind, since it may start from them.
        layers = replace(model.fusion, depth=self.decoder.depth) if model.text.start else self.decoder
        return Speller(model.text.width, model.text.max_words, layers, vocabulary)

    def __call__(self, heads: nn.Module, seen: Seen) -> Tensor:
        asked = seen.asked
        assert asked is not None
        if isinstance(heads, Speller):
            assert asked.begun is not None
            return F.cross_entropy(heads(asked.begun, asked.words, asked.begun_of), asked.begun_labels)
        known = self.count(seen).clamp(min=1)  # a batch may have none, whose mean would be no number
        return F.cross_entropy(heads(asked.words.values), asked.labels, reduction="sum") / known

    def count(self, seen: Seen) -> Tensor:
        assert seen.asked is not None
        labels = seen.asked.labels if seen.asked.begun is None else seen.asked.begun_labels
        return (labels >= 0).sum()
