"""A checkpoint that has its name is whole, comes back bit for bit, and a damaged one is passed over aloud."""

import errno
import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


def killed_at(moment, folder):
    """In a process of its own, forked: saves step 4 and is killed by itself, in the thread that writes."""
    signal.alarm(60)
    stop = lambda *args, **kw: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    rename, rmtree = os.rename, checkpoint.shutil.rmtree
    patches = {
        "half written": (checkpoint, "save_file", lambda tensors, path, metadata: (path.write_bytes(b"half"), stop())),
        "read back": (checkpoint, "_crc32", stop),
        "state": (checkpoint, "_state_crc32", stop),
        "fsync": (os, "fsync", stop),
        "rename": (os, "rename", stop),
        "renamed": (os, "rename", lambda old, new: (rename(old, new), stop())),
        "removing": (checkpoint.shutil, "rmtree", lambda path: (rmtree(path / "model.safetensors", True), stop())),
    }
    setattr(*patches[moment])
    model, optimizer = make()
    keeper = checkpoint.Keeper(folder)
    keeper.save(4, model, optimizer, {})
    keeper.wait()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["half written", "read back", "state", "fsync", "rename", "renamed", "removing"])
def test_a_killed_write_leaves_the_earlier_ones(three, moment):
    folder, held = three
    before = files(folder)
    if not (child := os.fork()):
        try:
            killed_at(moment, folder)
        finally:
            os._exit(1)  # never back into pytest
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    named = {k: v for k, v in files(folder).items() if not k.startswith(".")}
    done = moment in ("renamed", "removing")
    if moment == "removing":
        assert checkpoint.steps(folder) == [3, 4] and list(folder.glob(".*")) == [folder / ".step-2.old.aside"]
    elif moment == "renamed":
        assert checkpoint.steps(folder) == [2, 3, 4] and before.items() < named.items()
    else:
        assert named == before and [p.name for p in folder.glob(".*")] == [".step-4.aside"]
    model, optimizer = make(seed=9)
    state, damaged = checkpoint.load(folder, model, optimizer)
    assert state["step"] == (4 if done else 3) and damaged == []
    assert everything(model, optimizer) == (everything(*make()) if done else held[3])
    checkpoint.save(folder, 5, model, optimizer, {})
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{4 if done else 3}", "step-5"]  # what was left is gone


class Gate:
    """save_file that tells when it begins, and waits until it may go on."""

    def __init__(self, monkeypatch):
        self.begun, self.open, save_file = threading.Semaphore(0), threading.Semaphore(0), checkpoint.save_file

        def gated(tensors, path, metadata):
            self.begun.release()
            assert self.open.acquire(timeout=30)
            save_file(tensors, path, metadata)

        monkeypatch.setattr(checkpoint, "save_file", gated)


def test_training_goes_on_while_a_thread_writes(tmp_path, monkeypatch):
    model, optimizer = make()
    train(model, optimizer, 1)
    gate, keeper, totals = Gate(monkeypatch), checkpoint.Keeper(tmp_path), {"clips": 1}
    keeper.save(1, model, optimizer, {"totals": totals})
    held = everything(model, optimizer)
    assert gate.begun.acquire(timeout=30) and checkpoint.steps(tmp_path) == []
    train(model, optimizer, 1)
    totals["clips"] = 2
    keeper.check()
    second = threading.Thread(target=keeper.save, args=(2, model, optimizer, {}))
    second.start()
    assert not gate.begun.acquire(timeout=0.05)  # never two at once
    gate.open.release(4)
    second.join(30)
    keeper.wait()
    assert checkpoint.steps(tmp_path) == [1, 2]
    other, other_optimizer = make(seed=9)
    state, _ = checkpoint.load(tmp_path, other, other_optimizer, which=1)
    assert state == {"step": 1, "totals": {"clips": 1}} and everything(other, other_optimizer) == held
    checkpoint.load(tmp_path, other, other_optimizer)
    assert everything(other, other_optimizer) == everything(model, optimizer)


