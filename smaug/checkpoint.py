"""Checkpoints: `checkpoints/step-N/`, written by a thread while the training goes on. Nothing here loads a pickle.

A checkpoint is written aside, flushed to the disk and renamed, so one that has its name is whole:

    step-N/model.safetensors  optim.safetensors  ema.safetensors (where a run has one)  state.json (with the checksums)
    step-N/model/shard-00001-of-00004.safetensors ...  optim/...  ema/...       of a model in parts (`fully_shard`)

Shards are in the format of torch.distributed.checkpoint's HuggingFaceStorageWriter and read by its reader, into a
model of any number of parts, or of none. Its writer is not used: it makes each file in memory first, as much again as
the shard, and holds Python's lock for it, 0.8 s a GB, in which the training loop would stand still.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

KEPT = 2  # the newest ones; a damaged newest leaves one to fall back on
Piece = tuple[Tensor, list[int]]  # of a tensor, and where in it the piece begins
Which = int | Literal["newest", "best"]
T = TypeVar("T")


class Keeper:
    """Writes the checkpoints of a run, and keeps the newest `keep` and the best.

    group: a gloo group of all processes, of its own, as the thread talks in it beside the training; every process
    makes a Keeper and calls `save` and `wait` alike. The folder is one that all of them see. Of a model that each
    process holds whole (DDP, unwrapped), the first process writes; of one in parts each writes its own.
    """

    def __init__(self, folder: Path, keep: int = KEPT, group: dist.ProcessGroup | None = None) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, not {keep}")
        self.folder, self.keep, self.group = folder, keep, group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.host: dict[str, dict[str, Piece]] = {}  # copies in host memory, used again by the next save
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any],
        ema: dict[str, Tensor] | None = None, score: float | None = None,
    ) -> None:  # fmt: skip
        """Copies a run that has taken `step` steps to host memory, which the loop waits for, and begins to write it.

        ema: tensors by the names of model.state_dict(). score: of the metric by which one is the best; higher is
        better. Waits for the save before this one. Raises OSError if that could not be written.
        """
        self.wait()
        parts = {"model": model.state_dict(), "optim": _optimizer_tensors(model, optimizer)}
        if ema is not None:
            parts["ema"] = ema
        shared = any(isinstance(tensor, DTensor) for tensor in parts["model"].values())
        if shared and self.group is None and dist.get_world_size() > 1:
            raise ValueError("a model in parts is saved by all of its processes: Keeper needs their group")
        if self.rank and not shared:
            return
        self.host = {part: self.host.get(part, {}) for part in parts}
        for part, tensors in parts.items():
            _copy(tensors, self.host[part], self.rank)
        copied = None
        if any(tensor.is_cuda for tensor in parts["model"].values()):
            # The copies are in the stream's order, so the next step may change the weights; the thread waits.
            copied = torch.cuda.Event()
            copied.record()
        state = {"step": step, **json.loads(json.dumps(state))}  # now, as the loop goes on to change it
        if score is not None and math.isfinite(score):
            state["score"] = float(score)
        self.thread = threading.Thread(target=self._write, args=(state, shared, copied), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises OSError in one sentence if it is not; earlier ones are whole."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def check(self) -> None:
        """Raises what `wait` would, if the writing has ended; costs a microsecond. Not every process may hear alike."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def _write(self, state: dict[str, Any], shared: bool, copied: torch.cuda.Event | None) -> None:
        """In the thread. Only files and checksums, which leave Python's lock free; no arithmetic of torch, whose
        threads would keep spinning on the cores that the step computes on."""
        group = self.group if shared else None
        final = self.folder / f"step-{state['step']}"
        aside = self.folder / f".{final.name}.aside"

        def begin() -> None:
            if copied is not None:
                torch.cuda.set_device(copied.device)  # or a new thread would talk to the first
                copied.synchronize()
            if not self.rank:
                _make_aside(aside, self.host if shared else ())

        def write() -> dict[str, int]:
            checksums = {}
            for part, pieces in self.host.items():
                name = f"{part}.safetensors"
                if shared:
                    name = f"{part}/shard-{self.rank + 1:05}-of-{dist.get_world_size(group):05}.safetensors"
                checksums[name] = _write_pieces(aside / name, pieces, shared)
            return checksums

        def finish() -> None:
            if not self.rank:
                _finish(aside, final, state, checksums, self.keep)

        try:
            try:
                _together(group, begin)
                checksums = {name: crc32 for one in _together(group, write) for name, crc32 in one.items()}
                _together(group, finish)
            except OSError:
                if not self.rank:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
        except OSError as error:
            self.error = OSError(f"step {state['step']} could not be saved, earlier checkpoints are whole: {error}")
            self.error.__cause__ = error
        except Exception as error:  # ours; the loop must not go on without checkpoints either
            self.error = error


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any],
    ema: dict[str, Tensor] | None = None, score: float | None = None, keep: int = KEPT,
) -> Path:  # fmt: skip
    """Writes `folder/step-N` and waits for it. For a training loop, see Keeper."""
    keeper = Keeper(folder, keep)
    keeper.save(step, model, optimizer, state, ema, score)
    keeper.wait()
    return folder / f"step-{step}"


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / "state.json").exists()]
    return sorted(int(number) for number in found if number.isdecimal())  # and not somebody's step-100-copy


