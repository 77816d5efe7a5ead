import json
from pathlib import Path

import pytest

from smaug import recipe

STEPS = (20, 40, 60)


@pytest.fixture(scope="session")
def recipes():
    return {name: recipe.to_json(recipe.load(name)) for name in ("smaug", "dense")}


@pytest.fixture
def write_run(tmp_path, recipes):
    def write(
        name: str, scores=(0.1, 0.2, 0.4), *, recipe="smaug", pace=36.0, ledger=True, finished=True, turns=1,
        machine="AMD EPYC, 1 threads, 24 GiB; torch 2.13.0", changes=None, **config,
    ) -> Path:  # fmt: skip
        """A run of 60 steps with scores at 20, 40 and 60; `pace`: device-seconds of training for each 20 steps."""
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        made = recipes[recipe] | (changes or {})
        (folder / "config.json").write_text(json.dumps({
            "init": None, "size": "tiny", "fast": True, "command": f"python -m smaug.train {recipe} --fast",
            "machine": machine, "processes": 1, "samples": [6000, 1], "smaug": "0.1.0", "recipe": made, **config,
        }))  # fmt: skip
        rows, results = [], []
        for number, (step, score) in enumerate(zip(STEPS, scores, strict=True), 1):
            sums = {"clips": 128.0 * step, "tokens_computed": 30.0 * step, "tokens_dense": 100.0 * step}
            seconds = {"device_seconds": 0.9 * pace * number, "data_seconds": 0.1 * pace * number}
            rows += [{"step": step, "loss": 9.0 - number, "vtc": 1.0, "lr": 1e-3, "grad_norm": 2.0, **sums, **seconds}]
            results += [{
                "step": step, "split": "val", "scores": {"t2v_r1": score}, "device_seconds": (pace + 5) * number,
                "evaluation_seconds": 5.0 * number, "wall_seconds": 1.0, "date": "2026-11-28",
                "clips": 128 * step, "flops": 1e11 * step,
            }]  # fmt: skip
            rows += [{"step": step, "val_t2v_r1": score}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            done = {
                "t2v_r1": scores[-1],
                "candidates": 500.0,
                "evaluated_on": "shapes test",
                "split": "test",
                "step": 60,
            }
            done |= {"protocol": "500 texts", "skipped": 0, "recipe": recipe, "size": "tiny", "machine": machine}
            (folder / "result.json").write_text(json.dumps(done | {k: v for k, v in rows[-2].items() if k in SUMS}))
        share = 1 / turns
        turn = {
            "began": "2026-11-28T21:00:00+00:00", "ended": "2026-11-28T21:05:00+00:00", "machine": machine,
            "device": "cpu", "device_name": machine.split(",")[0], "way": "--fast: bf16", "dtype": "bfloat16",
            "processes": 1, "command": f"python -m smaug.train {recipe} --fast", "smaug": "0.1.0",
            "seconds": {"data": 0.3 * pace * share, "forward: video encoder": 0.6 * pace * share,
                        "forward: vtc": 0.6 * pace * share, "backward": 1.5 * pace * share, "evaluation": 15 * share},
            "wall_seconds": 200.0, "clips": round(7680 * share), "steps": round(60 * share),
            "tokens": {"video encoder": {"computed": 30, "masked": 50, "pruned": 20}, "text encoder": {"computed": 9}},
            "flops": 6e12 * share, "flops_dense": 12e12 * share, "rate": 1e12, "rate_is": "measured, product of 1024",
            "peak_bytes": 2**30, "energy_joules": None, "energy_is": "no NVML here",
        }  # fmt: skip
        book = [turn | {"from_step": i * 60 // turns, "to_step": (i + 1) * 60 // turns} for i in range(turns)]
        if ledger:
            (folder / "ledger.json").write_text(json.dumps({"version": 1, "turns": book, "results": results}))
        return folder

    return write


SUMS = {"clips", "tokens_computed", "tokens_dense", "device_seconds", "data_seconds"}
