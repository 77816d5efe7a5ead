"""Tables that tell a token where and when it stands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_time(table: Tensor, times: int) -> Tensor:
    """A learned table (times it has, D) for another number of moments, (times, D), by linear interpolation."""
    if len(table) == times:
        return table
    return F.interpolate(table.T[None], size=times, mode="linear", align_corners=False)[0].T


def more_places(table: Tensor, places: int) -> Tensor:
    """A learned table of words' places, (places it has, D), for longer texts, (places, D): to fine-tune, not to use.

    Trained rows stay, since a word's place has its meaning in a short text too; after the last, those of the words come
    again from the first on, without [CLS], which is place 0. Longformer, Beltagy et al. 2020, section 5, lengthens
    RoBERTa's table so. Interpolating would move every word that was trained. Fewer places: the first ones.
    """
    if len(table) < 2:
        raise ValueError(f"a table of {len(table)} places has no word's to repeat")
    again = 1 + (torch.arange(places, device=table.device) - 1) % (len(table) - 1)
    return table.index_select(0, torch.where(torch.arange(places, device=table.device) == 0, 0, again))
