"""Runs tests/kernels/interpreted under Triton's interpreter, in processes of their own: one process cannot do both."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"), key=lambda f: -f.stat().st_size)


def interpreted(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def runs():
    """All files, two at a time: the interpreter uses one core."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpreted, file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_interpreted(file, runs):
    done = runs[file].result()
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
