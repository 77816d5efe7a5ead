"""Questions: accuracy on multiple choice and on open-ended ones, each clip encoded once for all that is asked of it.

Right is what equals one of the answers, letter for letter, and a tie is lost. An answer that the closed list lacks can
never be given; it counts as an error, and the share of questions that the list has an answer to is printed beside the
score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from smaug.data import text
from smaug.data.clips import Clips, check_share
from smaug.data.manifest import Sample, Skip
from smaug.data.shapes import Report
from smaug.evaluate.encode import BATCH, Block, Look, encode_clips
from smaug.evaluate.ensemble import Ensemble, ensemble
from smaug.evaluate.match import has_match_head
from smaug.model.fusion import KeyValue
from smaug.model.model import Model
from smaug.objectives.answer import Classifier, Speller
from smaug.objectives.mlm import MlmHead
from smaug.objectives.vtc import contrast_of
from smaug.tokens import PackedTokens

TEXTS = 1000  # fused at once
RANKED = 128  # answers that a decoder spells out to the end: Singularity, Lei et al. 2023, its code


@dataclass(frozen=True)
class Answers:
    """`given[i]` is the answer to `samples[i]`, which is the set's number `numbers[i]`; `skipped`: clips left out."""

    samples: list[Sample]
    numbers: list[int]
    given: list[str]
    skipped: list[Skip]

    def scores(self, subsets: Mapping[str, np.ndarray] = MappingProxyType({})) -> dict[str, float]:
        """acc, and acc_{name} of each type, of each group of types, and of subsets (the set's questions,) bool, as
        fractions; and how many `questions`."""
        right = [float(given in s.answers) for given, s in zip(self.given, self.samples, strict=True)]
        found = by_type(right, self.samples)
        for name, member in subsets.items():
            if member[self.numbers].any():
                found[f"acc_{name}"] = float(np.asarray(right)[member[self.numbers]].mean())
        return {**found, "questions": float(len(right))}


