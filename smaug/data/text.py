"""Captions as packed word numbers. The tokenizer is trained on the run's own captions and saved with the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from smaug.tokens import PackedTokens

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"  # BERT's five, in BERT's order


def train_tokenizer(captions: Sequence[str], vocabulary: int) -> Tokenizer:
    """A lower-casing WordPiece tokenizer of at most `vocabulary` pieces; BERT, Devlin et al. 2019."""
    tokenizer = _untrained(models.WordPiece(unk_token=UNK))
    texts = sorted(set(captions))
    words: set[str] = set()
    for i in range(0, len(texts), 1000):
        text = tokenizer.normalizer.normalize_str(" ".join(texts[i : i + 1000]))
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    # The trainer numbers the inner letters (##a) in the order of a randomly seeded hash table, and breaks ties between
    # pieces by these numbers. Passed as special pieces they have a fixed order, and every training gives the same.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    special = [PAD, UNK, CLS, SEP, MASK]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=[*special, *inner], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return word_pieces(tokenizer.get_vocab())  # in which ##a is not special


def word_pieces(vocabulary: dict[str, int], **normal: Any) -> Tokenizer:
    """BERT's tokenizer of a vocabulary, BERT's five special pieces among it. normal: as BertNormalizer takes it."""
    missing = [piece for piece in (PAD, UNK, CLS, SEP, MASK) if piece not in vocabulary]
    if missing:
        raise ValueError(f"the vocabulary has no {', '.join(missing)}")
    tokenizer = _untrained(models.WordPiece(vocabulary, unk_token=UNK), **normal)
    tokenizer.add_special_tokens([PAD, UNK, CLS, SEP, MASK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (CLS, SEP)]
    )
    return tokenizer


def _untrained(model: models.WordPiece, **normal: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(**normal)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def number(tokenizer: Tokenizer, piece: str) -> int:
    """The number of one of the special pieces."""
    found: int | None = tokenizer.token_to_id(piece)
    if found is None:
        raise ValueError(f"the tokenizer has no {piece}; use the tokenizer.json that the run was trained with")
    return found


def pack_captions(tokenizer: Tokenizer, captions: Sequence[str], max_words: int, sep: bool) -> PackedTokens:
    """Whole captions as a model of `TextEncoderConfig` max_words and sep takes them; see `pack`."""
    return pack_words(tokenizer, encode(tokenizer, captions, max_words - sep), sep)


def pack_words(tokenizer: Tokenizer, captions: Sequence[Sequence[int]], sep: bool = False) -> PackedTokens:
    """The same of word numbers, as `encode` gives them."""
    return pack(captions, number(tokenizer, CLS), sep=number(tokenizer, SEP) if sep else None)


def encode(tokenizer: Tokenizer, captions: Sequence[str], max_words: int) -> list[list[int]]:
    """Word numbers of each caption, without [CLS] and [SEP], cut to max_words - 1 so that [CLS] still fits."""
    unknown = number(tokenizer, UNK)
    found = tokenizer.encode_batch(list(captions), add_special_tokens=False)
    # A caption of nothing but unknown signs still needs a word, or there would be nothing to keep.
    return [e.ids[: max_words - 1] or [unknown] for e in found]


def lengths(tokenizer: Tokenizer, captions: Sequence[str]) -> list[int]:
    """Word pieces of each caption, with [CLS]: `encode` cuts those that have more than max_words."""
    return [1 + len(e.ids) for e in tokenizer.encode_batch(list(captions), add_special_tokens=False)]


def pack(
    captions: Sequence[Sequence[int]],
    cls: int,
    kept: Sequence[Tensor] | None = None,
    mask: int | None = None,
    *,
    sep: int | None = None,
) -> PackedTokens:
    """Word numbers as one packed batch, [CLS] first in each caption, and `sep` last if it is given.

    `kept[i]` are the 0-based places of the words that stay; the others are left out, or become `mask` if it is given.
    -> values (T,) int64 word numbers, ids (T,) int32 places in the whole caption ([CLS] is 0).
    """
    values: list[int] = []
    ids: list[int] = []
    lengths: list[int] = []
    end = [] if sep is None else [sep]
    for i, words in enumerate(captions):
        after = len(words) + 1  # the place of [SEP], whatever is left out
        places = range(len(words)) if kept is None else kept[i].tolist()
        if mask is not None and kept is not None:
            stay = set(places)
            words, places = [w if j in stay else mask for j, w in enumerate(words)], range(len(words))
        values += [cls, *(words[j] for j in places), *end]
        ids += [0, *(j + 1 for j in places), *(after for _ in end)]
        lengths.append(1 + len(places) + len(end))
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths), 0, out=cu_seqlens[1:])
    return PackedTokens(
        values=torch.tensor(values),
        cu_seqlens=cu_seqlens,
        ids=torch.tensor(ids, dtype=torch.int32),
        size=torch.ones(len(values)),
        max_seqlen=max(lengths),
        lengths=tuple(lengths),
    )


def beginnings(answers: Sequence[Sequence[int]], sep: int) -> tuple[list[list[int]], list[int], list[int]]:
    """What a decoder of answers learns from: every beginning of every answer, the empty one first, for `pack`.

    -> the beginnings, the word after each (`sep` after the last), and the number of the answer that each belongs to.
    """
    begun = [list(words[:n]) for words in answers for n in range(len(words) + 1)]
    after = [word for words in answers for word in (*words, sep)]
    return begun, after, [i for i, words in enumerate(answers) for _ in range(len(words) + 1)]