def best(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a score, the best first; of equal ones the newest."""
    scores = {}
    for step in steps(folder):
        try:
            score = json.loads((folder / f"step-{step}" / "state.json").read_text())["score"]
            if isinstance(score, float):
                scores[step] = score
        except (OSError, ValueError, KeyError, TypeError):  # without a score, or damaged
            continue
    return sorted(scores, key=lambda step: (scores[step], step), reverse=True)


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
    ema: dict[str, Tensor] | None = None, which: Which = "newest", group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any] | None, list[str]]:  # fmt: skip
    """Loads a whole checkpoint -> its state, None if there is none; and a sentence for each damaged one passed over.

    ema: its tensors are filled, from the checkpoint's model where that has none of the name. So
    `ema=model.state_dict()` gives a model to evaluate: with averaged weights if there are any.
    which: a number is that step alone; "best" goes down by the score. group: all its processes call this alike, share
    the work of checking, and take the same one. Model and checkpoint may be whole or in parts, each by itself.
    Raises ValueError for one that does not fit the model.
    """
    parts = ["model", *(["optim"] if optimizer is not None else []), *(["ema"] if ema is not None else [])]
    path, state, files, damaged = _choose(folder, which, parts, group)
    if state is None:
        return None, damaged
    own = model.state_dict()
    _fill(files["model"], lambda saved: _all_of(own, saved, path))
    if ema is not None:
        averaged = _fill(files["ema"], lambda saved: _known(ema, saved)) if "ema" in files else set()
        with torch.no_grad():
            for name in ema.keys() - averaged:
                if name not in own:
                    raise ValueError(f"{path} does not fit the averaged weights: it lacks {name}")
                ema[name].copy_(own[name])
    if optimizer is not None:
        _fill(files["optim"], lambda saved: _optimizer_targets(model, optimizer, saved, path))
    return state, damaged


def load_weights(folder: Path) -> tuple[dict[str, Tensor], int, list[str]]:
    """The weights of the newest whole checkpoint, averaged ones where it has them, on the CPU; its step; a sentence for
    each damaged one. Raises ValueError if there is none."""
    _, state, files, damaged = _choose(folder, "newest", ["model", "ema"])
    if state is None:
        raise ValueError(" ".join([*damaged, f"{folder} has no checkpoint to start from; train it first"]))
    weights: dict[str, Tensor] = {}

    def make_room(saved: dict[str, Tensor]) -> dict[str, Tensor]:
        weights.update({name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()})
        return weights

    _fill(files["model"], make_room)
    if "ema" in files:
        _fill(files["ema"], lambda saved: _known(weights, saved))
    return weights, state["step"], damaged


def fingerprint(folder: Path, step: int) -> str:
    """The first 16 hex digits of the sha256 of the weights that a checkpoint is evaluated with: which model a number
    belongs to. The same model in other parts has another one."""
    digest = hashlib.sha256()
    for name in _evaluated(folder / f"step-{step}"):
        with open(folder / f"step-{step}" / name, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()[:16]


def weights_crc32(folder: Path, step: int) -> int:
    """As `fingerprint`, from the checksums of the files, without reading them."""
    checksums = list(_evaluated(folder / f"step-{step}").values())
    return checksums[0] if len(checksums) == 1 else zlib.crc32(json.dumps(checksums).encode())


def _evaluated(path: Path) -> dict[str, int]:
    checksums = json.loads((path / "state.json").read_text())["crc32"]
    return _of_part(checksums, "ema") or _of_part(checksums, "model")


def _of_part(checksums: dict[str, int], part: str) -> dict[str, int]:
    """Those of the files of `part`, whole or shards, by name."""
    return {n: checksums[n] for n in sorted(checksums) if n.split("/")[0].removesuffix(".safetensors") == part}


# Writing


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], host: dict[str, Piece], rank: int) -> None:
    """Copies what this process is to write of some tensors to `host`, where room is made once."""
    mine = {name: tensor for name, tensor in tensors.items() if _is_written_by(tensor, rank)}
    for name in host.keys() - mine.keys():
        del host[name]
    for name, tensor in mine.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in host or (host[name][0].shape, host[name][0].dtype) != (local.shape, local.dtype):
            begins = tensor.__create_chunk_list__()[0].offsets if isinstance(tensor, DTensor) else [0] * tensor.dim()
            host[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda), list(begins)
        host[name][0].copy_(local, non_blocking=True)


def _is_written_by(tensor: Tensor, rank: int) -> bool:
    """A whole tensor by the first process; of one in parts each its own, if it has any and no other has the same."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    at = tensor.device_mesh.get_coordinate() or ()
    copy = any(number and not where.is_shard() for number, where in zip(at, tensor.placements, strict=True))
    return not copy and tensor.to_local().numel() > 0


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """What `work` returns in each process. An OSError in one of them is raised in all, when all have ended."""
    if group is None:
        return [work()]
    done, said = None, ""
    try:
        done = work()
    except OSError as error:
        said = str(error)
    try:
        everyone = _gather(group, (done, said))
    except RuntimeError as error:  # gloo: a process has ended
        raise OSError(f"another process cannot be reached ({str(error).splitlines()[0]})") from error
    if wrong := list(dict.fromkeys(said for _, said in everyone if said)):
        raise OSError("; ".join(wrong))
    return [done for done, _ in everyone]  # type: ignore[misc]


def _gather(group: dist.ProcessGroup, value: T) -> list[T]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def _make_aside(aside: Path, parts: Iterable[str]) -> None:
    for old in aside.parent.glob(".step-*.aside"):  # left by runs that were killed
        shutil.rmtree(old)
    aside.mkdir(parents=True)
    for part in parts:
        (aside / part).mkdir()


def _write_pieces(path: Path, pieces: dict[str, Piece], shared: bool) -> int:
    """-> the CRC-32 of the file."""
    metadata = None
    if shared:
        places = {name: {"saved_offsets": begins} for name, (_, begins) in pieces.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    try:
        save_file({name: piece for name, (piece, _) in pieces.items()}, path, metadata)
    except SafetensorError as error:  # a full disk, which is none of our callers' business to know by this name
        raise OSError(f"{path} cannot be written: {error}") from None
    _flush(path)
    return _crc32(path)


def _finish(aside: Path, final: Path, state: dict[str, Any], checksums: dict[str, int], keep: int) -> None:
    """Gives a checkpoint its name, and removes those that are no longer kept."""
    checksums = {**checksums, "state.json": _state_crc32(state, checksums)}
    (aside / "state.json").write_text(json.dumps({**state, "crc32": checksums}))
    for path in {aside / "state.json", *((aside / name).parent for name in checksums)}:
        _flush(path)  # a folder is flushed for the names in it
    if final.exists():  # left by a run that was stopped twice at one step
        os.rename(final, final.with_name(f".{final.name}.old.aside"))
    os.rename(aside, final)
    _flush(final.parent)
    stay = {*steps(final.parent)[-keep:], *best(final.parent)[:1]}
    for number in set(steps(final.parent)) - stay:
        os.rename(final.with_name(f"step-{number}"), final.with_name(f".step-{number}.old.aside"))
    for old in final.parent.glob(".step-*.aside"):
        shutil.rmtree(old)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _crc32(path: Path) -> int:
    crc32 = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            crc32 = zlib.crc32(data, crc32)
    return crc32


def _state_crc32(state: dict[str, Any], checksums: dict[str, int]) -> int:
    return zlib.crc32(json.dumps({**state, "crc32": checksums}).encode())


# Reading


def _choose(
    folder: Path, which: Which, parts: Sequence[str], group: dist.ProcessGroup | None = None
) -> tuple[Path, dict[str, Any] | None, dict[str, list[Path]], list[str]]:
    """The first whole one of those asked for: its folder, its state, its files of each part that it has; and a
    sentence for each damaged one before it."""
    if which == "newest":
        candidates = steps(folder)[::-1]
    else:
        candidates = best(folder) if which == "best" else [step for step in steps(folder) if step == which]
    if group is not None:
        candidates = _gather(group, candidates)[0]
    damaged: list[str] = []
    for step in candidates:
        path = folder / f"step-{step}"
        state, files, wrong = _check(path, parts, group)
        if not wrong:
            return path, state, files, damaged
        damaged.append(f"{path} is damaged ({wrong}) and was passed over")
    return folder, None, {}, damaged


def _check(
    path: Path, parts: Sequence[str], group: dist.ProcessGroup | None
) -> tuple[dict[str, Any] | None, dict[str, list[Path]], str]:
    """The state of a checkpoint, its files of each of some parts, and what is wrong with them, if anything. The
    processes of a group share the files; what one finds all say."""
    rank, count = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    state, files, wrong = None, {}, ""
    try:
        state = json.loads((path / "state.json").read_text())
        checksums = state.pop("crc32")
        # The first checkpoints had no checksum of the checksums.
        if checksums.pop("state.json") not in (_state_crc32(state, checksums), zlib.crc32(json.dumps(state).encode())):
            raise ValueError("checksum of state.json")
        for part in parts:
            if names := _of_part(checksums, part):
                files[part] = [path / name for name in names]
            elif part != "ema":
                raise ValueError(f"no file of {part}")
        mine = [file for named in files.values() for file in named][rank::count]
        bad = [name for file in mine if _crc32(file) != checksums[name := str(file.relative_to(path))]]
        wrong = f"checksum of {', '.join(bad)}" if bad else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # JSON, but not ours
        wrong = str(error) or type(error).__name__
    if group is not None:
        wrong = next(filter(None, _gather(group, wrong)), "")
    return state, files, wrong


def _fill(files: list[Path], choose: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> set[str]:
    """Fills tensors in place, whole or in parts, from one whole file or from shards -> their names.

    choose: what to fill, given what there is: tensors that may have no data, but have shapes and dtypes."""
    sharded = files[0].name.startswith("shard-")
    if not sharded:
        saved = load_file(files[0])
        targets = choose(saved)
        if not any(isinstance(target, DTensor) for target in targets.values()):
            with torch.no_grad():
                for name, target in targets.items():
                    target.copy_(saved[name])
            return set(targets)
    from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader  # takes a second
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs.ls = lambda path: list(map(str, files))  # type: ignore[method-assign]  # those with a checksum alone
    metadata = reader.read_metadata()
    saved = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # all there is in such files
        saved[name] = torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"{files[0].parent} lacks a piece of {name}")
    targets = choose(saved)
    # What torch.distributed.checkpoint.load does, but each process plans for itself and nothing is sent.
    planner = DefaultLoadPlanner()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()
    return set(targets)


def _known(own: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in own.items() if name in saved}


def _all_of(own: dict[str, Tensor], saved: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Raises ValueError unless there is for each tensor of a model one of its shape, and no other."""
    wrong = [f"it lacks {name}" for name in own.keys() - saved.keys()]
    wrong += [f"its {name} is unknown" for name in saved.keys() - own.keys()]
    wrong += [
        f"its {name} is {tuple(saved[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {', '.join(sorted(wrong)[:3])}")
    return own


def _optimizer_targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Makes room in the optimiser for what is saved: in parts what is in the parameter's, else whole."""
    parameters = dict(model.named_parameters())
    targets = {}
    for name, tensor in saved.items():
        parameter, key = name.rsplit("/", 1)
        p = parameters.get(parameter)
        if p is None:
            raise ValueError(f"{path} does not fit the model: its optimiser has {parameter}, which is unknown")
        if tensor.shape == p.shape:
            room = torch.empty_like(p, dtype=tensor.dtype, requires_grad=False)
        else:  # a fused AdamW keeps its step count as fp32 on the parameter's device
            room = torch.empty(tensor.shape, dtype=tensor.dtype, device=p.device)
        targets[name] = optimizer.state[p][key] = room
    return targets
