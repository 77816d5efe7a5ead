"""Runs as a person starts them: processes of their own with real files, to be killed, starved and lied to."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from smaug import checkpoint

ROOT = Path(__file__).resolve().parents[2]
# The smallest model of every default's shape: these tests are about the loop.
SMALL = [
    "--model.video.width=32", "--model.video.depth=1", "--model.video.heads=2", "--model.video.frames=4",
    "--model.video.tubelet=2", "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--data.batch=16", "--log-every=1", "--checkpoint-every=2",
]  # fmt: skip
TIMES = ("device_seconds", "data_seconds", "wall_seconds", "clips_per_second")
PATIENCE = 120  # seconds for what takes ten
# What a person types for two processes on this machine; those that fail are started once more.
TWO = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "smaug.train"
)  # fmt: skip


class Run:
    """One run, in one folder, of as many processes one after the other as it takes. Each is started by the same line.

    `log` holds what all of them printed, `said` what the last one did.
    """

    def __init__(self, folder: Path, *flags: object, program: tuple[object, ...] = ("-m", "smaug.train")):
        self.folder, self.log = folder, folder.with_name(folder.name + ".log")
        self.program, self.flags = program, flags
        self.process: subprocess.Popen[bytes] | None = None
        self._from = 0

    def start(self, *more: object, **popen: object) -> "Run":
        words = [sys.executable, *self.program, "mac", *SMALL, *self.flags, "--requeue", "--run-dir", self.folder]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._from = log.tell()
            self.process = subprocess.Popen(
                [str(word) for word in (*words, *more)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, **popen,
            )  # fmt: skip
        return self

    def wait(self) -> int:
        """The exit code; a run that does not end is a failure of the test, not a test without end."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still running after {PATIENCE} s:\n{self.said}")

    def finish(self, *more: object, **popen: object) -> "Run":
        code = self.start(*more, **popen).wait()
        assert code == 0, self.said
        return self

    def refuse(self, *more: object, **popen: object) -> str:
        return self.start(*more, **popen).refusal()

    def refusal(self) -> str:
        """The one line for people with which it must end; anything else fails."""
        code = self.wait()
        lines = [line for line in self.said.splitlines() if line.startswith("smaug: ")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in self.said, self.said
        print(lines[0])
        return lines[0]

    def kill(self) -> None:
        """SIGKILL for it and all that it started."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def signal(self, number: int) -> None:
        """To all processes, as Slurm does it; those that torchrun starts have sessions of their own."""
        assert self.process is not None
        for pid in [self.process.pid, *self.workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def workers(self) -> list[int]:
        """Process numbers of those that torchrun has started, by rank; none of a process that is alone."""
        assert self.process is not None
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ranks = {pid: re.findall(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()) for pid in children}
        except FileNotFoundError:  # ended
            return []
        return [int(pid) for pid in sorted(children, key=ranks.__getitem__) if ranks[pid]]

    def until(self, what: Callable[[], object]) -> None:
        """Waits for a moment; the process may not end before it."""
        limit = time.monotonic() + PATIENCE
        while not what():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > limit:
                self.kill()
                pytest.fail(f"the run ended, or {PATIENCE} s went by, before its moment came:\n{self.said}")
            time.sleep(0.001)

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self._from :].decode()

    def rows(self) -> list[dict[str, float]]:
        """Of metrics.jsonl; a line that is being written is none yet."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]

    def untimed(self) -> list[dict[str, float]]:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in self.rows()]

    def saved(self) -> int:
        """Step of the newest whole checkpoint, 0 if there is none."""
        return max(checkpoint.steps(self.folder / "checkpoints"), default=0)

    def writing(self) -> list[Path]:
        """Checkpoints that are being written now, or were when a process ended."""
        found = (self.folder / "checkpoints").glob(".step-*.aside")
        return [path for path in found if not path.name.endswith(".old.aside")]  # those are being removed

    def files(self, step: int) -> dict[str, bytes]:
        top = self.folder / f"checkpoints/step-{step}"
        return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load_weights(self.folder / "checkpoints")[0]

    def result(self) -> dict[str, object]:
        found = json.loads((self.folder / "result.json").read_text())
        return {key: value for key, value in found.items() if key not in TIMES}

    def equals(self, other: "Run") -> None:
        """The same to the bit: every row, the weights, the scores. Each step has one row."""
        mine, theirs = self.weights(), other.weights()
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
        assert self.untimed() == other.untimed()
        assert [row["step"] for row in self.rows()] == list(range(1, len(self.rows()) + 1))
        assert self.result() == other.result()

    def near(self, other: "Run", tolerance: float = 1e-5) -> None:
        """Every loss the same to `tolerance`. Each step has one row."""
        mine, theirs = ({row["step"]: row["loss"] for row in run.rows()} for run in (self, other))
        assert [row["step"] for row in self.rows()] == list(range(1, len(theirs) + 1))
        assert mine == pytest.approx(theirs, abs=tolerance, rel=tolerance)


@pytest.fixture
def run(tmp_path: Path, shapes_cache: Path) -> Iterator[Callable[..., Run]]:
    """run(name, *flags, program=...) -> a Run in tmp_path, not yet started. None outlives its test."""
    made: list[Run] = []

    def make(name: str, *flags: object, **kind: object) -> Run:
        made.append(Run(tmp_path / name, *flags, **kind))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None:
            one.kill()


@pytest.fixture
def two(run: Callable[..., Run]) -> Callable[..., Run]:
    """The same for a run of two processes."""
    return functools.partial(run, program=TWO)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shapes_cache: Path) -> Callable[..., Run]:
    """undisturbed(*flags) -> a finished run with these flags that nothing happened to; one for all tests."""

    @functools.cache
    def make(*flags: object, two: bool = False) -> Run:
        kind = {"program": TWO} if two else {}
        return Run(tmp_path_factory.mktemp("undisturbed") / "run", *flags, **kind).finish()

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own. Needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
