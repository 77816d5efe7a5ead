"""Late ensembles: each frame, or each clip of a video, is scored by itself, and the scores become one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Ensemble = Literal["concat", "mean", "max", "lse"]


def ensemble(logits: Tensor, valid: Tensor, how: Ensemble) -> Tensor:
    """logits (n, units) or (n, units, classes), fp32; valid (n, units) bool, False for padding -> (n,) or (n, classes).

    mean, max; lse: log of the mean of exp(logit), which is logsumexp less the log of how many units there are, so that
    videos of different length compare. Padding may hold anything. A row without a valid unit is -inf.
    ClipBERT, Lei et al. 2021, section 3.1; Singularity, Lei et al. 2023, section 3.
    """
    mask = valid.unsqueeze(2) if logits.ndim == 3 else valid
    count = mask.sum(1)
    if how == "mean":
        total = logits.masked_fill(~mask, 0).sum(1)
        return (total / count.clamp(min=1)).masked_fill(count == 0, float("-inf"))
    hidden = logits.masked_fill(~mask, float("-inf"))
    if how == "max":
        return hidden.amax(1)
    if how == "lse":
        return hidden.logsumexp(1) - count.clamp(min=1).log()
    raise ValueError(f"{how!r} aggregates no scores: with it all frames are fused together; use mean, max or lse")
