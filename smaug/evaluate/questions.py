"""Questions: accuracy on multiple choice and on open-ended ones, each clip encoded once for all that is asked of it.

Right is what equals one of the answers, letter for letter. An answer that the closed list lacks can never be given; it
counts as an error, and the share of those that the list has is printed beside the score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.clips import Clips, check_share
from smaug.data.loader import middle_frames
from smaug.data.manifest import Sample, Skip
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.answer import Classifier, Speller
from smaug.objectives.mlm import MlmHead
from smaug.objectives.vtc import VtcHeads
from smaug.tokens import PackedTokens

CLIPS = 100  # encoded at once
TEXTS = 1000  # fused at once
RANKED = 128  # answers that a decoder spells out to the end: Singularity, Lei et al. 2023, its code


@dataclass(frozen=True)
class Answers:
    """`given[i]` is the answer to `samples[i]`; `skipped`: clips left out."""

    samples: list[Sample]
    given: list[str]
    skipped: list[Skip]

    def scores(self) -> dict[str, float]:
        """acc, and acc_{type} of each type and of each group of types, as fractions; and how many `questions`."""
        right = [float(given in s.answers) for given, s in zip(self.given, self.samples, strict=True)]
        return {**by_type(right, self.samples), "questions": float(len(right))}


def by_type(hits: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    """Means of all hits, acc, and of each type of question, acc_{type}; `order/up or down` belongs to `order`, too."""
    groups: dict[str, list[float]] = {"acc": list(hits)}
    for hit, sample in zip(hits, samples, strict=True):
        group = sample.type.partition("/")[0]
        for name in dict.fromkeys(name for name in (group, sample.type) if name):
            groups.setdefault(f"acc_{name}", []).append(hit)
    return {name: sum(several) / len(several) for name, several in groups.items() if several}


def priors(samples: Sequence[Sample]) -> dict[str, float]:
    """What one reaches who knows how often an answer comes in a type of question, and nothing of the video: acc and
    acc_{type}. Of options, one of them at random."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        counts.setdefault(sample.type, Counter())[sample.answers[0]] += 1
    likely = {type: max(several.values()) / several.total() for type, several in counts.items()}
    return by_type([1 / len(s.options) if s.options else likely[s.type] for s in samples], samples)


@torch.no_grad()
def answer_questions(
    model: Model,
    clips: Clips,
    tokenizer: Tokenizer,
    answers: Sequence[str],
    *,
    frames: int,
    max_bad: float,
    shuffle: bool = False,
    blind: bool = False,
    sparse: bool = True,
) -> Answers:
    """Multiple choice where the clips' samples have options, else the best of the closed list `answers`.

    Each clip is seen by `frames` middle frames, in a random order with `shuffle`; if `blind`, not at all.
    """
    samples: list[Sample] = []
    given: list[str] = []
    skipped: list[Skip] = []
    for videos, asked in _encoded(model, clips, frames, max_bad, shuffle, sparse, skipped):
        for start in range(0, len(asked), TEXTS):
            some = asked[start : start + TEXTS]
            own = torch.tensor([video for video, _ in some], device=videos.features.device)
            these = [sample for _, sample in some]
            asker = _Asker(model, tokenizer, videos, own, blind, sparse)
            given += _choose(asker, these) if these[0].options else _answer(asker, these, answers)
            samples += these
    return Answers(samples, given, skipped)


def _encoded(
    model: Model, clips: Clips, frames: int, max_bad: float, shuffle: bool, sparse: bool, skipped: list[Skip]
) -> Iterator[tuple[EncodedVideo, list[tuple[int, Sample]]]]:
    """Some clips at a time, and all that is asked of them with the number of the clip among these."""
    config, device = model.video.config, next(model.parameters()).device
    config.times(frames)  # raises for a number that does not fill the tubes
    asked: dict[object, list[int]] = {}  # by the file that is asked about
    for number, sample in enumerate(clips.samples):
        asked.setdefault(sample.path, []).append(number)
    first = [numbers[0] for numbers in asked.values()]
    for start in range(0, len(first), CLIPS):
        groups, bad = middle_frames(clips, first[start : start + CLIPS], frames, view=config.view, shuffle=shuffle)
        skipped += bad
        check_share(skipped, len(first), max_bad, clips.decoder.name)
        for group in groups:
            everything = torch.arange(math.prod(config.grid(group.video.shape[1])), dtype=torch.int32)
            ids = everything.expand(len(group.video), -1).to(device)
            encoded = model.video([(group.video.to(device), ids)], keep_rate=None if sparse else 1.0)
            of_clip = [asked[clips.samples[n].path] for n in group.samples.tolist()]
            yield encoded, [(i, clips.samples[n]) for i, numbers in enumerate(of_clip) for n in numbers]


