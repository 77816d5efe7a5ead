import json
import os

import pytest

from smaug.report.page import page
from smaug.report.runs import read, read_runs, short_names


def test_a_run_with_its_ledger(write_run):
    run = read(write_run("a", turns=2), "a")
    assert [(p.step, p.score, p.clips) for p in run.curve] == [(20, 0.1, 2560), (40, 0.2, 5120), (60, 0.4, 7680)]
    assert [p.hours for p in run.curve] == pytest.approx([0.01, 0.02, 0.03])  # evaluations are taken off
    assert [p.flops for p in run.curve] == pytest.approx([2e12, 4e12, 6e12])
    assert run.end and (run.end.score, run.end.hours) == (0.4, pytest.approx(3 * 36 / 3600))
    assert run.phases() == pytest.approx({"data": 10.8, "forward": 43.2, "backward": 54, "evaluation": 15})
    assert run.utilisation() == (pytest.approx(6e12 / 108e12), "1e+12 FLOP/s (measured, product of 1024)")
    assert run.finished and run.state == "finished at step 60" and run.notes == []
    assert run.tokens_kept() == pytest.approx(39 / 109)
    assert str(run.on) == "shapes" and run.on.score == "R@1" and run.machine.startswith("AMD EPYC, 1 threads")


def test_what_was_done_again_is_paid_for(write_run):
    folder = write_run("a", turns=2)
    book = json.loads((folder / "ledger.json").read_text())
    book["turns"][1]["from_step"] = 20  # the first turn was killed at 30, its last checkpoint was at 20
    (folder / "ledger.json").write_text(json.dumps(book))
    run = read(folder, "a")
    assert "10 steps were done again after a kill, and are paid for twice" in run.notes


def test_scores_stand_in_the_order_of_time(write_run):
    """Killed behind step 40, it was evaluated there again. A result of before that has no clips, nor FLOPs."""
    folder = write_run("a")
    book = json.loads((folder / "ledger.json").read_text())
    first, second, third = book["results"]
    book["results"] = [first, third | {"step": 40}, second | {"step": 40, "device_seconds": 150.0}]
    del book["results"][2]["clips"], book["results"][2]["flops"]
    (folder / "ledger.json").write_text(json.dumps(book))
    run = read(folder, "a")
    assert [(p.step, p.score, p.clips) for p in run.curve] == [(20, 0.1, 2560), (40, 0.4, 7680), (40, 0.2, None)]
    assert run.curve[2].flops is None and run.curve[2].hours == pytest.approx(140 / 3600)


def test_a_run_that_began_before_there_were_ledgers(write_run):
    folder = write_run("a", turns=2)
    book = json.loads((folder / "ledger.json").read_text())
    why = "not recorded: the run began before there were ledgers"
    book["turns"][0] |= dict.fromkeys(("machine", "way", "command", "energy_is"), why)
    book["turns"][0] |= {"device": "", "device_name": "", "dtype": "", "smaug": "", "rate": None, "began": ""}
    (folder / "ledger.json").write_text(json.dumps(book))
    run = read(folder, "a")
    assert run.notes == ["of its first 30 steps the hours are known, but not their phases, tokens and FLOPs"]
    assert run.machine.startswith("AMD EPYC") and run.of_turns("dtype") == "bfloat16" and len(run.turns) == 1
    assert run.hours == pytest.approx(0.03) and "not recorded" not in page([run], [])


def test_scores_from_before_a_ledger_was_damaged_are_kept(write_run):
    folder = write_run("a")
    book = json.loads((folder / "ledger.json").read_text())
    book["results"] = [one for one in book["results"] if one["step"] > 20]
    (folder / "ledger.json").write_text(json.dumps(book))
    [run] = read_runs([folder])
    assert [(point.step, point.score) for point in run.curve] == [(20, 0.1), (40, 0.2), (60, 0.4)]
    assert run.curve[0].hours is None and run.curve[1].hours > 0


