"""Triton's interpreter, which must be chosen before Triton is imported: these files run in a pytest of their own, which
tests/kernels/test_interpreter.py starts. In a plain run they are not collected."""

from __future__ import annotations

import os
import random

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is NaN, or a number that cannot be right, so that reading it shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.device.type == "cpu":
                x.fill_(torch.nan if x.is_floating_point() else -7)
            return x

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def in_every_order(monkeypatch):
    """in_every_order(f) runs f with programs in ascending, descending and shuffled order and demands equal bits.

    The interpreter runs programs one after another; where they depend on each other, the order shows it.
    """
    from triton.runtime import interpreter

    builder, plain = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_idx

    def results(f):
        out = f()
        return [x for x in (out if isinstance(out, tuple | list) else (out,)) if x is not None]

    def check(f):
        first = results(f)
        for name in ("descending", "shuffled"):

            def moved(*idx, name=name):
                size = builder.grid_dim
                number = idx[0] + size[0] * (idx[1] + size[1] * idx[2])
                total = size[0] * size[1] * size[2]
                if name == "descending":
                    number = total - 1 - number
                else:
                    order = list(range(total))
                    random.Random(total).shuffle(order)
                    number = order[number]
                plain(number % size[0], number // size[0] % size[1], number // (size[0] * size[1]))

            monkeypatch.setattr(builder, "set_grid_idx", moved)
            for a, b in zip(first, results(f), strict=True):
                assert torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)), (
                    f"{name} program order changes the result"
                )
            monkeypatch.setattr(builder, "set_grid_idx", plain)
        return first[0] if len(first) == 1 else tuple(first)

    return check
