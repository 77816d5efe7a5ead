"""AdamW and its schedule. There is no automatic scaling of the learning rate with the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smaug.distributed import whole


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3  # at its peak
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05  # on matrices; norms, biases, embeddings of position and single numbers have none
    steps: int = 1500  # length of the schedule
    warmup: float = 0.05  # share of the steps
    min_lr: float = 0.01  # share of lr at the end of the cosine
    clip: float = 0.0  # norm of all gradients above which they are scaled down to it; 0: never
    ema: float = 0.0  # decay of the mean of the weights that is evaluated in their place; 0: none


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


class Update:
    """What follows a backward: clip, skip what is not finite, step, average. Nothing of it is read by the host.

    A step whose gradients are not all finite leaves weights, moments and AdamW's own count as they are: fused AdamW
    reads `found_inf` on the device, as it does for `torch.amp.GradScaler`. It divides by `grad_scale` too, which clips
    without another pass over the gradients.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config, self.optimizer = config, adamw(model, config)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.norm = torch.zeros((), device=device)  # of the gradients of the last step
        self.skipped = torch.zeros((), device=device)  # steps, in all
        self.in_a_row = torch.zeros((), device=device)  # steps skipped since one was taken
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.ema: dict[str, Tensor] = {}
        if config.ema:
            self.ema = {name: p.detach().clone() for name, p in zip(names, self.parameters, strict=True)}

    def nonfinite(self) -> list[float]:
        """Steps left out in all, and in a row up to now. Reads the device."""
        return torch.stack([self.skipped, self.in_a_row]).tolist()

    def set_nonfinite(self, numbers: list[float]) -> None:
        self.skipped, self.in_a_row = torch.tensor(numbers, device=self.skipped.device).unbind()

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = whole(nn.utils.get_total_norm(gradients))
        bad = (~torch.isfinite(self.norm)).float()
        self.skipped = self.skipped + bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        scale = (self.norm / self.config.clip).clamp(min=1) if self.config.clip else None
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:  # + (1 - ema) (weights - mean), or + 0 where the step was left out
            means = list(self.ema.values())
            away = torch._foreach_sub(self.parameters, means)
            torch._foreach_mul_(away, (1 - self.config.ema) * (1 - bad))
            torch._foreach_add_(means, away)
