"""AdamW and its schedule. There is no automatic scaling of the learning rate with the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3  # at its peak
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05  # on matrices; norms, biases, embeddings of position and single numbers have none
    steps: int = 1500  # length of the schedule
    warmup: float = 0.05  # share of the steps
    min_lr: float = 0.01  # share of lr at the end of the cosine


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, Loshchilov and Hutter 2019. Weight decay acts on the weights of linear layers alone."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: OptimConfig) -> float:
    """At step 0, 1, ...: linear warm-up, then a cosine down to min_lr * lr at the end of the schedule."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
