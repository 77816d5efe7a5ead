"""What a run says that it paid: by the clock, by what the model computes, over kills and resumes; and its own price."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smaug import cost, device, distributed, ledger, loop, ops, train
from smaug.blocks import checkpoint_blocks, compile_blocks
from smaug.ledger import FORWARD, Flops, Ledger, Result, Stopwatch, Turn, count_tokens, read, time_parts
from smaug.micro_batches import backward_in_parts
from smaug.run import open_loader
from smaug.step import Step, training_step
from tests.test_step import made, model_of, with_images

SMALL = [
    "--model.video.width=32", "--model.video.depth=1", "--model.video.heads=2", "--model.text.width=32",
    "--model.text.depth=1", "--model.text.heads=2", "--model.fusion.heads=2", "--model.video.prune.blocks", "0",
    "--data.shapes", "64", "16", "16", "--data.batch=16", "--optim.steps=6", "--log-every=1", "--run-dir=run",
]  # fmt: skip
TURN = Turn(
    began="2026-11-28T21:00:00+00:00", ended="2026-11-28T22:00:00+00:00", from_step=0, to_step=3, machine="here",
    device="cpu", device_name="here", way="plain", dtype="float32", processes=1, command="smaug", smaug="0.1.0",
    seconds={"data": 1.0, "backward": 5.0, "evaluation": 4.0}, wall_seconds=12.0, clips=30, steps=3,
    tokens={"text encoder": {"computed": 5, "dropped": 2}}, flops=6e9, flops_dense=9e9, rate=4e9, peak_bytes=100,
    energy_joules=50.0,
)  # fmt: skip


def rows():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


# --- the file -------------------------------------------------------------------------------------------------------


def test_turns_add_up(tmp_path):
    second = replace(
        TURN, from_step=2, to_step=9, seconds={"backward": 9.0, "optimizer": 3.0}, rate=10e9, peak_bytes=300, began="",
        tokens={"text encoder": {"computed": 1}, "pixel decoder": {"computed": 7}}, machine="there",
    )  # fmt: skip
    result = Result(9, "test", {"t2v_r1": 0.5}, 22.0, 4.0, 24.0, "")
    saved = {"version": 1, "turns": [asdict(TURN), asdict(second)], "results": [asdict(result)]}
    (tmp_path / "ledger.json").write_text(json.dumps(saved))
    found = read(tmp_path)
    assert found == Ledger((TURN, second), (result,))
    total = found.total()
    assert total.seconds == {"data": 1, "backward": 14, "evaluation": 4, "optimizer": 3}
    assert total.training_seconds == 18 and total.wall_seconds == 24 and total.clips == 60 and total.steps == 6
    assert total.tokens == {"text encoder": {"computed": 6, "dropped": 2}, "pixel decoder": {"computed": 7}}
    assert (total.began, total.from_step, total.to_step, total.machine) == (TURN.began, 0, 9, "there")
    assert total.peak_bytes == 300 and total.energy_joules == 100
    assert total.rate == pytest.approx((6 * 4e9 + 12 * 10e9) / 18)  # 6 and 12 seconds at these rates
    assert total.utilisation == pytest.approx(12e9 / (6 * 4e9 + 12 * 10e9))
    unknown = Ledger((TURN, replace(second, rate=None, energy_joules=None)), ()).total()
    assert unknown.rate is None and unknown.utilisation is None and unknown.energy_joules is None


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "has no ledger: there is no"),
        ("", "is damaged: Expecting value"),
        ("[]", "is damaged"),
        ('{"version": 2}', "is damaged: its version is 2, and this smaug reads 1"),
        ('{"version": 1, "turns": [], "results": []}', "is damaged"),
        ('{"version": 1, "turns": [{"began": "now"}], "results": []}', "is damaged: .*missing"),
        (json.dumps({"version": 1, "turns": [asdict(TURN) | {"clips": "many"}], "results": []}), "is damaged"),
    ],
)
def test_what_is_no_ledger(tmp_path, text, said):
    if text is not None:
        (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path)
    assert str(tmp_path / "ledger.json") in str(error.value) and "\n" not in str(error.value)


# --- time -----------------------------------------------------------------------------------------------------------


def test_stopwatch():
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0])
    watch = Stopwatch(torch.device("cpu"), lambda: next(moments))  # 0
    with watch.phase("outer"), watch.phase("inner"):  # 1, 3; and back at 6, 10
        pass
    assert watch.read() == {"rest": 1 + 5, "outer": 2 + 4, "inner": 3}  # 15
    with pytest.raises(KeyError), watch.phase("outer"):  # 21 to 28
        raise KeyError
    assert watch.read() == {"rest": 6 + 8, "outer": 7}  # 36


def test_a_gpu_is_not_waited_for(monkeypatch):
    """With events that a device passes behind the host: there is none here."""
    gpu = SimpleNamespace(recorded=0, passed=0, waited=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            gpu.recorded += 1
            self.number = gpu.recorded

        def query(self):
            return self.number <= gpu.passed

        def synchronize(self):
            gpu.passed, gpu.waited = max(gpu.passed, self.number), gpu.waited + 1

        def elapsed_time(self, other):
            assert self.query() and other.query()
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch, most = Stopwatch(torch.device("cuda")), 0
    for _ in range(1000):
        with watch.phase("step"):
            gpu.passed = max(0, gpu.recorded - 30)
        most = max(most, len(watch.marks))
    assert most <= ledger.MARKS + 2 and gpu.waited == 0  # no growth, however rare the log lines
    early = watch.read(wait=False)
    assert gpu.waited == 0 and early.total() == gpu.passed - 1
    late = watch.read()
    assert gpu.waited == 1 and (early + late).total() == gpu.recorded - 1
    assert (early + late)["step"] == 1000


class Noted(Stopwatch):
    """Knows which phases were entered, and from which."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.entered = []

    def _switch(self, running):
        if len(running) > len(self.running):
            self.entered.append(running[-2:])
        super()._switch(running)


