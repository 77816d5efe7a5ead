import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import headline

del sys.path[0]  # or transformers would take our folder `kernels` for its own package


def test_the_headline_of_the_readme_is_what_the_runs_say(write_run, tmp_path, monkeypatch, capsys):
    """100 s to 40 % against 300, and a baseline of the same time that never gets there."""
    write_run("smaug", scores=(0.1, 0.2, 0.5), pace=37.5)
    write_run("dense", scores=(0.1, 0.2, 0.6), pace=120.0, recipe="dense")
    write_run("dense-two-moments", scores=(0.1, 0.2, 0.6), pace=60.0, recipe="dense")
    write_run("dense-same-time", scores=(0.1, 0.2, 0.3), pace=40.0, recipe="dense")
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- headline -->\nold\n<!-- end of the headline -->\nbelow")
    (tmp_path / "docs").mkdir()
    asked = ["headline", "--report", "--folder", str(tmp_path / "runs"), "--readme", str(page)]
    monkeypatch.setattr(sys, "argv", asked)
    assert headline.main() == 0
    said = page.read_text()
    assert said.startswith("above\n<!-- headline -->\n") and said.endswith("\nbelow") and "\nold\n" not in said
    rows = {line.split("`")[1]: line for line in said.splitlines() if line.startswith("| `")}
    assert "| 100 s | **3.0x** | 50.0% | 50.0% | 0.031 |" in rows["smaug"]  # two thirds of the way from 20 to 50 %
    assert "| 300 s |  | 60.0% |" in rows["dense"] and "| never |  | 30.0% |" in rows["dense-same-time"]
    assert "AMD EPYC, 1 threads, 24 GiB; torch 2.13.0, 2026-11-28, one seed" in said
    assert "**Predicted, not measured**: `smaug` at base" in said
    assert (tmp_path / "docs/headline.png").stat().st_size > 10_000

    write_run("still-running", finished=False)
    (tmp_path / "runs/dense").rename(tmp_path / "runs/was-dense")
    (tmp_path / "runs/still-running").rename(tmp_path / "runs/dense")
    assert headline.main() == 1 and "not finished" in capsys.readouterr().err
    page.write_text("no place for it")
    assert headline.main() == 1 and "needs one <!-- headline -->" in capsys.readouterr().err


def test_the_dense_run_of_the_same_time_has_as_many_steps_as_fit(write_run, tmp_path, monkeypatch):
    """The sparse step takes 1.875 s, the dense one 6 s: 600 steps against 188, evaluated as often."""
    for name, pace in (("smaug", 37.5), ("dense", 120.0), ("dense-two-moments", 60.0)):
        write_run(name, pace=pace)
    lines = []
    monkeypatch.setattr(headline.subprocess, "run", lambda line, check: lines.append(line))
    with pytest.raises(ValueError, match="dense-same-time was stopped"):  # since here nothing is trained
        headline.train(headline.Options(folder=tmp_path / "runs"), headline.Console(quiet=True))
    [line] = lines  # the others are finished
    assert line[line.index("--optim.steps") + 1] == "188" and line[line.index("--eval-every") + 1] == "19"
    assert line[line.index("--run-dir") + 1] == str(tmp_path / "runs/dense-same-time") and "--requeue" in line
