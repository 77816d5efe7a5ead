"""Captions to packed word numbers, the same in every process."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer

from smaug.data import text

CAPTIONS = [f"The {c} {s} {v}, naïvely {i}x!" for i, c in enumerate(("red", "green")) for s in ("ring", "cross")
            for v in ("grows", "moves left")]  # fmt: skip
WORDS = [[10, 11, 12], [20], [30, 31, 32, 33]]
KEPT = [torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([3])]


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(CAPTIONS, 200)


def test_trainings_give_the_same_in_every_process():
    """The trainer of `tokenizers` alone does not: it seeds its hash tables anew each time."""
    captions = [hashlib.md5(bytes([i])).hexdigest() + " runs" for i in range(60)]  # many pieces, many ties
    whole = text.train_tokenizer(captions, 150)
    assert whole.get_vocab_size() == 150
    assert all(text.train_tokenizer(captions, 150).to_str() == whole.to_str() for _ in range(3))
    assert text.train_tokenizer([*captions[::-1], captions[0]], 150).to_str() == whole.to_str()
    code = f"from smaug.data import text\nprint(text.train_tokenizer({captions}, 150).to_str(), end='')"
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert other.stdout == whole.to_str()


def test_it_is_berts_word_piece(tokenizer):
    assert [text.number(tokenizer, p) for p in (text.PAD, text.UNK, text.CLS, text.SEP, text.MASK)] == [0, 1, 2, 3, 4]
    said = tokenizer.encode("the RED ring  grows, Naïvely")
    assert said.tokens == ["[CLS]", "the", "red", "ring", "grows", ",", "naively", "[SEP]"]
    assert tokenizer.encode("rings reds").tokens == ["[CLS]", "ring", "##s", "red", "##s", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("the red rings").ids) == "the red rings"
    assert tokenizer.encode("##s").tokens == ["[CLS]", "[UNK]", "[UNK]", "s", "[SEP]"]  # no inner letter is special
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.encode(CAPTIONS[3]).ids == tokenizer.encode(CAPTIONS[3]).ids
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_a_foreign_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"the tokenizer has no \[MISSING\]; use the tokenizer.json"):
        text.number(tokenizer, "[MISSING]")


def test_captions_are_cut_and_never_empty(tokenizer):
    whole = tokenizer.encode(CAPTIONS[0], add_special_tokens=False).ids
    assert len(whole) > 5
    long, cut, empty, spaces, unknown = [
        text.encode(tokenizer, [c], n)[0]
        for c, n in ((CAPTIONS[0], 64), (CAPTIONS[0], 5), ("", 5), (" \n\t", 5), ("一只狗", 8))
    ]
    assert long == whole and cut == whole[:4]  # [CLS] is the fifth
    assert empty == spaces == [1] and unknown == [1, 1, 1]
    assert text.encode(tokenizer, [CAPTIONS[0], ""], 5) == [cut, empty]


def check(packed, values, ids, lengths):
    assert packed.values.tolist() == values and packed.values.dtype == torch.int64
    assert packed.ids.tolist() == ids and packed.ids.dtype == torch.int32
    assert packed.lengths == tuple(lengths) and packed.max_seqlen == max(lengths)
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.size.tolist() == [1.0] * len(values)


def test_pack_whole():
    check(text.pack(WORDS, 2), [2, 10, 11, 12, 2, 20, 2, 30, 31, 32, 33], [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4], [4, 2, 5])


def test_pack_drops_words_and_keeps_their_places():
    check(text.pack(WORDS, 2, KEPT), [2, 10, 12, 2, 20, 2, 33], [0, 1, 3, 0, 1, 0, 4], [3, 2, 2])


def test_pack_masks_words():
    packed = text.pack(WORDS, 2, KEPT, mask=4)
    check(packed, [2, 10, 4, 12, 2, 20, 2, 4, 4, 4, 33], [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4], [4, 2, 5])
    assert WORDS == [[10, 11, 12], [20], [30, 31, 32, 33]]
