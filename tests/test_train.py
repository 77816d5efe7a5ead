"""The two commands as they are typed: a whole run, stopping and going on, one's own data, and what goes wrong.

Most tests call `main` here, with a patched command line, since starting Python and torch takes seconds; only what kills
a process has one of its own.
"""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from smaug import cost, device, train
from smaug import step as steps
from smaug.data.manifest import Skip
from smaug.evaluate import __main__ as evaluate
from smaug.recipe import load

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
# A small model of every default's shape: these runs test the loop, not the learning.
SMALL = [
    "--model.video.width=32", "--model.video.depth=1", "--model.video.heads=2", "--model.video.frames=4",
    "--model.video.tubelet=2", "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--data.batch=16", "--log-every=1",
]  # fmt: skip
SHAPES = [*SMALL, "--data.shapes", "64", "16", "16", "--optim.steps", "12"]
TIMES = ("device_seconds", "data_seconds", "wall_seconds", "clips_per_second")


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(run, step):
    return (run / f"checkpoints/step-{step}/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(shapes_cache, tmp_path_factory):
    """A run of 12 steps that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smaug", "mac", "--size", "tiny", *SHAPES, "--run-dir", str(run)])
        assert train.main() == 0
    return run


def test_a_run_leaves_what_explains_it(undisturbed):
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["recipe"]["type"] == "Recipe" and config["recipe"]["optim"]["steps"] == 12
    assert config["size"] == "tiny" and config["fast"] is False
    assert config["command"].startswith("python -m smaug.train mac --size tiny --model.video.width=32")
    assert json.loads((undisturbed / "tokenizer.json").read_text())["model"]["vocab"]["[CLS]"] == 2
    assert sorted(p.name for p in (undisturbed / "checkpoints/step-12").iterdir()) == [
        "model.safetensors", "optim.safetensors", "state.json"
    ]  # fmt: skip
    assert list((undisturbed / "tensorboard").glob("events.out.tfevents.*"))

    logged = rows(undisturbed)
    assert [row["step"] for row in logged] == list(range(1, 13))
    last = logged[-1]
    assert last["clips"] == 12 * 16
    assert 0 < last["tokens_computed"] < 0.6 * last["tokens_dense"]
    assert all(row["loss"] == row["vtc"] > 0 and row["lr"] > 0 for row in logged)

    result = json.loads((undisturbed / "result.json").read_text())
    assert result["candidates"] == 16 and result["evaluated_on"] == "shapes test" and result["skipped"] == 0
    for key in ("t2v", "v2t"):
        assert 0 <= result[f"{key}_r1"] <= result[f"{key}_r5"] <= result[f"{key}_r10"] <= 1
        assert 1 <= result[f"{key}_medr"] <= 16
    assert result["tokens_computed"] == last["tokens_computed"] and result["step"] == 12
    assert 0 < result["device_seconds"] <= result["wall_seconds"]
    assert {"t2v_r1_shuffled", "t2v_r1_new_combinations", "machine", "recipe"} <= set(result)


def test_tensorboard_has_the_losses(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    found = {e.step: e.value for e in events.Scalars("loss")}
    assert found == pytest.approx({row["step"]: row["loss"] for row in rows(undisturbed)})


def test_evaluate_gives_the_numbers_again(undisturbed, call):
    result = json.loads((undisturbed / "result.json").read_text())
    code, out, _ = call(evaluate.main, undisturbed, "--json", "again.json")
    again = json.loads(Path("again.json").read_text())
    assert code == 0 and "retrieval on shapes test" in out
    for key in again:
        assert again[key] == result[key], key
    assert {"t2v_r1", "v2t_medr", "t2v_r1_shuffled", "frames", "step"} <= set(again)

    _, out, _ = call(evaluate.main, undisturbed, "--shuffle-frames", "--json", "mixed.json")
    mixed = json.loads(Path("mixed.json").read_text())
    assert mixed["t2v_r1"] == mixed["t2v_r1_shuffled"] == result["t2v_r1_shuffled"]
    assert mixed["v2t_r1"] == result["v2t_r1_shuffled"] and "frames shuffled" in out
    for frames in (1, 2, 8):
        code, out, _ = call(evaluate.main, undisturbed, "--frames", frames, "--split", "val", "--json", "other.json")
        assert code == 0 and f"retrieval on shapes val, 16 candidates, {frames} frames" in out
        assert json.loads(Path("other.json").read_text())["frames"] == frames


def test_evaluate_on_another_data_set(undisturbed, call, shapes_cache):
    """The annotation file of MSR-VTT 1k-A with clips of ours under its names."""
    ours = sorted(shapes_cache.rglob("*.webm"))[:5]
    Path("videos").mkdir()
    names = [f"video{7000 + i}" for i in range(6)]
    for name, clip in zip(names, ours, strict=False):
        Path(f"videos/{name}.webm").symlink_to(clip)
    rows = [f"ret{i},msr{name[5:]},{name},a person is doing thing {i}" for i, name in enumerate(names)]
    Path("JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]))
    other = ("--format", "msrvtt", "--manifest", "JSFUSION_test.csv", "--root", "videos")
    code, _, err = call(evaluate.main, undisturbed, *other)
    assert code == 1 and "1 of 6 files cannot be used" in err  # one of six is missing
    code, out, _ = call(evaluate.main, undisturbed, *other, "--max-bad", 0.2, "--no-controls", "--json", "zero.json")
    result = json.loads(Path("zero.json").read_text())
    assert code == 0 and "5 candidates" in out and "zero-shot" in out
    assert (result["zero_shot"], result["trained_on"], result["split"]) == (True, "shapes train", "test")
    assert len(result["evaluation_skipped"]) == 1 and "1 of the set are missing" in result["protocol"]
    weights_file = undisturbed / "checkpoints" / f"step-{result['step']}" / "model.safetensors"
    assert result["checkpoint"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()[:16]
    for wrong, what in (
        (["--root", "videos"], "name the file"), (["--ensemble", "max"], "without"),
        (["--top", 0], "at least 1"), (["--manifest", "nowhere.csv"], "nowhere.csv does not exist"),
    ):  # fmt: skip
        code, _, err = call(evaluate.main, undisturbed, *wrong)
        assert code == 1 and what in err and err.count("\n") == 1


def test_stopped_by_a_limit_and_gone_on_with(undisturbed, call, tmp_path):
    run = tmp_path / "run"
    code, _, _ = call(train.main, "mac", *SHAPES, "--run-dir", run, "--max-steps", 6)
    assert code == 0 and len(rows(run)) == 6 and json.loads((run / "result.json").read_text())["step"] == 6
    code, out, _ = call(train.main, "--resume", "--run-dir", run, "--log-every", 1)
    assert code == 0 and "resuming at step 6" in out
    assert untimed(rows(run)) == untimed(rows(undisturbed))
    assert weights(run, 12) == weights(undisturbed, 12)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-12", "step-6"]
    scores = [json.loads((r / "result.json").read_text()) for r in (run, undisturbed)]
    assert untimed(scores[:1]) == untimed(scores[1:])

    # A run that is finished already is only evaluated again.
    (run / "result.json").unlink()
    code, out, _ = call(train.main, "--resume", "--run-dir", run, "--log-every", 1)
    assert code == 0 and (run / "result.json").exists() and untimed(rows(run)) == untimed(rows(undisturbed))


@pytest.mark.slow
def test_killed_at_any_moment_and_gone_on_with(undisturbed, call, tmp_path):
    """With a checkpoint every 3 steps; and from what a run leaves that is killed before its first."""
    run, early = tmp_path / "run", tmp_path / "early"
    command = [sys.executable, "-m", "smaug.train", "mac", *SHAPES, "--run-dir", str(run), "--checkpoint-every", "3"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wanted, limit = random.randint(4, 9), time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < wanted:
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"the run ended before it could be killed: {process.communicate()[1]}")
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    process.kill()
    process.communicate()
    with open(run / "metrics.jsonl", "a") as log:  # a row may be cut anywhere
        log.write('{"step": 11, "lo')
    shutil.copytree(run, early, ignore=shutil.ignore_patterns("checkpoints"))
    saved = [int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")]
    assert saved and all(step % 3 == 0 for step in saved)

    for folder, said in ((run, f"resuming at step {max(saved)}\n"), (early, "resuming at step 0, since there is no")):
        code, out, _ = call(train.main, "--resume", "--run-dir", folder, "--log-every", 1)
        assert code == 0 and said in out
        assert untimed(rows(folder)) == untimed(rows(undisturbed))
        assert weights(folder, 12) == weights(undisturbed, 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(undisturbed, call, tmp_path, monkeypatch, number):
    """Ctrl-C finishes the step, saves, and says how to go on."""
    run, taken, step = tmp_path / "a run", [], steps.training_step

    def interrupted(*arguments):
        taken.append(1)
        if len(taken) == 4:
            signal.raise_signal(number)
        return step(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(steps, "training_step", interrupted)
    code, out, _ = call(train.main, "mac", *SHAPES, "--run-dir", run)
    assert code == 0 and len(taken) == 4 and signal.getsignal(number) is before
    assert "finishing the step and saving" in out
    assert f"stopped at step 4 and saved; go on with:\n  python -m smaug.train --resume --run-dir '{run}'\n" in out
    assert not (run / "result.json").exists() and (run / "checkpoints/step-4/state.json").exists()

    code, out, _ = call(train.main, "--resume", "--run-dir", run, "--log-every", 1)
    assert code == 0 and "resuming at step 4" in out
    assert untimed(rows(run)) == untimed(rows(undisturbed))


def test_a_second_ctrl_c_does_not_wait(call, tmp_path, monkeypatch):
    def interrupted(*arguments):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # torchrun repeats what all have heard
            signal.raise_signal(number)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(steps, "training_step", interrupted)
    code, _, err = call(train.main, "mac", *SHAPES, "--run-dir", tmp_path / "run")
    assert code == 130 and "stopped at once" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_may_change_on_resume(undisturbed, call, tmp_path):
    def refused(*arguments):
        before = (undisturbed / "metrics.jsonl").read_bytes()
        code, out, err = call(train.main, *arguments, "--run-dir", undisturbed)
        assert code == 1 and err.startswith("smaug: ") and err.count("\n") == 1 and not out
        assert (undisturbed / "metrics.jsonl").read_bytes() == before
        return err

    assert "holds a run already; add --resume" in refused("mac", *SHAPES)
    assert re.search(r"differs .*: optim.lr was [^ ]+, is 0.0123", refused("--resume", "--optim.lr", "0.0123"))
    assert "video_mask.ratio" in refused("--resume", "--video-mask.ratio", "0.1")
    assert "seed was 0, is 3" in refused("--resume", "--seed", "3")
    assert "--fast" in refused("--resume", "--fast")
    assert "size tiny, not of base" in refused("--resume", "--size", "base")
    assert "objectives.vtc.weight" in refused("mac", "--resume", "--objectives.vtc.weight", "2")
    assert "optim.steps was 12, is 13" in refused("--resume", "--optim.steps", "13")
    code, _, err = call(train.main, "--resume", "--run-dir", tmp_path / "nothing")
    assert code == 1 and "holds no run" in err
    code, _, err = call(train.main, "--resume")
    assert code == 1 and "--resume needs --run-dir" in err


def test_limits_and_logging_may_change_on_resume(call, tmp_path):
    run = tmp_path / "run"
    code, _, _ = call(train.main, "mac", *SHAPES, "--run-dir", run, "--max-steps", 2)
    assert code == 0
    code, out, _ = call(
        train.main, "mac", "--size", "tiny", "--resume", "--run-dir", run, "--max-steps", 7, "--log-every", 4,
        "--checkpoint-every", 5, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "resuming at step 2" in out
    assert [row["step"] for row in rows(run)] == [1, 2, 4, 7]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-5", "step-7"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["macc"], r"no recipe 'macc'; did you mean 'mac'\?"),
        (["--size", "bse"], r"no size 'bse'; did you mean 'base'\?"),
        (["--size=bse"], r"no size 'bse'"),
        (["mac", "--data.bach", "3"], r"--data\.batch"),
        (["mac", "--vidoe-mask.ratio", "3"], r"--video-mask\.ratio"),
        (["--optim.lr", "fast"], r"--optim\.lr.*'fast'"),
        (["--video-mask.kind", "tubes"], r"tubes"),
        (["--data.shapes", "10", "3", "4"], r"even numbers of val and test clips"),
        (["--data.manifest", "clips.csv"], r"clips\.csv does not exist"),
        (["--model.video.heads", "5"], r"not a multiple of 5 heads"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(call, arguments, said):
    code, _, err = call(train.main, *arguments, "--max-steps", "1", "--run-dir", "run")
    assert code in (1, 2) and re.search(said, err.replace("\n", " "))
    assert not Path("run/config.json").exists()


def test_a_wrong_evaluation_is_told_in_a_sentence(undisturbed, call, tmp_path):
    for arguments, said in (
        ([tmp_path / "nothing"], "holds no run"),
        ([undisturbed, "--frames", "0"], "at least 1"),
        ([undisturbed, "--frames", "3"], "use a multiple of 2"),
        ([undisturbed, "--framse", "3"], "--frames"),
    ):
        code, _, err = call(evaluate.main, *arguments)
        assert code in (1, 2) and said in err, err


def video(path, level, pictures=6):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(pictures):
            picture = np.full((32, 32, 3), (level * 9 + i * 7) % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture
def own(tmp_path):
    """Twelve videos and ten images in two manifests, and one file that is no video."""
    for i in range(12):
        video(tmp_path / f"v{i}.mp4", i)
    for i in range(10):
        Image.fromarray(np.full((20, 30, 3), 25 * i, np.uint8)).save(tmp_path / f"i{i}.png")
    (tmp_path / "bad [x].mp4").write_bytes(b"not a video at all" * 50)
    clips = ["video,caption", *(f"v{i}.mp4,clip number {i}" for i in range(12))]
    (tmp_path / "clips.csv").write_text("\n".join(clips))
    (tmp_path / "stills.csv").write_text("\n".join(["image,caption", *(f"i{i}.png,still {i}" for i in range(10))]))
    return tmp_path


def test_skipped_files_stay_named_when_a_run_goes_on(tmp_path):
    path, console = tmp_path / "skipped.txt", Console(quiet=True)
    assert train._name_skipped(console, path, []) == [] and not path.exists()
    # a name from JSON may hold what is no character, and one from a disk a new line
    train._name_skipped(console, path, [Skip("\udce9.mp4", "0 bytes"), Skip("a\nb.mp4", "0 bytes")])
    both = train._name_skipped(console, path, [Skip("c.mp4", "0 bytes"), Skip("a\nb.mp4", "0 bytes")])
    assert both == path.read_text().splitlines() == ["\\udce9.mp4: 0 bytes", "a\\nb.mp4: 0 bytes", "c.mp4: 0 bytes"]


def test_own_videos_and_images(call, own):
    flags = [*SMALL, "--data.manifest", "clips.csv", "stills.csv", "--data.root", own, "--data.batch", "8"]
    with open("clips.csv", "a") as f:
        f.write("\ngone[/y].mp4,a file that is not there\nbad [x].mp4,a file that is no video\n")
    code, out, err = call(train.main, "mac", *flags, "--run-dir", "strict", "--optim.steps", "4")
    assert code == 1 and err.startswith("smaug: ") and err.count("\n") == 1
    assert re.search(r"2 of 24 files cannot be used, more than the 5% that --data.max-bad allows", err)
    assert "gone[/y].mp4: file not found" in err and "bad [x].mp4: " in err
    assert len(Path("strict/skipped.txt").read_text().splitlines()) == 2  # all of them, where the message has three

    code, out, err = call(train.main, "mac", *flags, "--data.max-bad", "0.1", "--run-dir", "run", "--optim.steps", "6")
    assert code == 0, err
    assert "clips.csv + stills.csv, 13 videos and 10 images" in out
    assert "skipped gone[/y].mp4: file not found\n" in out and "skipped bad [x].mp4: " in out
    assert len(Path("run/skipped.txt").read_text().splitlines()) == 2
    assert "these are training pairs" in out
    result = json.loads(Path("run/result.json").read_text())
    assert result["skipped"] == 2 and result["candidates"] == 22
    assert [s.split(":")[0] for s in result["evaluation_skipped"]] == ["gone[/y].mp4", "bad [x].mp4"]
    assert all(np.isfinite(row["loss"]) for row in rows(Path("run")))

    Path("few.csv").write_text("video,caption\nv3.mp4,clip number 3\nv5.mp4,clip number 5\n")
    code, out, _ = call(
        train.main, "mac", *SMALL, "--data.manifest", "clips.csv", "--data.max-bad", "0.2",
        "--data.eval-manifest", "few.csv", "--run-dir", "apart", "--optim.steps", "1",
    )  # fmt: skip
    assert code == 0 and "batch is 13, since there are no more clips" in out and "training pairs" not in out
    assert json.loads(Path("apart/result.json").read_text())["candidates"] == 2


def test_live_decoding_is_resumed_bit_for_bit(call, own):
    flags = [*SMALL, "--data.manifest", "clips.csv", "stills.csv", "--data.batch", "8", "--optim.steps", "6"]
    assert call(train.main, "mac", *flags, "--run-dir", "whole")[0] == 0
    assert call(train.main, "mac", *flags, "--run-dir", "parts", "--max-steps", "3")[0] == 0
    assert call(train.main, "--resume", "--run-dir", "parts", "--log-every", "1")[0] == 0
    assert untimed(rows(Path("parts"))) == untimed(rows(Path("whole")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("video,captions\nv1.mp4,a clip\n", r"no column 'caption'; .*perhaps --data.caption-column captions"),
        ("clip,caption\nv1.mp4,a clip\n", r"no column 'video' or 'image'; .*--data.video-column clip"),
        ("video,caption\n", r"has no rows"),
        ("", r"has no rows"),
        ("video,caption\nnone.mp4,a clip\n", r"1 of 1 files cannot be used.*none.mp4: file not found"),
        ("video,caption\nbad [x].mp4,a clip\n", r"1 of 1 files cannot be used.*bad \[x\].mp4: "),
    ],
)
def test_a_bad_manifest_is_told_in_a_sentence(call, own, text, said):
    Path("bad.csv").write_text(text)
    code, _, err = call(
        train.main, "mac", *SMALL, "--data.manifest", "bad.csv", "--run-dir", "run", "--optim.steps", "2"
    )
    assert code == 1 and err.startswith("smaug: ") and err.count("\n") == 1
    assert re.search(said, err)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared real clips are not at {SHARED}")
@pytest.mark.slow
def test_real_clips_and_images_are_learned(call):
    code, _, err = call(
        train.main, "mac", "--fast", "--data.manifest", SHARED / "clips.csv", SHARED / "images.csv",
        "--data.root", SHARED, "--data.batch", "12",
        "--data.eval-manifest", SHARED / "images.csv", "--optim.steps", "15", "--log-every", "1",
        "--run-dir", "run",
    )  # fmt: skip
    assert code == 0, err
    losses = [row["loss"] for row in rows(Path("run"))]
    # Below what a guess among the batch's 12 would cost, not only below the first.
    assert len(losses) == 15 and np.mean(losses[-5:]) < min(losses[0], np.log(12)) - 0.1, losses
    assert json.loads(Path("run/result.json").read_text())["skipped"] == 0


QUESTIONS = ["--data.shapes", "64", "16", "16", "--data.batch=16", "--log-every=1", "--model.fusion.heads=2"]


@pytest.mark.parametrize("recipe", ["mc", "qa", "retrieval"])
def test_a_run_begins_from_another(call, undisturbed, tmp_path, recipe):
    mine = ["--objectives.answer.by=decoder", "--objectives.answer.decoder.heads=2"] if recipe == "qa" else []
    begin = [recipe, "--init", undisturbed, *QUESTIONS, *mine, "--optim.steps=3", "--fast"]
    code, out, err = call(train.main, *begin, "--run-dir", "a")
    assert code == 0, err
    assert re.search(r"init +\S*undisturbed, step 12: \d+ of \d+ tensors; new in fusion", out)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (undisturbed / "tokenizer.json").read_bytes()
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert ("t2v_r1" if recipe == "retrieval" else "acc_text_only") in result and result["protocol"]
    # stopped before its first checkpoint, it begins from the other run again
    shutil.copytree("a", "b")
    shutil.rmtree("b/checkpoints")
    code, out, err = call(train.main, "--resume", "--run-dir", "b")
    assert code == 0 and "init " in out, err
    assert weights(tmp_path / "a", 3) == weights(tmp_path / "b", 3)
    code, out, err = call(evaluate.main, "a", "--frames=8", "--ensemble=mean", "--no-controls", "--json", "again.json")
    assert code == 0, err
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["checkpoint"] == result["checkpoint"] and "mean" in again["protocol"]


def test_what_a_run_cannot_begin_from(call, undisturbed, tmp_path):
    for begin, what in (
        (["mc", "--init", "nowhere"], "nowhere holds no run: there is no nowhere/config.json"),
        (["mc", "--init", undisturbed, "--size", "base"], "is a run of the size tiny, not of base"),
        (["--resume", "--run-dir", undisturbed, "--init", undisturbed], "has begun already; leave --init out"),
        (["qa", "--data.manifest", "x.csv"], "questions come in the formats msrvtt_qa"),
    ):
        code, _, err = call(train.main, *begin)
        assert code == 1 and what in err
    (tmp_path / "begun").mkdir()
    for file, what in (
        ("config.json", "begun has no tokenizer"),
        ("tokenizer.json", "begun/checkpoints has no checkpoint to start from"),
    ):
        shutil.copy(undisturbed / file, tmp_path / "begun")
        code, _, err = call(train.main, "qa", "--init", "begun", *QUESTIONS, "--run-dir", "new")
        assert code == 1 and what in err and not (tmp_path / "new/config.json").exists()
    (tmp_path / "answers.txt").write_text("Red\nBlue\n")
    code, _, err = call(
        train.main, "qa", "--init", undisturbed, *QUESTIONS, "--data.answers", "answers.txt", "--run-dir", "new"
    )
    assert code == 1 and "answers.txt has none of the answers of training" in err
    code, _, err = call(evaluate.main, undisturbed, "--answers", "answers.txt")
    assert code == 1 and "--answers would change nothing: this evaluates the task retrieval" in err
    code, _, err = call(evaluate.main, undisturbed, "--task", "qa")
    assert code == 1 and "the objective answer or mlm; this model was trained without either" in err
    code, _, err = call(evaluate.main, undisturbed, "--task", "mc")
    assert code == 1 and "multiple choice needs a match head" in err


def test_the_time_that_is_told(monkeypatch):
    """On a GPU, of which there is none here, from its data sheet; half as many steps take half as long, or more where
    pruning has not warmed up; each of two processes has half of the pairs."""
    recipe, gpu = load("smaug", "base"), device.Way(torch.device("cuda"), torch.bfloat16, "auto", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000")
    seconds, why = train.predicted_seconds(recipe, 600, gpu, 1, 30522, again=False)
    assert why == "a prediction, from counted FLOPs at 25% of the 155 TFLOP/s of its data sheet"
    flops = [cost.total(cost.parts(recipe, one).values()).step_flops for one in cost.schedule(recipe, cost.Load(128))]
    assert seconds == pytest.approx(600 * sum(flops) / len(flops) / (0.25 * 154.8e12), rel=0.1)
    begin, several, again = (
        train.predicted_seconds(recipe, *given)[0]
        for given in ((300, gpu, 1, 30522, False), (600, gpu, 2, 30522, False), (600, gpu, 1, 30522, True))
    )
    halves, alone = (train.predicted_seconds(recipe, 600, gpu, 1, 30522, False, pairs)[0] for pairs in (64, 128))
    assert alone == seconds and 1.25 < halves / seconds < 1.35  # encoders, most of it, run forward once more
    cpu = device.Way(torch.device("cpu"), torch.float32, "auto", "")
    assert train.predicted_seconds(load("smaug"), 1, cpu, 1, 200, again=False) == (0.0, "")  # no number for a moment
    assert begin > 0.52 * seconds and 0.5 < several / seconds < 0.55 and 1.25 < again / seconds < 1.35