def test_the_copies_use_the_same_memory_again(tmp_path):
    model, optimizer = make()
    keeper, rooms = checkpoint.Keeper(tmp_path), []
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        keeper.save(step, model, optimizer, {}, ema=dict(model.named_parameters()) if step < 3 else None)
        keeper.wait()
        rooms.append({(p, k): t.data_ptr() for p, pieces in keeper.host.items() for k, (t, _) in pieces.items()})
    assert rooms[0] == rooms[1] and len(rooms[0]) == 8 + 7 * 3 + 7
    assert rooms[2] == {key: at for key, at in rooms[0].items() if key[0] != "ema"}
    assert not (tmp_path / "step-3/ema.safetensors").exists()
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert own.isdisjoint(rooms[0].values())


@pytest.mark.parametrize("hear", ["check", "wait", "save"])
def test_the_loop_hears_of_a_failed_write_once(three, monkeypatch, hear):
    folder, _ = three
    before, keeper, (model, optimizer) = files(folder), checkpoint.Keeper(folder), make()
    save_file = checkpoint.save_file
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (_ for _ in ()).throw(full))
    keeper.save(4, model, optimizer, {})
    keeper.thread.join(30)
    with pytest.raises(
        OSError, match=r"^step 4 could not be saved, earlier checkpoints are whole: .*No space left"
    ) as told:
        keeper.save(5, model, optimizer, {}) if hear == "save" else getattr(keeper, hear)()
    assert told.value.__cause__ is full and "\n" not in str(told.value) and files(folder) == before
    keeper.wait()
    keeper.check()
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    keeper.save(6, model, optimizer, {})
    keeper.wait()
    assert checkpoint.steps(folder) == [3, 6]


def test_an_error_of_ours_is_not_lost(tmp_path, monkeypatch):
    keeper = checkpoint.Keeper(tmp_path)
    monkeypatch.setattr(checkpoint, "_finish", lambda *args: 1 / 0)
    keeper.save(4, *make(), {})
    with pytest.raises(ZeroDivisionError):
        keeper.wait()
    with pytest.raises(ValueError, match="at least one"):
        checkpoint.Keeper(tmp_path, keep=0)


def test_the_best_is_kept(tmp_path):
    model, optimizer = make()
    for step, score in enumerate([0.1, 0.5, None, 0.5, float("nan"), 0.2, 0.3, float("inf")], 1):
        checkpoint.save(tmp_path, step, model, optimizer, {}, score=score, keep=3)  # each from another Keeper: resumed
    assert checkpoint.steps(tmp_path) == [4, 6, 7, 8] and checkpoint.best(tmp_path) == [4, 7, 6]
    assert checkpoint.load(tmp_path, model, which="best") == ({"step": 4, "score": 0.5}, [])
    assert checkpoint.load(tmp_path, model, which="newest") == ({"step": 8}, [])
    assert checkpoint.load(tmp_path, model, which=6) == ({"step": 6, "score": 0.2}, [])
    assert checkpoint.load(tmp_path, model, which=5) == (None, [])
    flip(tmp_path / "step-4/model.safetensors", -1)
    state, [sentence] = checkpoint.load(tmp_path, model, which="best")
    assert state["step"] == 7 and "step-4 is damaged" in sentence
    state, [sentence] = checkpoint.load(tmp_path, model, which=4)
    assert state is None and "step-4 is damaged" in sentence
    checkpoint.save(tmp_path, 9, model, optimizer, {}, score=1, keep=1)
    assert checkpoint.steps(tmp_path) == [9]
    checkpoint.save(tmp_path, 10, model, optimizer, {}, keep=1)
    assert checkpoint.steps(tmp_path) == [9, 10] and checkpoint.best(tmp_path) == [9]


