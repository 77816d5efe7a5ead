"""Shared by tests and benchmarks: packed inputs with awkward lengths, poisoned tails, a counter of host reads,
a run that was never trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from smaug.recipe import Recipe


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """cu_seqlens (S + 1,) int32 of host lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def packed(
    lengths: Sequence[int], *shape: int, tail: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random rows (sum(lengths) + tail, *shape) and their cu_seqlens; the tail is NaN, so reading it shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    x = torch.randn(rows + tail, *shape, generator=generator, dtype=torch.float64).to(dtype)
    x[rows:] = torch.nan
    return x, offsets(lengths)


def surrounded(x: Tensor, margin: int = 64) -> Tensor:
    """x as a view inside a larger buffer of NaN, so that a read past either end spoils the result."""
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[margin : margin + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    truth = truth.double()
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


class HostReads(TorchDispatchMode):
    """Lists the ops that read the device on the host or have a data-dependent shape. What a registered smaug op does
    inside is not seen: on CPU tensors it may read."""

    forbidden = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.launched.append(name)
        if name in self.forbidden:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def save_random_run(folder: Path, recipe: Recipe, captions: Sequence[str], fast: bool = False) -> None:
    """The folder of a run that was never trained: random weights at step 0, and a tokenizer of `captions`."""
    from smaug import checkpoint  # here: tests of the ops need no more than torch
    from smaug.data.text import train_tokenizer
    from smaug.recipe import to_json
    from smaug.run import build

    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(captions, recipe.data.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"recipe": to_json(recipe), "fast": fast, "size": "random"}))
    model = build(recipe, tokenizer.get_vocab_size(), "reference")
    checkpoint.save(folder / "checkpoints", 0, model, torch.optim.AdamW(model.parameters()), {})
