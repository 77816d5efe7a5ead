"""What several test files need: the embedded data set in small."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from smaug.data import shapes

SMALL = (64, 16, 16)

# The same examples on every run and nothing kept beside the checkout; Triton's interpreter has no deadline to meet.
settings.register_profile("smaug", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("smaug")


@pytest.fixture(scope="session")
def shapes_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder, with `shapes` of 64 + 16 + 16 clips in it; SMAUG_CACHE names it, also for subprocesses."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMAUG_CACHE", str(folder))
        shapes.build(SMALL)
        yield folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, shapes_cache):
    """call(main, *arguments) -> exit code, output, errors; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["smaug", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as error:  # the parser's
            code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