def test_averaged_weights(tmp_path):
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    plain = everything(model, optimizer)
    ema = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    filled = {name: torch.zeros_like(p) for name, p in ema.items()}
    checkpoint.load(tmp_path, model, ema=filled)  # of before there were any: begin with the model's
    assert all(torch.equal(filled[name], p) for name, p in model.named_parameters())
    train(model, optimizer, 1)
    checkpoint.save(tmp_path, 2, model, optimizer, {}, ema=ema)
    other, other_optimizer = make(seed=9)
    checkpoint.load(tmp_path, other, other_optimizer, filled)
    assert everything(other, other_optimizer) == everything(model, optimizer)
    assert filled.keys() == ema.keys() and all(torch.equal(filled[name], ema[name]) for name in ema)
    checkpoint.load(tmp_path, other, ema=other.state_dict())  # to evaluate
    weights, step, damaged = checkpoint.load_weights(tmp_path)
    assert (step, damaged) == (2, []) and weights.keys() == model.state_dict().keys()
    for found in (other.state_dict(), weights):
        assert all(torch.equal(found[name], ema[name]) for name in ema) and found["seen"].tolist() == [1, 1, 1]
    data = (tmp_path / "step-2/ema.safetensors").read_bytes()
    assert checkpoint.fingerprint(tmp_path, 2) == hashlib.sha256(data).hexdigest()[:16]
    assert checkpoint.weights_crc32(tmp_path, 2) == zlib.crc32(data)
    with pytest.raises(ValueError, match="does not fit the averaged weights: it lacks teacher"):
        checkpoint.load(tmp_path, other, ema={"teacher": torch.zeros(1)})
    flip(tmp_path / "step-2/ema.safetensors", -1)
    assert checkpoint.load(tmp_path, other)[0]["step"] == 2  # not asked for, not read
    weights, step, [sentence] = checkpoint.load_weights(tmp_path)
    assert step == 1 and sentence.endswith("step-2 is damaged (checksum of ema.safetensors) and was passed over")
    assert {k: (v.dtype, v.tolist()) for k, v in weights.items()} == {k: plain[k] for k in weights}


def test_the_optimiser_is_not_read_for_the_model_alone(three):
    folder, _ = three
    flip(folder / "step-3/optim.safetensors", -1)
    assert checkpoint.load(folder, make()[0])[0]["step"] == 3
    assert checkpoint.load(folder, *make())[0]["step"] == 2


def test_one_that_does_not_fit(three):
    folder, _ = three
    model, optimizer = make()
    model.more, model[0].weight = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(8, 7))
    before = everything(model, optimizer)
    with pytest.raises(
        ValueError, match=r"step-3 does not fit the model: it lacks more, its 0.weight is \(8, 6\), not \(8, 7\)"
    ):
        checkpoint.load(folder, model)
    assert everything(model, optimizer) == before


def test_checkpoints_of_before_shards_are_read(three):
    folder, held = three
    path = folder / "step-3/state.json"
    state = json.loads(path.read_text())
    checksums = state.pop("crc32")
    checksums["state.json"] = zlib.crc32(json.dumps(state).encode())
    path.write_text(json.dumps({**state, "crc32": checksums}))
    model, optimizer = make(seed=9)
    assert checkpoint.load(folder, model, optimizer)[0]["step"] == 3 and everything(model, optimizer) == held[3]


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


# Models in parts. Each process runs `in_parts`; `python tests/test_checkpoint.py` is one of them.


def make_parts(seed=0):
    """LayerNorm and the last layer have fewer rows than four processes can share evenly; one number is in no part."""
    from torch.distributed.fsdp import fully_shard

    model, _ = make(seed)
    return fully_shard(model, ignored_params={model.scale}), adamw(model, OptimConfig())


def gathered(model, optimizer):
    """What `everything` gives, of a model in parts."""
    whole = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()  # noqa: E731
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": whole(v) for p, s in optimizer.state.items() for k, v in s.items()}
    return {k: whole(v) for k, v in model.state_dict().items()} | moments


