"""mlm against its formula: the mean over masked words, and nothing but them, of -log softmax."""

import torch

from smaug.model.model import ModelConfig
from smaug.model.text_encoder import TextEncoderConfig
from smaug.objectives.mlm import Mlm
from smaug.objectives.seen import Masked, Seen
from smaug.testing import relative_error

VOCABULARY = 30
ROWS, LABELS = torch.tensor([1, 3, 4, 7, 10]), torch.tensor([5, 9, 5, 29, 0])


def heads():
    torch.manual_seed(0)
    made = Mlm().heads(ModelConfig(text=TextEncoderConfig(width=16)), VOCABULARY)
    for p in made.parameters():
        p.data = torch.randn_like(p)
    return made


def seen(words):
    return Seen(None, None, None, [], 0, 0, masked=Masked(words.index_select(0, ROWS), LABELS))


def test_is_the_formula_with_its_gradients():
    made = heads()
    words = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = Mlm()(made, seen(words))

    x = torch.nn.functional.gelu(words.double() @ made.transform.weight.double().T + made.transform.bias.double())
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + made.norm.eps).sqrt()
    x = x * made.norm.weight.double() + made.norm.bias.double()
    logits = x @ made.words.weight.double().T + made.words.bias.double()
    truth = sum(logits[r].exp().sum().log() - logits[r, w] for r, w in zip(ROWS, LABELS, strict=True)) / len(ROWS)
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    leaves = {**dict(made.named_parameters()), "words": words}
    got, want = (torch.autograd.grad(y, leaves.values()) for y in (loss, truth))
    for name, a, b in zip(leaves, got, want, strict=True):
        assert b.norm() > 1e-4 and relative_error(a, b) < 1e-5, name


def test_words_that_were_not_masked_do_not_matter():
    made, words = heads(), torch.randn(12, 16)
    other = words + 3
    other[ROWS] = words[ROWS]
    assert torch.equal(Mlm()(made, seen(other)), Mlm()(made, seen(words)))
    other[ROWS[0]] += 1
    assert Mlm()(made, seen(other)) != Mlm()(made, seen(words))


def test_only_masked_words_reach_the_vocabulary():
    made, rows = heads(), []
    made.words.register_forward_hook(lambda _, given, out: rows.append(out.shape))
    with torch.autocast("cpu", torch.bfloat16):
        loss = Mlm()(made, seen(torch.randn(12, 16).bfloat16()))
    assert rows == [(len(ROWS), VOCABULARY)] and loss.dtype == torch.float32


def test_weight_is_not_applied_here():
    made, words = heads(), torch.randn(12, 16)
    assert torch.equal(Mlm(weight=3.0)(made, seen(words)), Mlm()(made, seen(words)))


def test_a_share_of_the_batch_without_masked_words():
    made, words = heads(), torch.randn(3, 16, requires_grad=True)
    none = Masked(words[:0], LABELS[:0])
    loss = Mlm()(made, Seen(None, None, None, [], 0, 0, masked=none))
    assert loss == 0 and Mlm().count(Seen(None, None, None, [], 0, 0, masked=none)) == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, [*made.parameters(), words]))