def test_without_a_ledger_costs_are_not_known(write_run):
    for damaged in (False, True):
        folder = write_run(f"a{damaged}", ledger=False)
        if damaged:
            (folder / "ledger.json").write_text("{")
        run = read(folder, "a")
        assert [(p.score, p.hours) for p in run.curve] == [(0.1, None), (0.2, None), (0.4, None)]
        assert run.ledger is None and run.hours is None and run.phases() == {} and run.tokens_kept() is None
        assert ("ledger.json" in run.notes[0]) and len(run.notes) == 1
        assert ("damaged" in run.notes[0]) == damaged


def test_a_run_that_goes_on_or_was_killed(write_run):
    folder = write_run("a", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 80, "los')  # a kill in the middle of a line
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    run = read(folder, "a")
    assert not run.finished and run.end is None and len(run.curve) == 3
    assert run.state.startswith("not finished: at step 60 of 600, last written ") and " h ago" in run.state
    assert "1 line of its metrics.jsonl cannot be read and are left out" in run.notes

    (folder / "result.json").write_text(json.dumps({"step": 40, "t2v_r1": 0.2}))  # of a turn before
    assert "after a result at step 40" in read(folder, "a").state
    (folder / "metrics.jsonl").unlink()
    (folder / "ledger.json").unlink()
    (folder / "result.json").unlink()
    run = read(folder, "a")
    assert "before its first log line" in run.state and run.hours is None


def test_what_a_reader_must_know(write_run, recipes):
    data = recipes["smaug"]["data"] | {"manifest": ["/a/train.csv"], "eval_manifest": ["/a/msrvtt_test.csv"]}
    run = read(write_run("a", changes={"data": data | {"format": "msrvtt"}}, init="/runs/before"), "a")
    assert run.on.name == "MSR-VTT" and str(run.on) == "MSR-VTT (msrvtt_test.csv)"
    assert run.on.files == ("msrvtt_test.csv",)  # wherever they are
    assert any("began from /runs/before" in note for note in run.notes)
    assert page([run], []).count("not counting the run that a began from") == 3  # title, heading, below the chart
    assert any("val and test are the same files" in note for note in run.notes)
    run = read(write_run("b", changes={"data": data | {"eval_manifest": []}}), "b")
    assert "it was evaluated on pairs that it was trained on" in run.notes
    folder = write_run("c", turns=2)
    book = json.loads((folder / "ledger.json").read_text())
    book["turns"][1]["device_name"] = "NVIDIA RTX A6000"
    (folder / "ledger.json").write_text(json.dumps(book))
    (folder / "skipped.txt").write_text("a.mp4: damaged\nb.mp4: damaged\n")
    run = read(folder, "c")
    assert "its hours are of several devices, added as they are: AMD EPYC, NVIDIA RTX A6000" in run.notes
    assert run.skipped == 2


def test_questions_are_scored_by_accuracy(write_run):
    folder = write_run("a", ledger=False, changes={"task": "qa"})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("val_t2v_r1", "val_acc"))
    run = read(folder, "a")
    assert [p.score for p in run.curve] == [0.1, 0.2, 0.4]
    assert (run.on.score, str(run.on)) == ("accuracy", "shapes, open questions")


def test_a_wrong_path_is_told_with_what_is_near(write_run, tmp_path):
    folder, result = write_run("smaug-1"), tmp_path / "result alone"
    result.mkdir()
    (result / "result.json").write_text("{}")
    for wrong, said in {
        folder.parent / "smaug-l": f"is not there; did you mean {folder}",
        folder.parent: f"holds no run but 1 folders that do: name them, as {folder.parent}/*",
        tmp_path / "x" / "y": f"there is no folder {tmp_path / 'x'} either",
        folder / "config.json": "is a file, and a run is a folder",
        tmp_path: "holds no run: there is no",
        result: f"holds no run: there is no {result / 'config.json'}",
    }.items():
        with pytest.raises(ValueError) as error:
            read(wrong, "a")
        assert said in str(error.value) and "\n" not in str(error.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read(folder, "a")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is damaged: it holds no object"):
        read(folder, "a")


def test_names_are_short_and_differ(write_run, tmp_path):
    a, b = write_run("x/a"), write_run("y/a")
    assert short_names([a]) == ["a"] and short_names([a, b]) == ["x/a", "y/a"]
    assert [run.name for run in read_runs([a, b, b.parent / "." / "a"])] == ["x/a", "y/a"]