def halves(model):
    return {name: p.detach() * 0.5 for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def in_parts(folder, group):
    """Goes on from step 3 to 4 in any number of processes, from a model in parts or whole, and tells what it has."""
    model, optimizer = make_parts(seed=9)
    ema = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state, damaged = checkpoint.load(folder, model, optimizer, ema, group=group)
    assert (state, damaged) == ({"step": 3, "note": "é", "score": 0.5}, [])
    assert all(torch.equal(gather(ema[name]), gather(half)) for name, half in halves(model).items())
    loaded = {f"3 {name}": tensor for name, tensor in gathered(model, optimizer).items()}
    train(model, optimizer, 1, seed=4)
    return loaded | {f"4 {name}": tensor for name, tensor in gathered(model, optimizer).items()}


def gather(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_and_break(folder, group):
    """Two processes: the steps 1 to 3 of a model in parts, each file damaged, and a disk that is full for one."""
    rank = dist.get_rank()
    model, optimizer = make_parts()
    keeper = checkpoint.Keeper(folder, group=group)
    held = {}
    for step in (1, 2, 3):
        train(model, optimizer, 1, seed=step)
        held[step] = gathered(model, optimizer)
        keeper.save(step, model, optimizer, {"note": "é"}, halves(model), score=0.5 if step == 3 else None)
        train(*make(), 1)  # the loop does not wait
    keeper.wait()
    assert checkpoint.steps(folder) == [2, 3]
    shards = [f"shard-0000{n}-of-00002.safetensors" for n in (1, 2)]
    named = [f"{part}/{shard}" for part in ("ema", "model", "optim") for shard in shards] + ["state.json"]
    assert sorted(str(p.relative_to(folder / "step-3")) for p in (folder / "step-3").glob("**/*.*")) == named

    for name, damage in [(name, damage) for name in named for damage in ("flip", "gone")]:
        path = folder / "step-3" / name
        data = path.read_bytes()
        dist.barrier()
        if rank == 0:
            flip(path, len(data) - 3) if damage == "flip" else path.unlink()
        dist.barrier()
        other, other_optimizer = make_parts(seed=9)
        ema = halves(other)
        state, damaged = checkpoint.load(folder, other, other_optimizer, ema, group=group)
        assert state["step"] == 2 and same(gathered(other, other_optimizer), held[2]), (name, damage)
        assert all(torch.equal(gather(ema[k]), held[2][k] * 0.5) for k in ema)
        assert len(damaged) == ((name, damage) != ("state.json", "gone")), (name, damage)
        assert len({str(d) for d in checkpoint._gather(group, damaged)}) == 1
        dist.barrier()
        if rank == 0:
            path.write_bytes(data)
    dist.barrier()

    save_file, before = checkpoint.save_file, files(folder)
    dist.barrier()
    if rank == 1:
        checkpoint.save_file = lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    keeper.save(4, model, optimizer, {})
    with pytest.raises(OSError, match=r"step 4 could not be saved.*No space left"):
        keeper.wait()
    dist.barrier()
    assert files(folder) == before
    checkpoint.save_file = save_file
    return in_parts(folder, group)


def only_the_first_writes(folder, group):
    """Two processes with the same whole model, as under DDP."""
    model, optimizer = make()
    train(model, optimizer, 3)
    keeper = checkpoint.Keeper(folder, group=group)
    if dist.get_rank():
        checkpoint.save_file = None
    keeper.save(3, model, optimizer, {"note": "é"}, halves(model), score=0.5)
    assert (keeper.thread is None) == (dist.get_rank() == 1)
    keeper.wait()
    dist.barrier()
    other, other_optimizer = make(seed=9)
    state, _ = checkpoint.load(folder, other, other_optimizer, group=group)
    assert state["step"] == 3 and everything(other, other_optimizer) == everything(model, optimizer)
    return in_parts(folder, group)


def processes(count, what, folder):
    """Runs one of the functions above in some processes -> what the first has in the end."""
    command = [sys.executable, __file__, what, str(folder), str(count)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(count)]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * count, "\n".join(said)
    (folder / f"store-{count}").unlink(missing_ok=True)
    return load_file(folder / f"{what}-{count}.safetensors")


@pytest.mark.slow
def test_parts_are_read_by_another_number_of_processes_and_by_one_without_any(tmp_path):
    (tmp_path / "two").mkdir()
    two, four = processes(2, "write_and_break", tmp_path / "two"), processes(4, "in_parts", tmp_path / "two")
    other, other_optimizer = make(seed=9)  # whole, in this process, which has no group
    ema = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    assert checkpoint.load(tmp_path / "two", other, other_optimizer, ema)[0]["step"] == 3
    assert all(torch.equal(ema[name], p * 0.5) for name, p in other.named_parameters())
    model, optimizer = make()  # as if it had never been in parts
    for step in (1, 2, 3):
        train(model, optimizer, 1, seed=step)
    for name, tensor in gathered(other, other_optimizer).items():
        assert tensor.equal(two[f"3 {name}"]) and tensor.equal(four[f"3 {name}"])
        torch.testing.assert_close(tensor, gathered(model, optimizer)[name], rtol=1e-5, atol=1e-6)
    train(other, other_optimizer, 1, seed=4)
    for name, tensor in gathered(other, other_optimizer).items():  # the same but for the order of sums
        for goes_on in (two, four):
            torch.testing.assert_close(goes_on[f"4 {name}"], tensor, rtol=1e-5, atol=1e-6)
    weights, step, _ = checkpoint.load_weights(tmp_path / "two")
    assert step == 3 and all(torch.equal(weights[name], ema[name]) for name in ema)
    assert len(checkpoint.fingerprint(tmp_path / "two", 3)) == 16 and checkpoint.weights_crc32(tmp_path / "two", 3)


@pytest.mark.slow
def test_a_whole_one_is_read_into_parts(tmp_path):
    (tmp_path / "whole").mkdir()
    held = processes(2, "only_the_first_writes", tmp_path / "whole")
    model, optimizer = make()
    train(model, optimizer, 3)
    assert all(tensor.equal(held[f"3 {name}"]) for name, tensor in gathered(model, optimizer).items())
    train(model, optimizer, 1, seed=4)
    for name, tensor in gathered(model, optimizer).items():
        torch.testing.assert_close(held[f"4 {name}"], tensor, rtol=1e-5, atol=1e-6)


def test_one_part_is_what_torch_would_write(tmp_path, monkeypatch):
    """In this process: a group of one. No pickle is read, the files are those of HuggingFaceStorageWriter."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as dcp_save

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer = make_parts()
        train(model, optimizer, 2)
        keeper = checkpoint.Keeper(tmp_path, group=dist.group.WORLD)
        keeper.save(2, model, optimizer, {})
        keeper.wait()
        dcp_save(
            model.state_dict(), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
        )
        [ours], [theirs] = (sorted((tmp_path / name).iterdir()) for name in ("step-2/model", "theirs"))
        with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
            info = [json.loads(one.metadata().pop("DCP_SHARDING_INFO")) for one in (a, b)]
            assert info[0] == info[1] and a.metadata().keys() == b.metadata().keys()
            assert set(a.keys()) == set(b.keys()) and all(a.get_tensor(k).equal(b.get_tensor(k)) for k in a.keys())  # noqa: SIM118

        def refuse(*args, **kw):
            raise AssertionError("a pickle was loaded")

        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, refuse)
        other, other_optimizer = make_parts(seed=9)
        assert checkpoint.load(tmp_path, other, other_optimizer) == ({"step": 2}, [])
        assert same(gathered(other, other_optimizer), gathered(model, optimizer))
        whole, whole_optimizer = make(seed=9)
        checkpoint.load(tmp_path, whole, whole_optimizer)
        assert same(gathered(whole, whole_optimizer), gathered(model, optimizer))
    finally:
        dist.destroy_process_group()


def main(what, folder, count, rank):
    folder, count, rank = Path(folder), int(count), int(rank)
    store = dist.FileStore(str(folder / f"store-{count}"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    held = globals()[what](folder, dist.new_group(backend="gloo"))
    if rank == 0:
        save_file(held, folder / f"{what}-{count}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
