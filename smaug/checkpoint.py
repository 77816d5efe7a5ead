"""Checkpoints: `checkpoints/step-N/{model,optim}.safetensors` and `state.json`. Nothing here loads a pickle.

A checkpoint is written aside, flushed to the disk and renamed, so one that has its name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

KEPT = 2  # the newest ones; a damaged newest leaves one to fall back on


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Writes `folder/step-N` for a run that has taken N steps, and removes all but the newest two."""
    final, aside = folder / f"step-{step}", folder / f".step-{step}.aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, aside / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), aside / "optim.safetensors")
        checksums = {name: _crc32(aside / name) for name in ("model.safetensors", "optim.safetensors")}
        (aside / "state.json").write_text(json.dumps({"step": step, "crc32": checksums, **state}))
        for file in aside.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was stopped twice at one step
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(folder / f"step-{old}")
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if (p / "state.json").exists())


def load_newest(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Loads the newest whole checkpoint -> its state, None if there is none; and a sentence for each damaged one."""
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step}"
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            files = {name: (path / name).read_bytes() for name in state["crc32"]}
        except (OSError, ValueError) as error:
            damaged.append(f"{path} is damaged ({error}) and was passed over")
            continue
        wrong = [name for name, data in files.items() if zlib.crc32(data) != state["crc32"][name]]
        if wrong:
            damaged.append(f"{path} is damaged (checksum of {', '.join(wrong)}) and was passed over")
            continue
        model.load_state_dict(load(files["model.safetensors"]))
        if optimizer is not None:
            _set_optimizer_tensors(model, optimizer, load(files["optim.safetensors"]))
        return state, damaged
    return None, damaged


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value.contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def _set_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        p = parameters[parameter]
        # A fused AdamW keeps its step count as fp32 on the parameter's device.
        optimizer.state[p][key] = value.to(p.device)


def _crc32(path: Path) -> int:
    return zlib.crc32(path.read_bytes())
