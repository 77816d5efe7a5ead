"""AdamW's groups, and its schedule number by number."""

import itertools
import math

import pytest
import torch
from torch import nn

from smaug.optim import OptimConfig, Update, adamw, learning_rate
from smaug.recipe import load, names
from smaug.run import build
from smaug.step import seed_of


def test_schedule():
    config = OptimConfig(lr=2.0, steps=100, warmup=0.1, min_lr=0.05)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(0.1 + 1.9 * 0.5)  # half way down the cosine
    assert rates[99] == pytest.approx(0.1 + 1.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(100, config) == learning_rate(1000, config) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedule_of_next_to_nothing(steps, warmup):
    rates = [learning_rate(s, OptimConfig(lr=1.0, steps=steps, warmup=warmup)) for s in range(steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("name", names())
def test_decay_acts_on_the_weights_of_linear_layers_alone(name):
    recipe = load(name)
    config = OptimConfig(weight_decay=0.3)
    model = build(recipe, vocabulary=30, impl="auto")
    optimizer = adamw(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    spared = ("bias", "norm", "position", "time", "cls", "word.weight", "temperature")
    decayed = 0
    for parameter, p in model.named_parameters():
        linear = p.ndim == 2 and not any(word in parameter for word in spared)
        assert decay[id(p)] == (0.3 if linear else 0.0), parameter
        decayed += linear
    assert decayed >= 4 * (len(model.video.blocks) + len(model.text.blocks)) + 1
    assert all(decay[id(p)] == 0 for n, p in model.named_parameters() if p.ndim < 2)


def test_one_step_is_adamw():
    """Against the formula of the paper, in fp64, for a weight that decays and a bias that does not."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    optimizer = adamw(layer, config)
    leaves = {"weight": 0.5, "bias": 0.0}
    want = {name: (getattr(layer, name).detach().double(), 0.0, 0.0) for name in leaves}
    for step in (1, 2):
        layer(torch.randn(4, 3)).square().sum().backward()
        for name, decay in leaves.items():
            p, m, v = want[name]
            g = getattr(layer, name).grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            p = p * (1 - 0.1 * decay) - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
            want[name] = p, m, v
        optimizer.step()
        optimizer.zero_grad()
    for name, (p, _, _) in want.items():
        torch.testing.assert_close(getattr(layer, name).detach().double(), p, atol=1e-6, rtol=1e-5)


def gradients_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_an_update_clips_as_torch_does_and_averages():
    config = OptimConfig(clip=0.5, ema=0.75, steps=10, warmup=0.0)
    model, twin = (nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    update, optimizer = Update(model, config), adamw(twin, config)
    mean = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step in range(4):
        for one in (model, twin):
            gradients_of(one, step)
            if step == 3:  # shorter than the limit: left alone
                for p in one.parameters():
                    p.grad *= 1e-3
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        update(step)
        torch.testing.assert_close(update.norm, norm)
        for name, p in twin.named_parameters():
            mean[name] = 0.75 * mean[name] + 0.25 * p.detach()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, dict(twin.named_parameters())[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(update.ema[name], mean[name], rtol=1e-5, atol=1e-7)
        assert p.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_update_leaves_out_what_is_not_finite(value):
    model = nn.Linear(5, 7)
    update = Update(model, OptimConfig(clip=1.0))
    gradients_of(model, 0)
    update(0)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in update.optimizer.state[p].items()} for p in model.parameters()]
    for step in (1, 2):
        gradients_of(model, step)
        model.bias.grad[3] = value
        update(step)
        assert update.nonfinite() == [step, step]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for p, old in zip(model.parameters(), moments, strict=True):
        assert all(torch.equal(update.optimizer.state[p][k], v) for k, v in old.items())
    gradients_of(model, 3)
    update(3)
    assert update.nonfinite() == [2, 0] and not torch.equal(model.bias, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_left_out_and_the_mean_stays(value):
    """Also where its gradients are finite."""
    model = nn.Linear(5, 7)
    update = Update(model, OptimConfig(ema=0.5, warmup=0.0))
    for step, more in enumerate((1.0, value, 2.0)):
        before, mean = model.weight.detach().clone(), update.ema["weight"].clone()
        loss = model(torch.ones(2, 5)).square().sum() + more
        loss.backward(seed_of(loss))
        update(step)
        stays = step == 1
        assert torch.equal(model.weight, before) == stays and torch.equal(update.ema["weight"], mean) == stays
    assert update.nonfinite() == [1, 0]
