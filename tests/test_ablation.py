"""docs/cost.md: what is counted as plain PyTorch is what torch counts of it, and the page is what the code says."""

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from smaug import cost
from smaug.masks import TextMask, VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.frame_selector import FrameSelectorConfig
from smaug.objectives.mvm import Mvm
from smaug.recipe import load
from smaug.run import build
from smaug.step import text_views

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import ablation, scaling
from benchmarks.bench_train_step import VOCABULARY, batch_of
from benchmarks.eager_step import EagerStep, padded
from benchmarks.launches import Launches, written_out

del sys.path[0]  # or transformers would take our folder `kernels` for its own package

SMAUG = load("smaug")
DEEP = Mvm(decoder=DecoderConfig(depth=3, share=1.0))
RECIPES = {
    "smaug": SMAUG,
    "dense": load("dense"),
    "mac": load("mac"),
    "all patches decoded": dataclasses.replace(SMAUG, objectives=SMAUG.objectives | {"mvm": DEEP}),
    "a frame of two": dataclasses.replace(
        SMAUG, model=dataclasses.replace(SMAUG.model, selector=FrameSelectorConfig(keep=1))
    ),
    "words masked": dataclasses.replace(SMAUG, text_mask=TextMask(0.4, "mask")),
}


SLOW = ("dense", "words masked")


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, r in RECIPES.items()]
)
def test_plain_pytorch_is_what_torch_counts_of_it(recipe):
    """FLOPs to 1 in 10,000: what is left are scores for pruning, that the eager step computes once more. With attention
    written out, since torch does not count SDPA on a CPU; its backward has four products, a fused one has five."""
    batch = batch_of(recipe, 12, torch.device("cpu"))
    model = build(recipe, VOCABULARY, "auto")
    eager, theirs = EagerStep(model, recipe), padded(batch, text_views(recipe, batch))
    with mock.patch.object(F, "scaled_dot_product_attention", written_out), FlopCounterMode(display=False) as counter:
        eager(theirs, eager.draw(theirs, batch.step), batch.step).backward()
    each = cost.Load(12, words=batch.words.rows / 12, masked=len(batch.masked_rows) / 12)
    length = theirs.captions.words.shape[1]
    found = cost.total(ablation.plain(recipe, each, vocabulary=VOCABULARY, longest=length).values())
    assert found.step_flops - found.attention_flops / 2 == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert found.weights == sum(p.numel() for p in model.parameters())

    model.zero_grad()
    with Launches() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = eager(theirs, eager.draw(theirs, batch.step), batch.step)
        loss.backward()
    assert found.launches == pytest.approx(launches.dense.total() + launches.outside.total(), rel=0.07)


def test_mae_s_decoder():
    """On 196 patches and [CLS]: two linear layers at the ends, eight blocks of 12 D^2 a row and attention."""
    width, rows = 512, 197
    once = 99 * 768 * width + rows * width * 768 + 8 * (12 * width**2 * rows + 2 * width * rows**2)  # half are visible
    counted = ablation.plain(ablation.STOCK, cost.Load(2))
    found = sum(work.flops for name, work in counted.items() if name.startswith("mvm"))
    assert found == pytest.approx(2 * once * 2 * 4, rel=1e-9)
    assert 5.2e9 < once < 5.4e9  # about 5.3 GMAC a frame


def test_rows_end_where_the_recipes_stand():
    smaug, dense = load("smaug", "base"), load("dense", "base")
    _, last, count, _ = ablation.ROWS[-1]
    _, yardstick, counts = ablation.YARDSTICK
    # what is taken from the method, one by one, leaves the dense recipe
    rest = dataclasses.replace(ablation.UNPRUNED, video_mask=VideoMask(0.0, "even"))
    rest = dataclasses.replace(rest, objectives={n: o for n, o in rest.objectives.items() if n != "mvm"})
    for each in cost.schedule(smaug, cost.Load(128), points=3):
        assert count(last, each) == cost.parts(smaug, each)
        assert counts(yardstick, each) == cost.parts(dense, each) == cost.parts(rest, each)


def test_every_part_saves_but_words():
    runs = [ablation.counted(recipe, count) for _, recipe, count, _ in ablation.ROWS]
    for field in ("step_flops", "bytes", "saved", "hours"):
        values = [ablation.hours(run) if field == "hours" else ablation.of_a_pair(run, field) for run in runs]
        assert values[1] == values[2]  # the recipe masks no words for the contrast
        assert all(before > after for before, after in pairwise(values[:2] + values[3:])), field
    assert ["copies" in run[0][2] for run in runs] == [True] * 5 + [False] * 2


def test_hours_and_shares_of_the_peak():
    run = ablation.counted(load("smaug", "base"), cost.parts)
    share = ablation.share_needed(run, 50)
    assert ablation.hours(run, share) == pytest.approx(50, rel=1e-4) and 0.2 < share < 0.43
    assert ablation.hours(run, seen=2 * ablation.SEEN) == pytest.approx(2 * ablation.hours(run))
    # all bytes of the run, at 768 GB/s, are the floor
    moved = ablation.of_a_pair(run, "bytes") + ablation.of_a_pair(run, "backward_bytes")
    floor = moved * ablation.SEEN / 768e9 / 3600
    assert ablation.share_needed(run, 0.9 * floor) == float("inf")
    assert ablation.percent(ablation.share_needed(run, 0.9 * floor)) == "more than all"
    assert ablation.first(lambda pairs: pairs < 77) == 77


@pytest.mark.slow
def test_the_page_is_what_the_code_says():
    page, found = ablation.PAGE.read_text(), ablation.tables()
    assert scaling.renewed(page, found) == page
    for name, table in found.items():
        assert "prediction" in table.splitlines()[0], name


def test_the_picture(tmp_path):
    ablation.draw(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_what_cannot_be(call, tmp_path):
    code, _, err = call(ablation.main, "--page", tmp_path / "none.md")
    assert code == 1 and "none.md" in err
    with pytest.raises(ValueError, match="mc has the objective vtm; plain PyTorch is counted for pre-training alone"):
        ablation.plain(load("mc"), cost.Load(8))
