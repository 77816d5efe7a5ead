"""Where a token stands: tables that start as sines and cosines and are then learned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos(length: int, width: int, base: float = 100.0) -> Tensor:
    """(length, width) table of unit amplitude; Vaswani et al. 2017, section 3.5, with a base for short axes."""
    rate = base ** (-torch.arange(width // 2) / (width // 2))
    angle = torch.arange(length)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_grid(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): half the width tells the row, half the column; MAE, He et al. 2022, appendix A."""
    by_row = sincos(rows, width // 2)[:, None].expand(-1, columns, -1)
    by_column = sincos(columns, width // 2)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=2).flatten(0, 1)


def resample_time(table: Tensor, frames: int) -> Tensor:
    """A table (F, D) for another number of frames, (frames, D), by linear interpolation; one frame gets the middle."""
    if len(table) == frames:
        return table
    return F.interpolate(table.T[None], size=frames, mode="linear", align_corners=False)[0].T