@pytest.mark.parametrize("how", ["recomputed", pytest.param("compiled, recomputed", marks=pytest.mark.slow)])
def test_parts_are_told_apart(shapes_cache, how):
    recipe, loader, tokenizer = made("smaug")
    model, batch = model_of(recipe, tokenizer, "auto"), replace(loader.batch(0), step=1)
    if "compiled" in how:
        compile_blocks(model, "eager")
    checkpoint_blocks(model)
    step, watch = Step(model, recipe), Noted()
    time_parts(model, watch)
    with watch.phase("evaluation"), torch.no_grad():
        step(batch)
    assert watch.entered == [("rest", "evaluation")]
    watch.entered.clear()
    with watch.phase(FORWARD):
        loss, _ = step(batch)
        with watch.phase("backward"):
            loss.backward()
    encoders = ["video encoder", "text encoder"]
    after = ["vtc", "frame selector", "fusion encoder", "vtm", "mlm", "mvm"]
    assert watch.entered == [
        ("rest", FORWARD), *((FORWARD, f"forward: {name}") for name in encoders + after), (FORWARD, "backward")
    ]  # fmt: skip
    assert watch.running == ("rest",) and all(watch.seconds[name] > 0 for _, name in watch.entered)
    watch.entered.clear()
    with watch.phase(FORWARD):
        backward_in_parts(step, batch, 6, going_back=lambda: watch.phase("backward"))  # of 16: three parts
    names = [name.removeprefix("forward: ") for _, name in watch.entered[1:]]
    assert names == [*encoders * 3, *after, "backward", *[*encoders, "backward"] * 3]


# --- tokens and FLOPs -----------------------------------------------------------------------------------------------


