"""Checkpoints: `checkpoints/step-N/{model,optim}.safetensors` and `state.json`. Nothing here loads a pickle.

A checkpoint is written aside, flushed to the disk and renamed, so one that has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

FILES = ("model.safetensors", "optim.safetensors")
KEPT = 2  # the newest ones; a damaged newest leaves one to fall back on


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Writes `folder/step-N` for a run that has taken N steps, and removes all but the newest two."""
    final, aside = folder / f"step-{step}", folder / f".step-{step}.aside"
    for old in folder.glob(".step-*.aside"):  # left by runs that were killed
        shutil.rmtree(old)
    aside.mkdir(parents=True)
    try:
        _write({k: v.contiguous() for k, v in model.state_dict().items()}, aside / "model.safetensors")
        _write(_optimizer_tensors(model, optimizer), aside / "optim.safetensors")
        state = {"step": step, **state}
        checksums = {name: zlib.crc32((aside / name).read_bytes()) for name in FILES}
        checksums["state.json"] = zlib.crc32(json.dumps(state).encode())
        (aside / "state.json").write_text(json.dumps({**state, "crc32": checksums}))
        for file in aside.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was stopped twice at one step
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for number in steps(folder)[:-KEPT]:
        shutil.rmtree(folder / f"step-{number}")
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / "state.json").exists()]
    return sorted(int(number) for number in found if number.isdecimal())  # and not somebody's step-100-copy


def load_newest(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Loads the newest whole checkpoint -> its state, None if there is none; and a sentence for each damaged one."""
    state, files, damaged = read_newest(folder)
    if state is not None:
        model.load_state_dict(load(files["model.safetensors"]))
        if optimizer is not None:
            _set_optimizer_tensors(model, optimizer, load(files["optim.safetensors"]))
    return state, damaged


def load_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The weights of the newest whole checkpoint, and its step. Raises ValueError if there is none."""
    state, files, damaged = read_newest(folder)
    if state is None:
        raise ValueError(" ".join([*damaged, f"{folder} has no checkpoint to start from; train it first"]))
    return load(files["model.safetensors"]), state["step"]


def read_newest(folder: Path) -> tuple[dict[str, Any] | None, dict[str, bytes], list[str]]:
    """The newest whole checkpoint: its state, None if there is none; its files; a sentence for each damaged one."""
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step}"
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            checksums = state.pop("crc32")
            files = {name: (path / name).read_bytes() for name in FILES}
            found = {name: zlib.crc32(data) for name, data in files.items()}
            found["state.json"] = zlib.crc32(json.dumps(state).encode())
            wrong = [name for name in found if found[name] != checksums[name]]
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # JSON, but not ours
            damaged.append(f"{path} is damaged ({error}) and was passed over")
            continue
        if wrong:
            damaged.append(f"{path} is damaged (checksum of {', '.join(wrong)}) and was passed over")
            continue
        return state, files, damaged
    return None, {}, damaged


def fingerprint(folder: Path, step: int) -> str:
    """The first 16 hex digits of the sha256 of a checkpoint's weights: which model a number belongs to."""
    with open(folder / f"step-{step}" / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, which is none of our callers' business to know by this name
        raise OSError(f"{path} cannot be written: {error}") from None
