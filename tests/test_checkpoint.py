"""A checkpoint that has its name is whole, comes back bit for bit, and a damaged one is passed over aloud."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

from smaug import checkpoint
from smaug.optim import OptimConfig, adamw

FILES = ("model.safetensors", "optim.safetensors")


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    model.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
    model.scale = nn.Parameter(torch.tensor(1.5))
    return model, adamw(model, OptimConfig())


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        (model(torch.randn(4, 6, generator=generator)) * model.scale).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1


def everything(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {f"{names[id(p)]} {k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    return {k: (v.dtype, v.tolist()) for k, v in sorted({**model.state_dict(), **moments}.items())}


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints of steps 1, 2 and 3 written, and what each held."""
    model, optimizer = make()
    held = {}
    for step in (1, 2, 3):
        train(model, optimizer, 1, seed=step)
        path = checkpoint.save(tmp_path, step, model, optimizer, {"totals": {"clips": 64.1 * step}})
        assert path == tmp_path / f"step-{step}"
        held[step] = everything(model, optimizer)
    return tmp_path, held


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_is_bit_exact_and_training_goes_on_the_same(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 3)
    state = {"totals": {"seconds": 0.1 + 0.2, "clips": 10**12}, "note": "é", "pair": (1, 2)}
    checkpoint.save(tmp_path, 3, model, optimizer, state)
    other, other_optimizer = make(seed=9)
    found, damaged = checkpoint.load(tmp_path, other, other_optimizer)
    assert found == {"step": 3, **state, "pair": [1, 2]} and damaged == []
    assert everything(other, other_optimizer) == everything(model, optimizer)
    assert len(other_optimizer.state) == 7 and all(
        set(s) >= {"exp_avg", "step"} for s in other_optimizer.state.values()
    )
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, 3, seed=2)
    assert everything(other, other_optimizer) == everything(model, optimizer)


def test_a_fresh_optimizer_and_none(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 0, model, optimizer, {})
    other, other_optimizer = make(seed=9)
    assert checkpoint.load(tmp_path, other, other_optimizer) == ({"step": 0}, [])
    assert everything(other, other_optimizer) == everything(model, optimizer)
    assert checkpoint.load(tmp_path, make(seed=8)[0])[0] == {"step": 0}  # to evaluate
    assert checkpoint.load(tmp_path / "nothing", model) == (None, [])


