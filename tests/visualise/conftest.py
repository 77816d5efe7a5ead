"""Runs to look at, trained once for all files of this folder."""

import sys

import pytest
from rich.console import Console

from smaug import train
from smaug.run import load_run, open_split

# Two pruning blocks, four moments of two frames: the smallest model to which everything happens.
SMALL = [
    "--model.video.width=32", "--model.video.depth=3", "--model.video.heads=2", "--model.video.frames=8",
    "--model.video.tubelet=2", "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--data.batch=16", "--data.shapes", "64", "16", "16", "--optim.steps=4",
]  # fmt: skip
MORE = [
    "--model.fusion.heads=2", "--model.fusion.depth=2", "--model.selector.keep=3",
    "--model.video.prune.blocks", "0", "2", "--video-mask.ratio=0.6",
]  # fmt: skip


@pytest.fixture(scope="session")
def folders(shapes_cache, tmp_path_factory):
    """Runs of four steps: one whose recipe does all there is to see, and one that only masks."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, more in {"whole": ["smaug", *SMALL, *MORE], "masked": ["mac", *SMALL]}.items():
            patch.setattr(sys, "argv", ["smaug", *more, "--run-dir", str(folder / name)])
            assert train.main() == 0
    return folder


@pytest.fixture(scope="session")
def run(folders):
    loaded = load_run(folders / "whole", "cpu")
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="session")
def clips(run):
    return open_split(run.recipe, "test", Console(quiet=True))