@dataclass(frozen=True)
class _Asker:
    """What all ways to answer need: the model, some encoded videos, and how the text sees them."""

    model: Model
    tokenizer: Tokenizer
    videos: EncodedVideo
    own: Tensor  # (texts,) int64, the video of each text
    blind: bool  # the texts see no video
    sparse: bool

    def fuse(self, words: Sequence[Sequence[int]], asked: Literal["cls", "all", "last"], last: int = 0) -> PackedTokens:
        """Each text (word numbers without [CLS]) fused with its video -> its [CLS], all its words, or its `last`."""
        model, device = self.model, self.own.device
        assert model.fusion is not None
        packed = _to(text.pack(words, text.number(self.tokenizer, text.CLS)), device)
        features, encoded = model.text(packed)
        own = self.own.repeat_interleave(len(words) // len(self.own))
        kv_ids, gate = self.videos.frame_ids.index_select(0, own), None
        if self.blind:
            kv_ids = torch.full_like(kv_ids, -1)
        elif model.selector is not None and self.sparse:
            kv_ids, gate = model.selector(self.videos.summaries, features, kv_ids)
        if asked == "all":
            return model.fusion([encoded], self.videos.frames, kv_ids, gate)
        rows, count = encoded.first_rows(), 1
        if asked == "last":
            rows, count = (encoded.cu_seqlens[1:, None] + torch.arange(-last, 0, device=device)).flatten(), last
        return model.fusion([encoded], self.videos.frames, kv_ids, gate, rows=rows, lengths=count)

    def encode(self, texts: Sequence[str], room: int = 0) -> list[list[int]]:
        return text.encode(self.tokenizer, texts, self.model.text.config.max_words - room)


def _choose(asker: _Asker, samples: Sequence[Sample]) -> list[str]:
    """The option with the best match score. With a contrast head, its logit is added as in retrieval's second stage."""
    count, model = len(samples[0].options), asker.model
    if "vtm" not in model.heads:
        raise ValueError("multiple choice needs a match head; this model was trained without vtm")
    words = asker.encode([option for sample in samples for option in sample.options])
    no, yes = model.heads["vtm"](asker.fuse(words, "cls").values).float().unbind(1)
    scores = (yes - no).view(-1, count)
    heads = next((head for head in model.heads.values() if isinstance(head, VtcHeads)), None)
    if heads is not None and not asker.blind:
        cls = text.number(asker.tokenizer, text.CLS)
        features, _ = model.text(_to(text.pack(words, cls), asker.own.device))
        dual = heads.scores(features, asker.videos.features).view(len(samples), count, -1)
        scores = scores + dual[torch.arange(len(samples), device=dual.device), :, asker.own]
    right = torch.tensor([[o in s.answers for o in s.options] for s in samples], device=scores.device)
    others = scores.masked_fill(right, float("-inf"))
    won = scores.masked_fill(~right, float("-inf")).amax(1) > others.amax(1)  # a tie or a NaN is a loss
    best = torch.where(won, right.int().argmax(1), others.argmax(1)).tolist()
    return [sample.options[i] for sample, i in zip(samples, best, strict=True)]


def _answer(asker: _Asker, samples: Sequence[Sample], answers: Sequence[str]) -> list[str]:
    """The best of the closed list: by the classifier, by how likely the decoder is to spell it, or, of a model that was
    never trained on questions, by how well it fills masked words after the question (FrozenBiLM, Yang et al. 2022)."""
    questions = [sample.captions[0] for sample in samples]
    heads = asker.model.heads.values()
    head = next((head for head in heads if isinstance(head, Classifier | Speller | MlmHead)), None)
    if head is None:
        raise ValueError("open questions need the objective answer or mlm; this model was trained without either")
    if isinstance(head, Classifier):
        scores = head(asker.fuse(asker.encode(questions), "cls").values)
        return [answers[i] for i in scores.argmax(1).tolist()]
    spelled = asker.encode(answers)
    if isinstance(head, Speller):
        fused = asker.fuse(asker.encode(questions), "all")
        return [answers[i] for i in rank_answers(head, asker.tokenizer, fused, spelled)]
    scores = torch.empty(len(samples), len(answers), device=asker.own.device)
    mask = text.number(asker.tokenizer, text.MASK)
    for length in {len(words) for words in spelled}:
        those = [i for i, words in enumerate(spelled) if len(words) == length]
        asked = [[*words, *[mask] * length] for words in asker.encode(questions, room=length)]
        likely = head(asker.fuse(asked, "last", length).values).log_softmax(1).view(len(samples), length, -1)
        pieces = torch.tensor([spelled[i] for i in those], device=scores.device)
        # the mean, so that a long answer is not unlikely for its length
        each = [likely[:, place, pieces[:, place]] for place in range(length)]
        scores[:, those] = torch.stack(each).mean(0)
    return [answers[i] for i in scores.argmax(1).tolist()]


def rank_answers(
    head: Speller, tokenizer: Tokenizer, questions: PackedTokens, answers: Sequence[list[int]]
) -> list[int]:
    """The most likely answer to each question. The first word's probability picks RANKED answers, all of whose words
    then count: Singularity, Lei et al. 2023, and its code. `answers`: word numbers of each."""
    device, count = questions.values.device, questions.num_sequences
    cls, sep = text.number(tokenizer, text.CLS), text.number(tokenizer, text.SEP)
    start = _to(text.pack([[]] * count, cls), device)
    every = torch.arange(count, device=device)
    first = head(start, questions, every).log_softmax(1)
    likely = first[:, torch.tensor([words[0] for words in answers], device=device)]
    picked = likely.topk(min(RANKED, len(answers)), dim=1).indices.tolist()
    best: list[int] = []
    step = max(1, TEXTS * 4 // len(picked[0]))
    for low in range(0, count, step):
        high = min(count, low + step)
        pairs = [(q, a) for q in range(low, high) for a in picked[q]]
        begun, after, of = text.beginnings([answers[a] for _, a in pairs], sep)
        belongs = torch.tensor([pairs[i][0] for i in of], device=device)
        logits = head(_to(text.pack(begun, cls), device), questions, belongs).log_softmax(1)
        each = logits.gather(1, torch.tensor(after, device=device)[:, None])[:, 0]
        total = torch.zeros(len(pairs), device=device).index_add(0, torch.tensor(of, device=device), each)
        chosen = total.view(high - low, -1).argmax(1).tolist()
        best += [picked[q][i] for q, i in zip(range(low, high), chosen, strict=True)]
    return best


def _to(words: PackedTokens, device: torch.device) -> PackedTokens:
    moved: PackedTokens = tree_map_only(Tensor, lambda x: x.to(device), words)
    return moved