def ran(recipe, batch, tokenizer):
    """Rows by stage that a model really computes, and how many patches it rebuilds."""
    model, found = model_of(recipe, tokenizer, "auto"), {"text encoder": [], "video encoder": [], "fusion encoder": []}
    for stage, encoder in (("video encoder", model.video), ("text encoder", model.text)):
        for block in encoder.blocks:
            block.up.register_forward_hook(lambda _, given, out, stage=stage: found[stage].append(len(given[0])))
    if model.fusion is not None:
        see = model.fusion.blocks[0].see

        def noted(words, frames, kv_ids, *rest):
            lengths = frames.cu_seqlens.diff()
            found["fusion encoder"].append(int((lengths[kv_ids.clamp(min=0).long()] * (kv_ids >= 0)).sum()))
            return see(words, frames, kv_ids, *rest)

        model.fusion.blocks[0].see = noted
    if "mvm" in model.heads:
        last = model.heads["mvm"].blocks[-1]
        end, found["pixel decoder"] = last.end, [0]

        def decoded(tokens, count):
            found["pixel decoder"], found["rebuilt"] = [tokens.rows], tokens.num_sequences * count
            return end(tokens, count)

        last.end = decoded
    with torch.no_grad():
        training_step(model, recipe, batch)
    rebuilt = found.pop("rebuilt", 0)
    return {stage: round(sum(rows) / len(rows)) for stage, rows in found.items() if rows}, rebuilt


@pytest.mark.parametrize(
    "name, mixed", [("smaug", False), ("smaug", True), ("mac", True), ("qa", False), ("mc", False)]
)
def test_tokens_are_what_the_model_computes(shapes_cache, name, mixed):
    recipe, loader, tokenizer = made(name)
    batch = replace(loader.batch(0), step=1)
    if mixed and name == "smaug":  # of pairs that meet by chance, then, only those with their own
        objectives = {key: o for key, o in recipe.objectives.items() if key in ("vtc", "mlm")}
        recipe = replace(recipe, objectives=objectives)
    batch = with_images(batch) if mixed else batch
    counted = count_tokens(recipe, batch)
    computed, rebuilt = ran(recipe, batch, tokenizer)
    assert {stage: reasons["computed"] for stage, reasons in counted.items()} == computed
    assert all(n >= 0 for reasons in counted.values() for n in reasons.values())

    whole = replace(batch, contrast=batch.words)
    everything, _ = ran(cost.dense(recipe), whole, tokenizer)
    for stage, rows in everything.items():
        assert rows == sum(n for why, n in counted[stage].items() if why != "padding"), stage
    padded = sum(math.prod(view.to_padded()[0].shape[:2]) for view in views(recipe, whole))
    padding = counted["text encoder"]["padding"]
    assert padding == padded - everything["text encoder"] or name == "mac"
    if name == "smaug" and not mixed:
        assert all(counted["fusion encoder"][why] > 0 for why in ("masked", "pruned", "not selected"))
        visible = counted["pixel decoder"]["computed"] - rebuilt
        assert visible + rebuilt + counted["pixel decoder"]["not decoded"] == 16 * 2 * recipe.model.video.patches
    assert name != "mac" or counted["text encoder"]["dropped"] > 0


def views(recipe, batch):
    return {id(view): view for view in ledger.text_views(recipe, batch).values()}.values()


@pytest.mark.parametrize("name", ["dense", "mac", "mc", "qa", "retrieval", "singularity", "smaug"])
def test_flops_of_a_run_are_those_of_its_batches(shapes_cache, name):
    """Linear in the lengths of texts, asked once for each state of the schedule; and those that torch counts."""
    recipe, loader, tokenizer = made(name)
    ops.register_flops()
    batch = replace(loader.batch(0), step=1)
    with FlopCounterMode(display=False) as counter:
        training_step(model_of(recipe, tokenizer, "auto"), recipe, batch)[0].backward()
    flops = Flops(recipe, tokenizer.get_vocab_size(), world=1)
    own, _ = flops(batch, count_tokens(recipe, batch)["video encoder"])
    assert own == pytest.approx(counter.get_total_flops(), rel=5e-3)  # of dropped words it knows the mean

    recipe = replace(recipe, optim=replace(recipe.optim, steps=24))
    found, vocabulary = torch.zeros(2), tokenizer.get_vocab_size()
    truth, flops = torch.zeros(2), Flops(recipe, vocabulary, world=1)
    for number in range(24):
        batch = loader.batch(number)
        found += torch.tensor(flops(batch, count_tokens(recipe, batch)["video encoder"]))
        more = {"masked": len(batch.masked_labels) / 16} if batch.masked is not None else {}
        if batch.begun is not None:
            spelled = batch.begun.num_sequences
            more |= {"beginnings": spelled / 16, "begun_words": batch.begun.rows / spelled}
        given = cost.Load(16, words=batch.words.rows / 16, options=5, step=number, **more)
        counted = (cost.parts(r, given, vocabulary=vocabulary) for r in (recipe, cost.dense(recipe)))
        truth += torch.tensor([cost.total(works.values()).step_flops for works in counted])
    assert torch.allclose(found, truth, rtol=1e-3) and len(flops.known) <= (name in ("smaug", "mac")) * 3 + 1
    assert found[0] < 0.8 * found[1] if name in ("smaug", "mac") else found[0] == found[1]


