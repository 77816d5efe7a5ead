"""A disk that is full, a folder that may not be written: one line, exit code 1, what was saved stays whole; then on."""

import functools
import os
import resource
import shutil
import signal
import subprocess

import pytest

pytestmark = pytest.mark.slow
SHAPES = ["--data.shapes", 64, 16, 16, "--optim.steps", 12]


def fill(disk, left):
    """Takes all room of a file system but `left` bytes -> the file to delete for more."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        free = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)
    return ballast


def copied(run, other, folder):
    """A run that has come as far as another, to go on from there."""
    one = run("run", *SHAPES)
    one.folder = folder / "run"
    shutil.copytree(other.folder, one.folder)
    return one


def stopped(one, work):
    """Does something while a run stands still."""
    one.signal(signal.SIGSTOP)
    done = work()
    one.signal(signal.SIGCONT)
    return done


def whole(one):
    """Every file of the checkpoints that have their names."""
    return {path.name: one.files(path.name[5:]) for path in sorted(one.folder.glob("checkpoints/step-*"))}


def test_full_or_read_only_while_training(run, undisturbed, small_disk):
    """Of what a run writes, the row, TensorBoard's event or the checkpoint is the first that has no room."""
    one = copied(run, undisturbed(*SHAPES, "--max-steps=6"), small_disk)
    before = whole(one)
    assert list(before) == ["step-4", "step-6"]
    for left in (0, 150_000):
        ballast = fill(small_disk, left)
        line = one.refuse()
        assert "No space left on device" in line and str(one.folder) in line, (left, line)
        assert whole(one) == before and not one.writing(), left
        ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    line = one.refuse()
    assert "Read-only file system" in line and str(one.folder) in line
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert whole(one) == before
    one.finish().equals(undisturbed(*SHAPES))


def test_full_while_the_result_is_written(run, undisturbed, small_disk):
    """The disk has filled up between the last checkpoint and the scores."""
    one = copied(run, undisturbed(*SHAPES), small_disk)
    (one.folder / "result.json").unlink()
    opened = len(list((one.folder / "tensorboard").iterdir()))
    one.start()
    one.until(lambda: len(list((one.folder / "tensorboard").iterdir())) > opened)  # then it only evaluates
    ballast, before = stopped(one, lambda: (fill(small_disk, 0), whole(one)))
    line = one.refusal()
    assert "No space left on device" in line and str(one.folder / "ledger.json") in line  # which comes first
    assert whole(one) == before and not (one.folder / "result.json").exists()
    ballast.unlink()
    one.finish().equals(undisturbed(*SHAPES))


def test_full_before_anything_is_saved(run, undisturbed, small_disk, shapes_cache, monkeypatch):
    """First no room for the embedded clips, then none for a checkpoint: half a data set is none, nor half a run."""
    end, cache = undisturbed(*SHAPES), small_disk / "cache"
    monkeypatch.setenv("SMAUG_CACHE", str(cache))
    one = run("run", *SHAPES)
    one.folder = small_disk / "run"
    ballast = fill(small_disk, 400_000)
    line = one.refuse()
    assert "No space left on device" in line and str(cache) in line and not list(cache.iterdir())
    ballast.unlink()
    shutil.copytree(shapes_cache, cache, dirs_exist_ok=True)
    ballast = fill(small_disk, 150_000)
    line = one.refuse()
    assert "No space left on device" in line and str(one.folder) in line and one.saved() == 0
    ballast.unlink()
    one.finish().equals(end)


def test_files_may_grow_no_further(run, undisturbed, tmp_path):
    """By RLIMIT_FSIZE, which needs no right to mount: first no checkpoint has room, then not the next row."""
    one = copied(run, undisturbed(*SHAPES, "--max-steps=6"), tmp_path)
    before = whole(one)
    row = (one.folder / "metrics.jsonl").stat().st_size + 50
    for size, file in ((100_000, one.folder / "checkpoints"), (row, one.folder)):
        line = one.refuse(preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))
        assert "File too large" in line and str(file) in line
        assert whole(one) == before and not one.writing()
    one.finish().equals(undisturbed(*SHAPES))