def test_two_are_kept_in_the_order_of_numbers(tmp_path):
    model, optimizer = make()
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    (tmp_path / "step-99-copy").mkdir()
    (tmp_path / "step-99-copy/state.json").write_text("{}")
    (tmp_path / "step-7").mkdir()  # begun by something else: no state, no checkpoint
    assert checkpoint.steps(tmp_path) == [10, 100]
    checkpoint.save(tmp_path, 100, model, optimizer, {"again": True})
    assert checkpoint.steps(tmp_path) == [10, 100]
    assert checkpoint.load(tmp_path, model)[0] == {"step": 100, "again": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-100", "step-7", "step-99-copy"]
    assert sorted(p.name for p in (tmp_path / "step-10").iterdir()) == [*FILES, "state.json"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_write_leaves_the_earlier_ones(three, monkeypatch, call):
    folder, _ = three
    before, calls = files(folder), []
    save_file = checkpoint.save_file

    def full(tensors, path, metadata):
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (4, 3):  # 3: written already
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(folder, step, *make(), {})
        assert files(folder) == before and len(list(folder.iterdir())) == 2


def test_a_full_disk_is_an_os_error(three):
    folder, _ = three
    before = files(folder)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))  # no file above 500 bytes: a real error from the system
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*File too large"):
            checkpoint.save(folder, 4, *make(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert files(folder) == before
    (folder / "file").touch()
    with pytest.raises(OSError):  # no folder can be made there
        checkpoint.save(folder / "file", 4, *make(), {})


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_an_os_error(three):
    folder, _ = three
    folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            checkpoint.save(folder, 4, *make(), {})
    finally:
        folder.chmod(0o700)


KILL = """
import os, sys
from pathlib import Path
import torch
from smaug import checkpoint
stop = lambda *a: os.kill(os.getpid(), 9)
folder, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "half written":
    checkpoint.save_file = lambda tensors, path, metadata: (path.write_bytes(b"half"), stop())
else:
    setattr(checkpoint.os, moment, stop)
model = torch.nn.Linear(2, 2)
checkpoint.save(folder, 4, model, torch.optim.AdamW(model.parameters()), {})
"""


@pytest.mark.parametrize("moment", ["half written", "fsync", "rename"])
def test_a_killed_write_leaves_the_earlier_ones(three, moment):
    folder, held = three
    before = files(folder)
    done = subprocess.run([sys.executable, "-c", KILL, folder, moment], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {k: v for k, v in files(folder).items() if not k.startswith(".")} == before
    assert [p.name for p in folder.glob(".*")] == [".step-4.aside"] and checkpoint.steps(folder) == [2, 3]
    model, optimizer = make(seed=9)
    assert checkpoint.load(folder, model, optimizer)[0]["step"] == 3
    assert everything(model, optimizer) == held[3]
    checkpoint.save(folder, 5, model, optimizer, {})
    assert sorted(p.name for p in folder.iterdir()) == ["step-3", "step-5"]  # what was left is gone


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", ["flip early", "flip late", "truncate", "empty", "gone"])
def test_a_damaged_one_is_passed_over(three, name, damage):
    folder, held = three
    path = folder / "step-3" / name
    size = path.stat().st_size
    if damage.startswith("flip"):
        flip(path, 9 if damage == "flip early" else size - 3)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: size // 2 if damage == "truncate" else 0])
    model, optimizer = make(seed=9)
    state, damaged = checkpoint.load(folder, model, optimizer)
    assert state == {"step": 2, "totals": {"clips": 64.1 * 2}} and everything(model, optimizer) == held[2]
    if (name, damage) == ("state.json", "gone"):
        assert damaged == []  # without it a folder is no checkpoint
    else:
        (sentence,) = damaged
        assert sentence.startswith(f"{folder / 'step-3'} is damaged (") and sentence.endswith("was passed over")


def test_no_flipped_byte_of_the_state_is_believed(three):
    folder, _ = three
    path = folder / "step-3/state.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 16):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            state, damaged = checkpoint.load(folder, make()[0])
            # A blank between two fields may change into another blank; nothing that is said may.
            assert (state["step"] == 2 and len(damaged) == 1) or json.loads(path.read_bytes()) == json.loads(whole), at
    path.write_bytes(b"[1, 2]")
    assert checkpoint.load(folder, make()[0])[0]["step"] == 2


def test_when_all_are_damaged(three):
    folder, _ = three
    for step in (2, 3):
        flip(folder / f"step-{step}/model.safetensors", -1)
    model, optimizer = make(seed=9)
    before = everything(model, optimizer)
    state, damaged = checkpoint.load(folder, model, optimizer)
    assert state is None and ["step-3" in damaged[0], "step-2" in damaged[1]] == [True, True]
    assert everything(model, optimizer) == before


class Bomb:
    def __reduce__(self):
        return os.mkdir, (Bomb.path,)


def test_no_pickle_is_loaded(three, tmp_path, monkeypatch):
    folder, _ = three

    def refuse(*args, **kw):
        raise AssertionError("a pickle was loaded")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint.load(folder, *make())[0]["step"] == 3
    Bomb.path = str(tmp_path / "exploded")
    data = pickle.dumps({"0.weight": Bomb()})
    (folder / "step-3/model.safetensors").write_bytes(data)
    state = json.loads((folder / "step-3/state.json").read_text())
    checksums = state.pop("crc32")  # by someone who knows how
    checksums["model.safetensors"] = zlib.crc32(data)
    del checksums["state.json"]
    checksums["state.json"] = zlib.crc32(json.dumps({**state, "crc32": checksums}).encode())
    state["crc32"] = checksums
    (folder / "step-3/state.json").write_text(json.dumps(state))
    with pytest.raises(Exception, match=r"(?i)header"):
        checkpoint.load(folder, *make())
    assert not (tmp_path / "exploded").exists()