# --- machines -------------------------------------------------------------------------------------------------------


def test_energy_by_nvml(monkeypatch):
    """With a stand-in for NVML and for the GPU: there is none here."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    consumed = [5_000]

    class Lost(Exception):
        pass

    def by_uuid(name):
        if name != "GPU-abc":
            raise Lost("no such device")
        return "handle"

    def total(handle):
        if consumed[0] is None:
            raise Lost("GPU is lost")
        return consumed[0]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=by_uuid, NVMLError=Lost,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    joules, how = ledger.energy(gpu)
    consumed[0] = 12_500
    assert joules() == 7.5 and how == "NVML, of the whole GPU"
    consumed[0] = None
    assert math.isnan(joules()) and ledger.energy(gpu)[1] == "NVML: GPU is lost"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    joules, how = ledger.energy(gpu)
    assert math.isnan(joules()) and how.endswith("pip install -c constraints.txt -e '.[energy]'")
    assert math.isnan(ledger.energy(torch.device("cpu"))[0]())


def test_the_rate_is_that_of_the_data_sheet_where_it_is_for_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    way = device.Way(torch.device("cuda"), torch.bfloat16, "auto", "")
    monkeypatch.setattr(device, "matrix_rate", lambda way: 1e12)
    rate_of = ledger.rate_of.__wrapped__  # it asks once in a process
    assert rate_of(way) == (154.8e12, "data sheet, bf16")
    assert rate_of(replace(way, dtype=torch.float32)) == (1e12, "measured, product of 8192 x 8192")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Future")
    assert rate_of(way)[0] == 1e12


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_pays_for_all_its_time(call, monkeypatch):
    taken, waits, trained = [], [], loop.Loop.train

    def trains(self, steps):
        read_, at = self.book.watch.read, []

        def reads(*how):
            found = read_(*how)
            at.append(time.perf_counter())
            waits.append(how == (True,))
            return found

        self.book.watch.read = reads
        finished = trained(self, steps)
        self.book.settle(self.number)
        taken.append((at[-1] - at[0], sum(self.book.turn.seconds.values())))  # from the first batch on
        return finished

    monkeypatch.setattr(loop.Loop, "train", trains)
    code, out, err = call(train.main, "smaug", *SMALL, "--eval-every=3", "--checkpoint-every=2")
    assert code == 0, err
    ((wall, counted),) = taken
    assert counted == pytest.approx(wall, rel=0.01)
    assert waits.count(True) == 2 + 2  # for the two scores on val, and around the one on test

    kept = read(Path("run"))
    (turn,) = kept.turns
    parts = {f"forward: {name}" for name in ("video encoder", "text encoder", "fusion encoder", "vtc", "vtm", "mlm")}
    assert {
        *parts,
        "forward: mvm",
        FORWARD,
        "data",
        "backward",
        "optimizer",
        "checkpoint",
        "evaluation",
        "rest",
    } == set(turn.seconds)
    assert turn.seconds["backward"] > 0.1 * turn.training_seconds and turn.seconds["evaluation"] > 0.1
    assert min(turn.seconds.values()) > 0 and turn.seconds["backward"] > turn.seconds["optimizer"]
    assert turn.wall_seconds > sum(turn.seconds.values()) > wall
    assert (turn.from_step, turn.to_step, turn.steps, turn.clips, turn.processes) == (0, 6, 6, 96, 1)
    assert 1e6 < turn.flops < turn.flops_dense and 0 < turn.utilisation < 1 and turn.peak_bytes > 1e8
    assert turn.rate_is == "measured, product of 1024 x 1024" and "CPU" in turn.energy_is

    assert [(r.step, r.split) for r in kept.results] == [(3, "val"), (6, "val"), (6, "test")]
    spent = [r.device_seconds for r in kept.results]
    assert spent == sorted(spent) and spent[-1] == pytest.approx(sum(turn.seconds.values()))
    assert kept.results[-1].evaluation_seconds == turn.seconds["evaluation"]
    result, last = json.loads(Path("run/result.json").read_text()), rows()[-2]
    assert kept.results[-1].scores["t2v_r1"] == result["t2v_r1"] and kept.results[-1].split == result["split"]
    assert [r.clips for r in kept.results] == [48, 96, 96] and kept.results[-1].flops == turn.flops
    assert kept.results[0].evaluation_seconds > 0  # its own
    assert kept.results[1].scores["t2v_r1"] == rows()[-1]["val_t2v_r1"]
    assert ledger.encoded(turn.tokens) == (last["tokens_computed"], last["tokens_dense"])
    assert 0 < last["device_seconds"] < turn.training_seconds and last["data_seconds"] <= turn.seconds["data"]

    said = out[out.index("device-hours") :].splitlines()
    assert re.search(r"device-hours of training and 0.\d+ of evaluation \(\d+.\d minutes in all\) on", out)
    assert re.search(r"data \d+%, forward \d+%, backward \d+%, optimizer \d+%, checkpoint \d+%, rest \d+%", said[1])
    assert re.search(r"video encoder 0.0\d+ M \(\d+% masked, \d+% pruned\), text encoder", said[2])
    assert "FLOPs" in said[3] and "of the device's rate" in said[3] and len(said) <= 5


def test_what_a_kill_makes_to_be_done_again_is_paid_twice(call, monkeypatch):
    """Killed at step 5 with a checkpoint of step 4; then it stops at 5, and goes on with a damaged ledger, and none."""
    line = (*SMALL, "--checkpoint-every=4", "--run-dir=run")
    judge = loop.Loop._judge_skipped

    def killed(self, row):
        judge(self, row)
        if self.number == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_judge_skipped", killed)
        assert call(train.main, "mac", *line)[0] == 130
    first = read(Path("run")).turns
    assert [(turn.from_step, turn.to_step, turn.clips) for turn in first] == [(0, 5, 80)]
    code, _, err = call(train.main, *line, "--resume", "--max-steps=5")
    assert code == 0, err
    kept = read(Path("run"))
    assert kept.turns[0] == first[0] and [(t.from_step, t.to_step, t.clips) for t in kept.turns] == [
        (0, 5, 80),
        (4, 5, 16),
    ]
    total = kept.total()
    assert total.clips == 96 and rows()[-1]["clips"] == 80  # paid, and on the way
    assert kept.results[-1].device_seconds == pytest.approx(sum(total.seconds.values()))
    assert total.training_seconds > rows()[-1]["device_seconds"]

    saved = Path("run/ledger.json").read_bytes()
    Path("run/ledger.json").write_bytes(saved[:-20])
    code, _, err = call(train.main, *line, "--resume")
    assert code == 0 and "run/ledger.json is damaged" in err and err.count("\n") == 1, err
    assert Path("run/ledger.json.damaged").read_bytes() == saved[:-20]
    old, new = read(Path("run")).turns
    assert (old.to_step, old.clips, new.from_step, new.to_step) == (5, 80, 5, 6) and "was damaged" in old.way
    assert (
        old.seconds["rest"]
        == json.loads(Path("run/checkpoints/step-5/state.json").read_text())["totals"]["device_seconds"]
    )
    assert read(Path("run")).results[-1].flops is None  # of the first turn nobody knows them
    Path("run/ledger.json").unlink()
    code, out, err = call(train.main, *line, "--resume")  # nothing is left to be trained
    assert code == 0 and "before there were ledgers" in read(Path("run")).turns[0].way, err
    assert "device-hours of training" in out


def test_of_no_steps_there_are_no_shares(call):
    code, out, err = call(train.main, "mac", *SMALL, "--max-steps=0")
    assert code == 0, err
    said = out[out.index("device-hours of training") :]
    assert said.count("\n") == 1 and "%" not in said and read(Path("run")).total().utilisation is None


def test_a_full_disk_is_told_in_a_line(call):
    Path("run").mkdir()
    Path("run/.ledger.json.aside").symlink_to("/dev/full")
    code, _, err = call(train.main, "mac", *SMALL)
    assert code == 1 and "No space left on device" in err and "run/ledger.json" in err and err.count("\n") == 1
    assert not Path("run/ledger.json").exists()


def test_processes_are_summed(shapes_cache, tmp_path, monkeypatch):
    """As if another had counted twice what this one has, and has then left."""
    recipe, loader, tokenizer = made("mac")
    step, way = Step(model_of(recipe, tokenizer), recipe), device.choose(False, "cpu")
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "total", lambda x: 3 * x)
    book = ledger.Book(
        tmp_path, step, way, at=4, began=time.perf_counter(), command="", fast=False, past=Ledger((), ())
    )
    moment = book.watch.now()
    book.watch.now = lambda: moment
    batch = loader.batch(0)
    book.count(batch)
    with book.watch.phase("optimizer"):
        moment += 1
    turn = book.settle(5)
    own = count_tokens(recipe, batch)["video encoder"]["computed"]
    assert turn.clips == 48 and turn.tokens["video encoder"]["computed"] == 3 * own and turn.steps == 1
    before = turn.seconds["optimizer"]
    assert before == pytest.approx(3)
    with book.watch.phase("optimizer"):
        moment += 1
    after = book.settle(5, together=False)
    assert after.seconds["optimizer"] - before == pytest.approx(1) and after.clips == 48
    assert read(tmp_path).turns == (after,)


def test_no_mark_is_made_within_what_is_recorded(shapes_cache, tmp_path):
    """As a CUDA graph: the methods of the model stay as they are, and the whole step is one phase."""
    recipe, _, tokenizer = made("mac")
    step = Step(model_of(recipe, tokenizer), recipe)
    how = {"at": 0, "began": 0.0, "command": "", "fast": True, "past": Ledger((), ())}
    for graphs in (True, False):
        ledger.Book(tmp_path, step, device.choose(False, "cpu"), graphs=graphs, **how)
        assert ("forward" in vars(step.model.video)) != graphs and ("scores" in vars(step.model.heads["vtc"])) != graphs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--no-shard", "--shard"])
def test_two_processes_write_one_ledger(shapes_cache, tmp_path, how):
    line = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "smaug.train", "smaug", *SMALL)
    done = subprocess.run([sys.executable, *line, how], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (turn,) = read(tmp_path / "run").turns
    assert turn.processes == 2 and turn.clips == 96 and turn.steps == 6
    assert turn.seconds["forward: video encoder"] > 0 and turn.seconds["backward"] > 0
    training, wall = turn.training_seconds, turn.wall_seconds
    assert 0 < training + turn.seconds["evaluation"] < 2 * wall


def test_it_costs_less_than_a_percent_of_a_step(shapes_cache, tmp_path):
    """Counting, the marks and the file, which is written at every tenth step, of mac at tiny with its
    batch of 64, whose steps are the cheapest. The least of several times, since other work makes either longer."""
    recipe, loader, tokenizer = made("mac")
    recipe = replace(recipe, data=replace(recipe.data, batch=64))
    step, way = Step(model_of(recipe, tokenizer, "auto"), recipe), device.choose(False, "cpu")
    past = Ledger((TURN,) * 3, (Result(9, "val", {"t2v_r1": 0.5}, 22.0, 4.0, 24.0, ""),) * 10)
    book = ledger.Book(tmp_path, step, way, at=0, began=0.0, command="", fast=False, past=past)
    batch = open_loader(recipe, loader.clips, tokenizer).batch(0)
    marks = len(ledger.parts(step.model)) + 5  # data, forward, backward, optimizer, checkpoint

    def least(run, times):
        run()
        found = []
        for _ in range(times):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
        return min(found)

    def keeps():
        for _ in range(10):
            book.count(batch)
            for _ in range(marks):
                with book.watch.phase("rest"):
                    pass
        book.settle(10)

    assert least(keeps, 20) < 0.01 * 10 * least(lambda: step(batch)[0].backward(), 5)
