"""The benchmarks' own parts: providers compute the same, lengths are what they say, pictures are drawn."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from smaug import device
from smaug.recipe import load, names
from smaug.run import build
from smaug.step import training_step
from smaug.testing import relative_error

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import attention_on_cpu, bench_engine, bench_train_step, parts, plots, timed_train
from benchmarks.attention_rivals import HEADS, PROVIDERS, WIDTH, Unavailable, lengths_of

del sys.path[0]  # or transformers would take our folder `kernels` for its own package


def test_lengths():
    assert lengths_of("equal", 0.1, 3) == [21] * 3
    spread, tail = lengths_of("spread", 0.4, 2000), lengths_of("longtail", 0.4, 2000)
    assert sum(spread) / 2000 == pytest.approx(79, abs=2) and min(spread) >= 15 and max(spread) <= 143
    assert sum(tail) / 2000 == pytest.approx(79, abs=4) and min(tail) == 1 and max(tail) == 4 * 79
    assert lengths_of("spread", 0.4, 16) == spread[:16]  # the same for everybody


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in ("eager_compiled", "flex")])
def test_providers_agree(provider):
    """Compiled ones are checked where they are timed: compiling takes half a minute."""
    lengths = [3, 1, 5]
    q, k, v = (torch.randn(9, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    if provider in ("torch_varlen", "flash_attn", "xformers") and not torch.cuda.is_available():
        with pytest.raises(Unavailable, match=r"is not installed|takes 16-bit CUDA tensors"):
            PROVIDERS[provider](q, k, v, lengths)
        return
    got, want = (PROVIDERS[name](q, k, v, lengths)() for name in (provider, "looped_sdpa"))
    assert relative_error(got.detach(), want.detach()) < 1e-5
    grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-5


def test_table_of_the_race():
    point = {"dtype": "bf16", "pass": "step", "distribution": "equal", "keep": "0.4", "batch": "16"}
    rows = [
        point | {"smaug": "1", "padded_sdpa": "2", "looped_sdpa": "3", "nested_sdpa": "9", "flex": "", "eager": "0.5"},
        point | {"smaug": "2", "padded_sdpa": "9", "looped_sdpa": "1", "nested_sdpa": "9", "flex": "", "eager": "9"},
    ]
    last = attention_on_cpu.table(rows).splitlines()[-1]
    assert last.startswith("| forward and backward, bf16 | 2 | 1.00x | 0.50x (equal, 40%, 16) | 0.50x |")


def test_pictures(tmp_path, capsys):
    def row(provider, seconds):
        name = f"test_attention[{provider}]"
        info = {"shape": "4 sequences", "dtype": "bfloat16", "machine": "here"}
        stats = {"median": seconds, "min": seconds / 2}
        return {
            "name": name, "fullname": f"benchmarks/bench_attention.py::{name}", "stats": stats, "extra_info": info,
            "params": {"provider": provider, "passed": "step"},
        }  # fmt: skip

    saved = {"datetime": "2026-11-25T10:00:00", "benchmarks": [row("smaug", 0.01), row("flex", 0.2)]}
    (tmp_path / "times.json").write_text(json.dumps(saved))
    plots.main(tmp_path / "times.json", tmp_path / "out")
    assert (tmp_path / "out/bench_attention-attention-step.png").stat().st_size > 5000
    (tmp_path / "empty.json").write_text("[]")
    for bad in ("empty.json", "not there.json"):
        with pytest.raises(SystemExit, match=f"{bad} is no file that"):
            plots.main(tmp_path / bad, tmp_path)


@pytest.mark.parametrize("name", [*names(), "qa decoder"])
def test_a_batch_of_noise_for_every_recipe(name):
    recipe = load(name.split()[0])
    if "decoder" in name:
        recipe = replace(recipe, objectives={"answer": replace(recipe.objectives["answer"], by="decoder")})
    batch = bench_train_step.batch_of(recipe, 3, torch.device("cpu"))
    loss, each = training_step(build(recipe, bench_train_step.VOCABULARY, "auto"), recipe, batch)
    assert len(batch) == 3 and loss.isfinite() and all(part > 0 for part in each.values())
    assert (batch.options is not None and batch.options.num_sequences == 15) == (name == "mc")
    assert (batch.begun is not None) == ("decoder" in name)
    assert (batch.answers >= 0).all()  # each is in the list


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        return self.linear(x)


def test_parts(monkeypatch):
    """Of a linear layer, and a product outside of it."""
    monkeypatch.setattr(parts, "PARTS", {"toy": (Toy, "forward")})
    toy, x, y = Toy(), torch.randn(4, 16, requires_grad=True), torch.randn(8, 2)
    optimizer = torch.optim.AdamW(toy.parameters(), fused=True)

    def step():
        (toy(x) @ y).sum().backward()
        optimizer.step()

    whole, forward = parts.flops(step)
    inside, outside = 2 * 4 * 16 * 8, 2 * 4 * 8 * 2
    assert forward == {"toy": inside} and whole == 3 * inside + 2 * outside  # y needs no gradient
    found = parts.times(step, 1, torch.device("cpu"))
    want = {("forward", "toy"), ("forward", "rest"), ("backward", "toy"), ("backward", "rest"), ("optimizer", "rest")}
    assert set(found) == want and all(time > 0 for time in found.values())


def test_a_step_in_numbers(monkeypatch, call):
    monkeypatch.setattr(device, "matrix_rate", lambda way, now: 2e9)
    more = ("--model.video.depth", 1, "--json", "-")
    code, out, _ = call(bench_train_step.main, "--recipe", "mac", "--pairs", 2, "--seconds", 0.01, *more)
    found = json.loads(out)
    assert code == 0
    assert found["clips_per_second"] == pytest.approx(2 / found["seconds"])
    assert found["utilisation"] == pytest.approx(found["flops"] / found["seconds"] / 2e9)
    assert found["tokens_kept"] < 0.6 and found["launches"] > 100 and found["peak_bytes"] > 1e5
    assert list(found["phases"]) == ["copying", "forward", "backward", "clipping", "optimizer", "rest"]
    assert all(found["phases"].values())
    for phase, within in found["parts"].items():
        assert set(within) == {"video encoder", "text encoder", "vtc", "rest"}
        assert sum(within.values()) == pytest.approx(found["phases"][phase])
    # Weights and what AdamW keeps: two moments, and a number for each of its tensors.
    assert found["resident_bytes"] == pytest.approx(12 * found["parameters"], rel=1e-3)


@pytest.mark.parametrize(
    "line, said",
    [
        (("--recipe", "smog"), "there is no recipe 'smog'; did you mean 'smaug'?"),
        (("--pairs", 0), "--pairs must be at least 1"),
        (("--json", "no/such/folder.json"), "there is no folder no/such"),
    ],
)
def test_a_step_that_cannot_be(call, line, said):
    code, _, err = call(bench_train_step.main, *line)
    assert code == 1 and said in err


@pytest.mark.slow
def test_what_is_computed_twice_is_no_work(call):
    """FLOPs and launches are those of the plain step, memory is that of the step that is measured."""
    made = []
    for more in ((), ("--micro-batch", 4, "--checkpoint-blocks")):
        line = ("--recipe", "mac", "--pairs", 32, "--seconds", 0.01, "--json", "-")
        code, out, _ = call(bench_train_step.main, *line, *more)
        made.append(json.loads(out))
        assert code == 0
    plain, small = made
    assert small["flops"] == plain["flops"] and small["launches"] == plain["launches"]
    assert small["peak_bytes"] < 0.8 * plain["peak_bytes"]
    assert small["parts"]["forward"]["video encoder"] > 0 and small["phases"]["backward"] > 0


def test_the_trainer_with_a_clock(call, tmp_path):
    """Every third step is followed by a checkpoint, which the next one's times have."""
    few = ("--data.shapes", 64, 16, 16, "--data.batch", 8, "--max-steps", 7, "--checkpoint-every", 3)
    line = ("mac", "--fast", "--device", "cpu", "--run-dir", tmp_path / "run", *few)
    assert call(timed_train.main, tmp_path / "times.json", *line)[0] == 0
    steps = json.loads((tmp_path / "times.json").read_text())["steps"]
    assert len(steps) == 7 and [i for i, step in enumerate(steps) if "saving" in step] == [3, 6]
    for step in steps:
        assert {"forward", "backward", "clipping", "optimizer", "waiting", "ledger", "rest"} == set(step) - {"saving"}
        assert all(seconds >= 0 for seconds in step.values()) and step["backward"] > 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1  # the loop is the trainer's own


