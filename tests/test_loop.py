"""What the loop does beside stepping: it reads nothing, leaves out what is not finite, makes do with less memory."""

import json
import re
from pathlib import Path

import pytest
import torch

from smaug import checkpoint, loop, train
from smaug import step as steps
from smaug.evaluate import __main__ as evaluate
from smaug.testing import HostReads

TINY = [
    "--data.shapes", "64", "16", "16", "--data.batch=16", "--optim.steps=8", "--log-every=1", "--run-dir=run",
    "--model.video.width=32", "--model.video.heads=2", "--model.text.width=32", "--model.text.heads=2",
    "--model.fusion.heads=2",
]  # fmt: skip


def rows(run="run"):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def losses(run="run"):
    return [row["loss"] for row in rows(run) if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(shapes_cache, tmp_path_factory):
    """The losses of a run of 8 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        patch.setattr("sys.argv", ["smaug", "smaug", *TINY])
        assert train.main() == 0
        return losses()


def test_between_log_lines_the_host_reads_nothing(call, monkeypatch):
    reads, between, read, trained = HostReads(), [], loop.Loop._read, loop.Loop.train

    def logs(self, *given):
        between.append(list(reads.found))
        row = read(self, *given)
        reads.found.clear()
        return row

    def trains(self, count):
        with reads:
            return trained(self, count)

    monkeypatch.setattr(loop.Loop, "_read", logs)
    monkeypatch.setattr(loop.Loop, "train", trains)
    code, _, err = call(train.main, "smaug", *TINY, "--log-every=4", "--fast", "--optim.clip=1", "--optim.ema=0.9")
    assert code == 0, err
    assert between == [[], []] and len(reads.launched) > 1000
    with reads:
        assert torch.ones(1).item() == 1 and reads.found  # so it would have seen one


def poisoned(monkeypatch, at):
    step = steps.training_step

    def training_step(model, recipe, batch):
        loss, parts = step(model, recipe, batch)
        return (loss * float("nan") if batch.step in at else loss), parts

    monkeypatch.setattr(steps, "training_step", training_step)


def test_a_step_that_is_not_finite_is_left_out_and_counted(call, monkeypatch, undisturbed):
    poisoned(monkeypatch, {0, 3, 4})
    code, out, err = call(train.main, "smaug", *TINY, "--optim.clip=10", "--max-nonfinite=3")
    assert code == 0, err
    assert [row["nonfinite_steps"] for row in rows()] == [1, 1, 1, 2, 3, 3, 3, 3]
    found = losses()
    assert [step for step, loss in enumerate(found) if loss is None] == [0, 3, 4]
    # The first step left the weights as they were, so the second batch meets them as the first did.
    assert found[1] != undisturbed[1]
    assert "step 5: 3 steps so far were left out, since their gradients were not finite" in out


def test_too_many_in_a_row_end_the_run_and_are_named(call, monkeypatch):
    poisoned(monkeypatch, {4, 5, 6, 7})
    code, _, err = call(train.main, "smaug", *TINY, "--max-nonfinite=3", "--checkpoint-every=2", "--log-every=4")
    assert code == 1 and err.count("\n") == 1
    assert "the gradients of 4 steps in a row, up to step 8, were not finite; run/nonfinite.json names" in err
    named = json.loads(Path("run/nonfinite.json").read_text())
    assert list(named) == ["5", "6", "7", "8"]
    assert all(len(names) == 16 and names[0].endswith(".webm") for names in named.values())
    monkeypatch.undo()


def test_limits_that_make_no_sense_are_refused_before_anything_is_written(call):
    for wrong in ("--max-nonfinite=0", "--log-every=0", "--keep=0", "--eval-every=-1", "--timeout=0"):
        code, _, err = call(train.main, "smaug", *TINY, wrong)
        assert code == 1 and wrong.split("=")[0] in err and not Path("run").exists(), err


@pytest.mark.slow
def test_out_of_memory_halves_what_is_encoded_at_once(call, monkeypatch, undisturbed):
    step = steps.training_step

    def training_step(model, recipe, batch):
        loss, parts = step(model, recipe, batch)
        if batch.step == 3:
            loss.register_hook(full)
        return loss, parts

    def full(grad):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr(steps, "training_step", training_step)
    code, out, err = call(train.main, "smaug", *TINY)
    assert code == 0, err
    assert out.count("out of memory with 16 pairs at once; going on with 8 (--micro-batch 8)") == 1
    assert losses() == pytest.approx(undisturbed, rel=1e-5)
    code, out, err = call(train.main, "smaug", *TINY, "--micro-batch=5", "--run-dir=other")
    assert losses("other") == pytest.approx(undisturbed, rel=1e-5)


def test_what_does_not_fit_in_any_part_ends_the_run(call, monkeypatch):
    def training_step(model, recipe, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(steps, "training_step", training_step)
    monkeypatch.setattr(loop, "backward_in_parts", lambda step, batch, *how: training_step(step, None, batch))
    code, out, err = call(train.main, "smaug", *TINY)
    assert code == 1 and re.search("out of memory with 1 pairs at once in a process: CUDA out of memory", err)
    assert [line.split()[4] for line in out.splitlines() if line.startswith("out of")] == ["16", "8", "4", "2"]


def test_the_best_is_kept_and_all_of_it_is_resumed_bit_for_bit(call, monkeypatch):
    """With averaged weights, clipping and a step that was left out."""
    poisoned(monkeypatch, {1})
    flags = [*TINY, "--optim.ema=0.8", "--optim.clip=0.5", "--eval-every=2", "--keep=1"]
    code, _, err = call(train.main, "smaug", *flags)
    assert code == 0, err
    scores = {row["step"]: row["val_t2v_r1"] for row in rows() if "val_t2v_r1" in row}
    assert list(scores) == [2, 4, 6, 8]
    best = max(scores, key=lambda step: (scores[step], step))
    assert checkpoint.steps(Path("run/checkpoints")) == sorted({best, 8})
    code, _, err = call(evaluate.main, "run", "--step=best", "--split=val", "--no-controls", "--json=best.json")
    assert code == 0 and json.loads(Path("best.json").read_text())["t2v_r1"] == scores[best], err

    for steps_taken in ("--max-steps=3", "--max-steps=8"):
        code, _, err = call(train.main, "smaug", *flags, "--run-dir=again", "--requeue", steps_taken)
        assert code == 0, err
    for name in ("model", "optim", "ema"):
        first, second = (
            Path(run, "checkpoints/step-8", f"{name}.safetensors").read_bytes() for run in ("run", "again")
        )
        assert first == second, name
    assert rows("again")[-2]["nonfinite_steps"] == 1 and losses("again") == losses()