def by_type(hits: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    """Means of all hits, acc, and of each type of question, acc_{type}; `order/up or down` belongs to `order`, too."""
    groups: dict[str, list[float]] = {"acc": list(hits)}
    for hit, sample in zip(hits, samples, strict=True):
        group = sample.type.partition("/")[0]
        for name in dict.fromkeys(name for name in (group, sample.type) if name):
            groups.setdefault(f"acc_{name}", []).append(hit)
    return {name: sum(several) / len(several) for name, several in sorted(groups.items()) if several}


def priors(samples: Sequence[Sample]) -> dict[str, float]:
    """What one reaches who knows how often an answer comes in a type of question, and nothing of the video: acc and
    acc_{type}. Of options, one of them at random."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        counts.setdefault(sample.type, Counter())[sample.answers[0]] += 1
    likely = {type: max(several.values()) / several.total() for type, several in counts.items()}
    return by_type(
        [sum(o in s.answers for o in s.options) / len(s.options) if s.options else likely[s.type] for s in samples],
        samples,
    )


@torch.no_grad()
def answer_questions(
    model: Model,
    clips: Clips,
    tokenizer: Tokenizer,
    answers: Sequence[str],
    look: Look,
    *,
    ensemble: Ensemble = "concat",
    max_bad: float,
    blind: bool = False,
    batch: int = BATCH,
    report: Report | None = None,
) -> Answers:
    """Multiple choice where the clips' samples have options, else the best of the closed list `answers`.

    `look` says how a clip is seen; if `blind`, it is not, and the text answers alone.
    """
    asked: dict[object, list[int]] = {}  # by the file that is asked about
    for number, sample in enumerate(clips.samples):
        asked.setdefault(sample.path, []).append(number)
    first = [numbers[0] for numbers in asked.values()]
    numbers: list[int] = []
    given: list[str] = []
    skipped: list[Skip] = []
    for block in encode_clips(model, clips, first, look, skipped, batch):
        check_share(skipped, len(first), max_bad, clips.decoder.name)
        keys_values = [] if model.fusion is None else model.fusion.project(block.frames)
        each = [asked[clips.samples[number].path] for number in block.numbers]
        pairs = [(place, number) for place, several in enumerate(each) for number in several]
        step = max(1, TEXTS // max(1, len(clips.samples[pairs[0][1]].options)))
        for start in range(0, len(pairs), step):
            places, some = zip(*pairs[start : start + step], strict=True)
            own = torch.tensor(places, device=block.features.device)
            these = [clips.samples[number] for number in some]
            asker = _Asker(model, tokenizer, block, keys_values, own, ensemble, blind, look.sparse)
            given += _choose(asker, these) if these[0].options else _answer(asker, these, answers)
            numbers += some
        if report is not None:
            report("questions answered", len(numbers), len(clips))
    check_share(skipped, len(first), max_bad, clips.decoder.name)
    if not given:
        raise ValueError(f"none of the {len(first)} clips of {clips.name} can be read; the first: {skipped[0].reason}")
    return Answers([clips.samples[number] for number in numbers], numbers, given, skipped)


@dataclass(frozen=True)
class _Asker:
    """What all ways to answer need: the model, some encoded clips, and how the texts see them."""

    model: Model
    tokenizer: Tokenizer
    block: Block
    keys_values: Sequence[KeyValue]  # of the block's frames
    own: Tensor  # (questions,) int64, the place of each one's clip in the block
    how: Ensemble
    blind: bool  # the texts see no clip
    sparse: bool

    def encode(self, texts: Sequence[str], room: int = 0) -> list[list[int]]:
        config = self.model.text.config
        return text.encode(self.tokenizer, texts, config.max_words - config.sep - room)

    def read(self, words: Sequence[Sequence[int]]) -> tuple[Tensor, PackedTokens]:
        """Texts, as `encode` gives them, through their encoder: features and words. Of one text a question, or of as
        many in a row for each."""
        packed = text.pack_words(self.tokenizer, words, self.model.text.config.sep)
        features, encoded = self.model.text(packed.to(self.own.device))
        return features, encoded

    def score(
        self,
        read: tuple[Tensor, PackedTokens],
        asked: Literal["cls", "all", "last"],
        head: Callable[[PackedTokens], Tensor],
        last: int = 0,
    ) -> Tensor:
        """Scores (texts, classes) that `head` gives to texts that were `read`, fused with their clips. `asked`: which
        fused words the head is shown."""
        model, device, (features, encoded) = self.model, self.own.device, read
        assert model.fusion is not None
        kv_ids, gate = self.block.frame_ids.index_select(0, self.own), None
        kv_ids = kv_ids.repeat_interleave(encoded.num_sequences // len(self.own), dim=0)
        if self.blind:
            kv_ids = torch.full_like(kv_ids, -1)
        elif model.selector is not None and self.sparse:
            kv_ids, gate = model.selector(self.block.summaries, features, kv_ids)
        rows, count = encoded.first_rows(), 1
        if asked == "last":
            ends = encoded.cu_seqlens[1:, None] - int(model.text.config.sep)  # [SEP] is nobody's answer
            rows, count = (ends + torch.arange(-last, 0, device=device)).flatten(), last
        attended = model.fusion.read(encoded)

        def fused(ids: Tensor, gate: Tensor | None) -> Tensor:
            assert model.fusion is not None
            few: dict[str, Any] = {} if asked == "all" else {"rows": rows, "lengths": count}
            words = model.fusion.fuse(attended, self.block.frames, ids, gate, keys_values=self.keys_values, **few)
            return head(words)

        if self.how == "concat":
            return fused(kv_ids, gate)
        units = [fused(ids[:, None], None) for ids in kv_ids.unbind(1)]
        return ensemble(torch.stack(units, 1), kv_ids >= (-1 if self.blind else 0), self.how)


def _choose(asker: _Asker, samples: Sequence[Sample]) -> list[str]:
    """The option with the best match score. With a contrast head its logit is added, as in retrieval's second stage."""
    count, model = len(samples[0].options), asker.model
    if not has_match_head(model):
        raise ValueError("multiple choice needs a match head; this model was trained without vtm")

    def match(fused: PackedTokens) -> Tensor:
        no, yes = model.heads["vtm"](fused.values).float().unbind(1)
        return (yes - no)[:, None]

    read = asker.read(asker.encode([option for sample in samples for option in sample.options]))
    scores = asker.score(read, "cls", match).view(-1, count)
    heads = contrast_of(model)
    if heads is not None and not asker.blind:
        dual = heads.scores(read[0], asker.block.features).view(len(samples), count, -1)
        scores = scores + dual[torch.arange(len(samples), device=dual.device), :, asker.own]
    right = torch.tensor([[o in s.answers for o in s.options] for s in samples], device=scores.device)
    return [sample.options[i] for sample, i in zip(samples, _best(scores, right), strict=True)]


def _best(scores: Tensor, right: Tensor) -> list[int]:
    """(n, choices) both -> of each row the number of its best score; a tie with what is not right, or a NaN, loses."""
    own, others = (scores.masked_fill(hidden, float("-inf")) for hidden in (~right, right))
    return torch.where(own.amax(1) > others.amax(1), own.argmax(1), others.argmax(1)).tolist()


def _answer(asker: _Asker, samples: Sequence[Sample], answers: Sequence[str]) -> list[str]:
    """The best of the closed list: by the classifier, by how likely the decoder is to spell it, or, of a model that was
    never trained on questions, by how well it fills masked words after the question (FrozenBiLM, Yang et al. 2022)."""
    if not answers:
        raise ValueError("open questions need a closed list of answers: name a file of them by --answers")
    questions = [sample.captions[0] for sample in samples]
    heads = list(asker.model.heads.values())
    head = next((h for kind in (Classifier, Speller, MlmHead) for h in heads if isinstance(h, kind)), None)
    if isinstance(head, Classifier):
        scores = asker.score(asker.read(asker.encode(questions)), "cls", lambda fused: head(fused.values))
    elif isinstance(head, Speller):
        spelled = asker.encode(answers)
        read = asker.read(asker.encode(questions))
        scores = asker.score(read, "all", lambda fused: spell_answers(head, asker.tokenizer, fused, spelled))
    elif isinstance(head, MlmHead):
        scores = _fill_in(asker, head, questions, asker.encode(answers, room=1))  # of the question one word at least
    else:
        raise ValueError("open questions need the objective answer or mlm; this model was trained without either")
    place = {answer: i for i, answer in enumerate(answers)}
    known = [(i, place[answer]) for i, s in enumerate(samples) for answer in s.answers if answer in place]
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[tuple(torch.tensor(known, dtype=torch.int64, device=scores.device).view(-1, 2).unbind(1))] = True
    return [answers[i] for i in _best(scores, right)]


def _fill_in(asker: _Asker, head: MlmHead, questions: Sequence[str], answers: Sequence[list[int]]) -> Tensor:
    """(questions, answers) mean log-probability of an answer's word pieces as the masked words after a question: the
    mean, so that a long answer is not unlikely for its length."""
    scores = torch.empty(len(questions), len(answers), device=asker.own.device)
    mask = text.number(asker.tokenizer, text.MASK)
    for length in {len(words) for words in answers}:
        those = [i for i, words in enumerate(answers) if len(words) == length]
        pieces = torch.tensor([answers[i] for i in those], device=scores.device)

        def likely(fused: PackedTokens, length: int = length, pieces: Tensor = pieces) -> Tensor:
            words = head(fused.values).log_softmax(1).view(len(questions), length, -1)
            return torch.stack([words[:, place, pieces[:, place]] for place in range(length)]).mean(0)

        asked = [[*words, *[mask] * length] for words in asker.encode(questions, room=length)]
        scores[:, those] = asker.score(asker.read(asked), "last", likely, length)
    return scores


def spell_answers(head: Speller, tokenizer: Tokenizer, questions: PackedTokens, answers: Sequence[list[int]]) -> Tensor:
    """(questions, answers) log-probability that the decoder spells an answer, -inf for all but RANKED of a question.

    Those have the likeliest first words; of them all words count. Singularity, Lei et al. 2023, and its code.
    questions: fused words, one sequence each; answers: word numbers.
    """
    device, count = questions.values.device, questions.num_sequences
    sep, every = text.number(tokenizer, text.SEP), torch.arange(count, device=device)
    first = head(text.pack_words(tokenizer, [[]] * count).to(device), questions, every).log_softmax(1)
    likely = first[:, torch.tensor([words[0] for words in answers], device=device)]
    picked = likely.topk(min(RANKED, len(answers)), dim=1).indices
    scores = torch.full((count, len(answers)), float("-inf"), device=device)
    step = max(1, 4 * TEXTS // picked.shape[1])
    for low in range(0, count, step):
        these = picked[low : low + step]
        begun, after, of = text.beginnings([answers[a] for a in these.flatten().tolist()], sep)
        belongs = low + torch.tensor(of, device=device) // picked.shape[1]
        logits = head(text.pack_words(tokenizer, begun).to(device), questions, belongs).log_softmax(1)
        words = logits.gather(1, torch.tensor(after, device=device)[:, None])[:, 0]
        total = torch.zeros(these.numel(), device=device).index_add(0, torch.tensor(of, device=device), words)
        scores[low : low + step] = scores[low : low + step].scatter(1, these, total.view(these.shape))
    return scores