def test_the_engine_in_a_table():
    """Of the newest call alone, and of runs of one round."""

    def rows(began, number, **ms):
        each = {"one": dict(forward=30, backward=60, clipping=1, optimizer=5, waiting=1, saving=0, ledger=0.5)}
        each["one"]["rest"] = ms["one"] - 97.5
        each["two"] = each["one"] | {"backward": ms["two"] - 40}
        each["saving"] = each["one"] | {"saving": 2, "rest": ms["saving"] - 99.5}
        for way, phases in each.items():
            steps = [{phase: value / 1e3 for phase, value in phases.items() if value}] * 10
            options = bench_engine.Options(pairs=4, recipes=("mac",))
            yield {
                key: str(value)
                for key, value in bench_engine.row(options, began, number, "mac", way, "", steps).items()
            }

    every = [
        *rows("Monday", 0, one=100, two=500, saving=900),
        *rows("Tuesday", 0, one=100, two=110, saving=103),
        *rows("Tuesday", 1, one=102, two=102, saving=104),
        *rows("Tuesday", 2, one=98, two=100, saving=102),
    ]
    found = bench_engine.table(every)
    cells = dict(zip(found.columns[0]._cells, zip(*(c._cells for c in found.columns[2:]), strict=True), strict=True))
    assert cells["two processes / one"] == ("0.98x", "0.91x to 1.00x", "3")
    assert cells["step outside what computes"] == ("4.0%", "2.0% to 5.9%", "3")
    assert cells["of it waiting for data"] == ("1.0%", "1.0% to 1.0%", "3")
    assert cells["of it the ledger"] == ("0.50%", "0.49% to 0.51%", "3")
    assert cells["ms that a checkpoint costs in all"] == ("3", "2 to 4", "3")  # each step has a share of a save
    assert cells["ms that stand still for a checkpoint"] == ("2", "2 to 2", "3")


@pytest.mark.slow
def test_the_engine_is_measured(call, tmp_path):
    few = ("--rounds", 1, "--steps", 2, "--warm-up", 1, "--save-every", 1, "--pairs", 8, "--shapes", 64, 16, 16)
    code, out, _ = call(bench_engine.main, "--recipes", "mac", *few, "--results", tmp_path / "engine.csv")
    assert code == 0 and "two processes / one" in out
    made = {r["way"]: (r["steps"], r["saves"]) for r in bench_engine.read(tmp_path / "engine.csv")}
    assert made == {"one": ("2", "0"), "two": ("2", "0"), "saving": ("2", "2")}


@pytest.mark.parametrize(
    "line, said",
    [
        (("--recipes", "mak"), "did you mean 'mac'?"),
        (("--rounds", 0), "must be at least 1"),
        (("--report", "--results", "no.csv"), "there is no no.csv"),
    ],
)
def test_an_engine_that_cannot_be(call, line, said):
    code, _, err = call(bench_engine.main, *line)
    assert code == 1 and said in err
