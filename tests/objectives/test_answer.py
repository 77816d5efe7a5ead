"""Open questions: a class for each answer, or a decoder that goes on from beginnings."""

import torch
from torch.nn import functional as F

from smaug.data import text
from smaug.model.model import ModelConfig
from smaug.objectives.answer import Answer, Classifier, Speller
from smaug.objectives.seen import Asked, Seen
from smaug.tokens import packed_uniform

NONE = torch.empty(0, dtype=torch.int64)
CLS, SEP = 2, 3


def seen(asked):
    return Seen(None, None, None, [], 0, 0, asked=asked)


def test_an_answer_that_the_list_lacks_teaches_nothing():
    answer = Answer(answers=("yes", "no", "two dogs"))
    head = answer.heads(ModelConfig(), 10)
    assert isinstance(head, Classifier) and head(torch.randn(4, 128)).shape == (4, 3)
    words = packed_uniform(torch.randn(3, 128), 1)
    loss = answer(head, seen(Asked(words, torch.tensor([1, -100, 2]), None, NONE, NONE)))
    expected = F.cross_entropy(head(words.values[[0, 2]]), torch.tensor([1, 2]))
    torch.testing.assert_close(loss, expected)
    nothing = answer(head, seen(Asked(words, torch.tensor([-100] * 3), None, NONE, NONE)))
    assert nothing == 0 and nothing.requires_grad


def test_beginnings():
    begun, after, of = text.beginnings([[7, 8], [9]], SEP)
    assert begun == [[], [7], [7, 8], [], [9]] and after == [7, 8, SEP, 9, SEP] and of == [0, 0, 0, 1, 1]


def test_the_decoder_reads_its_own_question_and_its_own_beginning_alone():
    answer = Answer(by="decoder")
    head = answer.heads(ModelConfig(), 30)
    assert isinstance(head, Speller)
    begun, after, of = text.beginnings([[7, 8], [9]], SEP)
    questions, of = packed_uniform(torch.randn(8, 128), 4), torch.tensor(of)
    logits = head(text.pack(begun, CLS), questions, of)
    assert logits.shape == (5, 30)
    torch.testing.assert_close(
        answer(head, seen(Asked(questions, NONE, text.pack(begun, CLS), torch.tensor(after), of))),
        F.cross_entropy(logits, torch.tensor(after)),
    )
    # alone, and beside others, the same; another question or another beginning, another answer
    torch.testing.assert_close(head(text.pack([begun[2]], CLS), questions, of[2:3])[0], logits[2])
    assert not torch.allclose(head(text.pack([begun[2]], CLS), questions, 1 - of[2:3])[0], logits[2], atol=1e-4)
    assert not torch.allclose(head(text.pack([[8, 7]], CLS), questions, of[2:3])[0], logits[2], atol=1e-4)
