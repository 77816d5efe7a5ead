"""Tables that tell a token where and when it stands."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resample_time(table: Tensor, times: int) -> Tensor:
    """A learned table (times it has, D) for another number of moments, (times, D), by linear interpolation."""
    if len(table) == times:
        return table
    return F.interpolate(table.T[None], size=times, mode="linear", align_corners=False)[0].T
