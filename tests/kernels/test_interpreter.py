"""Runs tests/kernels/interpreted under Triton's interpreter, in processes of their own: one process cannot do both."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
# Two halves of equal time, for two cores; a process of its own for each file would cost four seconds a file.
HALVES = {
    "attention": [f for f in FILES if f.stem == "test_attention"],
    "the others": [f for f in FILES if f.stem != "test_attention"],
}


def interpreted(files):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def runs():
    """Both halves at once: the interpreter uses one core."""
    with ThreadPoolExecutor(2) as pool:
        yield {half: pool.submit(interpreted, files) for half, files in HALVES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_interpreted(half, runs):
    done = runs[half].result()
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
