"""vtm against its formula, and the draw of its negatives: never a positive, likely where the contrast errs."""

import math

import pytest
import torch

from smaug.model.model import ModelConfig
from smaug.model.text_encoder import TextEncoderConfig
from smaug.objectives.seen import Pairs, Seen
from smaug.objectives.vtm import Vtm
from smaug.step import hard_negatives
from smaug.testing import relative_error


def seen(features, labels, valid):
    return Seen(None, None, None, [], 0, 0, pairs=Pairs(features, labels, valid))


def test_is_the_formula_over_valid_pairs():
    torch.manual_seed(0)
    head = Vtm().heads(ModelConfig(text=TextEncoderConfig(width=16)), 0)
    head.bias.data = torch.randn(2)
    x = torch.randn(9, 16).requires_grad_()
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    valid = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0, 1]).bool()
    loss = Vtm()(head, seen(x, labels, valid))
    logits = x.double() @ head.weight.double().T + head.bias.double()
    truth = sum(logits[i].exp().sum().log() - logits[i, labels[i]] for i in range(9) if valid[i]) / 7
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    leaves = [x, *head.parameters()]
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert relative_error(a, b) < 1e-5
    (gradient,) = torch.autograd.grad(Vtm()(head, seen(x, labels, valid)), x)
    assert ((gradient != 0).any(1) == valid).all()


def random_batch(generator, b):
    """(B, B) pairs that share a video or a caption, of which there are few, so many do."""
    video, caption = (torch.randint(0, n, (b,), generator=generator) for n in (max(1, b // 2), max(1, b // 3)))
    return (video[:, None] == video) | (caption[:, None] == caption)


def test_negatives_never_share_the_video_or_the_caption():
    generator = torch.Generator().manual_seed(0)
    too_few = 0
    for step in range(400):
        b = int(torch.randint(1, 12, (), generator=generator))
        count = int(torch.randint(1, 4, (), generator=generator))
        same = random_batch(generator, b)
        scores = torch.randn(b, b, generator=generator) * 10 + 50 * same  # the positives score best
        drawn, valid = hard_negatives(scores, same, count, seed=0, step=step)
        assert drawn.shape == valid.shape == (b, min(count, b)) and drawn.dtype == torch.int64
        assert not (same.gather(1, drawn) & valid).any()
        # Valid are as many as there are, and no negative is drawn twice for a text.
        assert torch.equal(valid.sum(1), (~same).sum(1).clamp(max=min(count, b)))
        assert all(len(set(row)) == len(row) for row in drawn.tolist())
        too_few += not valid.all()
    assert 20 < too_few < 380


def test_a_draw_repeats_for_a_step_and_differs_between_steps():
    scores, same = torch.zeros(16, 16), torch.eye(16, dtype=torch.bool)
    drawn = [hard_negatives(scores, same, 2, seed=s, step=t)[0] for s, t in ((0, 5), (0, 5), (0, 6), (1, 5))]
    assert torch.equal(drawn[0], drawn[1])
    for other in drawn[2:]:
        assert (other != drawn[0]).float().mean() > 0.5


@pytest.mark.parametrize("sharp", [0.0, 1.0])
def test_negatives_are_drawn_in_proportion_to_exp_score(sharp):
    b, steps = 32, 300
    scores = sharp * torch.linspace(-2, 2, b)[torch.randperm(b, generator=torch.Generator().manual_seed(0))]
    same = torch.eye(b, dtype=torch.bool)
    drawn = [hard_negatives(scores.expand(b, b), same, 1, seed=3, step=t)[0] for t in range(steps)]
    count = torch.cat(drawn).flatten().bincount(minlength=b)
    share = scores.exp().expand(b, b).masked_fill(same, 0)
    expected = (share / share.sum(1, keepdim=True)).sum(0) * steps
    assert expected.max() / expected.min() > (40 if sharp else 0.99)
    assert ((count - expected).abs() < 4.5 * expected.sqrt()).all(), (count, expected)


def test_a_score_out_of_reach_is_always_drawn():
    scores, same = torch.zeros(6, 6), torch.eye(6, dtype=torch.bool)
    scores[torch.arange(6), [3, 3, 3, 0, 3, 3]] = 1e4
    for step in range(20):
        drawn, valid = hard_negatives(scores, same, 2, seed=0, step=step)
        assert drawn[:, 0].tolist() == [3, 3, 3, 0, 3, 3] and valid.all()


def test_a_blind_head_costs_the_entropy_of_one_third():
    head = Vtm().heads(ModelConfig(text=TextEncoderConfig(width=16)), 0)
    head.weight.data.zero_()
    labels = torch.tensor([1, 0, 0])
    head.bias.data = torch.tensor([math.log(2.0), 0.0])
    loss = Vtm()(head, seen(torch.randn(3, 16), labels, torch.ones(3, dtype=torch.bool)))
    assert loss.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
