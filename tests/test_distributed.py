"""Several processes compute what one does: losses, gradients, weights; and a run goes on with fewer of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smaug import train
from smaug.objectives.vtc import _InParts, same_pairs
from smaug.recipe import load
from smaug.run import with_pools
from smaug.testing import relative_error
from tests import several_processes
from tests.test_step import cancelled

ROOT = Path(__file__).parents[1]


def torchrun(processes, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def compare(processes, name, ways, folder):
    torchrun(processes, ROOT / "tests/several_processes.py", folder, name, *ways)
    recipe, loader, tokenizer = several_processes.setting(name)
    truth = several_processes.steps(recipe, loader, tokenizer, "")
    for how in ways:
        assert json.loads((folder / f"{how}.json").read_text()) == pytest.approx(truth[0], rel=1e-5), how
        gradients = load_file(folder / f"{how} gradients.safetensors")
        assert gradients.keys() == truth[1].keys()
        for key, expected in truth[1].items():
            if key not in cancelled(recipe):
                assert relative_error(gradients[key], expected) < 1e-5, (how, key)
        for what, expected in (("weights", truth[2]), ("means", truth[3])):
            found = load_file(folder / f"{how} {what}.safetensors")
            # AdamW makes as much of a gradient that is nothing but rounding as of any other: look at matrices.
            for key in (k for k, x in expected.items() if x.ndim > 1):
                assert relative_error(found[key], expected[key]) < 1e-4, (how, what, key)


def test_two_processes_do_what_one_does(shapes_cache, tmp_path):
    """DDP and FSDP2, so each equals the other, too. Their shares are unequal: in masked words, for one."""
    compare(2, "smaug", ["ddp", "fsdp"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("smaug", 4), ("mac", 2), ("dense", 4), ("qa", 2), ("mc", 2)])
def test_several_processes_do_what_one_does(name, processes, shapes_cache, tmp_path):
    ways = {"smaug": ["ddp parts", "fsdp parts"], "mac": ["fsdp parts compiled recomputed"]}
    compare(processes, name, ["ddp", "fsdp", *ways.get(name, [])], tmp_path)


@pytest.mark.parametrize("part", [1, 4, 7, 100])
def test_the_contrast_in_parts_is_the_contrast(part):
    """Against the formula over the whole matrix, with its gradients; keys repeat, so rows have several positives."""
    generator = torch.Generator().manual_seed(0)
    every = torch.randint(0, 8, (12, 2), generator=generator)
    keys = every[3:8]
    vectors = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 5, 12, 12)]
    leaves = [x.div(x.norm(dim=1, keepdim=True)).requires_grad_() for x in vectors]
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    text, video, texts, videos = leaves
    same = same_pairs(keys, every)
    assert same.sum(1).max() > 1
    truth = sum(
        -((x @ y.T * scale).log_softmax(1) * same / same.sum(1, keepdim=True)).sum()
        for x, y in ((text, videos), (video, texts))
    ) / (2 * 5)
    loss = _InParts.apply(*leaves, scale, keys, every, part)
    torch.testing.assert_close(loss, truth.view(()))
    for got, want in zip(
        torch.autograd.grad(2 * loss, [*leaves, scale]), torch.autograd.grad(2 * truth, [*leaves, scale]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_negatives_are_drawn_among_the_same_pairs_for_ever():
    recipe = load("smaug")
    assert with_pools(recipe, 128, 1, begins=True) == recipe
    begun = with_pools(recipe, 32, 4, begins=True)
    assert begun.objectives["vtm"].among == 32
    for processes in (4, 2, 1):  # it goes on with fewer
        assert with_pools(begun, 128 // processes, processes, begins=False) == begun
    with pytest.raises(ValueError, match="among 32 pairs, and each of 8 processes has 16"):
        with_pools(begun, 16, 8, begins=False)
    with pytest.raises(
        ValueError, match=r"among 128 pairs, and each of 2 .* begin a run with --objectives.vtm.among 64"
    ):
        with_pools(recipe, 64, 2, begins=False)  # begun by one process
    assert with_pools(load("mac"), 64, 2, begins=True) == load("mac")


RUN = [
    "-m", "smaug.train", "smaug", "--data.shapes", "64", "16", "16", "--data.batch", "16", "--optim.steps", "9",
    "--log-every", "1", "--model.video.width=32", "--model.video.heads=2", "--model.text.width=32",
    "--model.text.heads=2", "--model.fusion.heads=2", "--objectives.vtm.among", "4",
]  # fmt: skip


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_a_run_goes_on_with_fewer_processes_and_then_with_one(shard, shapes_cache, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *RUN, "--run-dir", alone], env=env, check=True, capture_output=True)
    torchrun(4, *RUN, "--run-dir", run, *shard, "--max-steps", "3")
    torchrun(2, *RUN, "--run-dir", run, *shard, "--requeue", "--max-steps", "6")
    subprocess.run([sys.executable, *RUN, "--run-dir", run, "--requeue"], env=env, check=True, capture_output=True)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5) and len(losses(run)) == 9
    result, undisturbed = (json.loads((r / "result.json").read_text()) for r in (run, alone))
    assert result["clips"] == undisturbed["clips"] and result["tokens_computed"] == undisturbed["tokens_computed"]


def test_processes_that_do_not_see_the_same_are_refused(call, monkeypatch, tmp_path):
    """As on machines that each have a folder of their own: they would wait for each other, or mix up what is whose."""
    told = train.distributed.collect
    for wrong, error in ((bool, "holds a run for some processes and none for others"), (list, "process 1 has others")):

        def collect(value, wrong=wrong):
            return [value, not value if wrong is bool else [1, 2]] if isinstance(value, wrong) else told(value)

        monkeypatch.setattr(train.distributed, "collect", collect)
        code, _, err = call(train.main, *RUN[2:], "--run-dir", tmp_path / "run")
        assert code == 1 and err.count("\n") == 1 and error in err, err
    with pytest.raises(ValueError, match=r"tokenizer\.json of the first process is not to be seen"):
        train._tokenizer(tmp_path / "another", None, None, first=False)
