"""Match scores of the best k clips of each text: keys and values made once, or copied for each pair.

    pytest benchmarks/bench_scoring.py --benchmark-only [--full]     # a few texts; --full: 1,000 x 1,000, k = 128
    python -m benchmarks.bench_scoring --size tiny --texts 1000 --clips 1000 --top 128    # taking turns, into results/

Recipe singularity on noise as it comes out of its encoders: the time does not depend on what is seen. `smaug` is what
retrieval does. `copied` is what the published code of such systems does, on the same weights: for each text its k
clips' tokens are copied into a batch, and every block projects them anew. `copied_kv` projects once and copies keys and
values, which is what is left of the gain when only projecting is saved. Encoding is outside the time.
"""

from __future__ import annotations

import csv
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from smaug.device import describe
from smaug.evaluate.encode import Block, EncodedTexts
from smaug.evaluate.match import match, read_texts
from smaug.model.fusion import FusionBlock
from smaug.model.model import Model
from smaug.recipe import load
from smaug.run import build
from smaug.tokens import packed_ragged, packed_uniform, uniform_cu_seqlens

RESULTS = Path(__file__).parent / "results" / "scoring.csv"
SHORT = ("tiny", 40, 40, 16)  # size, texts, clips, k
FULL = ("tiny", 1000, 1000, 128)
BLOCK = 100  # clips, as `encode.BATCH`


@dataclass(frozen=True)
class Case:
    """Texts of 6 to 14 words and clips, encoded, and the k clips of each text."""

    model: Model
    texts: EncodedTexts
    blocks: list[Block]
    best: np.ndarray  # (texts, k)


def case(size: str, texts: int, clips: int, top: int, device: torch.device, dtype: torch.dtype) -> Case:
    recipe = load("singularity", size)
    torch.manual_seed(0)
    model = build(recipe, 200, "auto").to(device).eval()
    generator = torch.Generator().manual_seed(1)
    video, width = recipe.model.video, recipe.model.text.width
    lengths = torch.randint(7, 16, (texts,), generator=generator).tolist()  # [CLS] is one of them
    words = torch.randn(sum(lengths), width, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    packed = packed_ragged(words, cu_seqlens, lengths=lengths)
    encoded = EncodedTexts(words.index_select(0, packed.first_rows()), packed, 0)
    blocks = []
    for first in range(0, clips, BLOCK):
        count, moments, tokens = min(BLOCK, clips - first), recipe.eval_frames, 1 + video.patches
        values = torch.randn(count * moments * tokens, video.width, generator=generator).to(device, dtype)
        ids = uniform_cu_seqlens(count * moments, 1, device)[:-1].view(count, moments)
        frames = packed_uniform(values, tokens)
        summaries = values.view(count * moments, tokens, -1)[:, 0]
        blocks.append(Block(list(range(first, first + count)), summaries[::moments], frames, summaries, ids))
    rng = np.random.default_rng(0)
    return Case(model, encoded, blocks, np.stack([rng.permutation(clips)[:top] for _ in range(texts)]))


def smaug(given: Case) -> Tensor:
    """(texts, k), as `retrieval` makes them."""
    texts, top = given.best.shape
    videos, owners = given.best.ravel(), np.arange(texts).repeat(top)
    read, scores = read_texts(given.model, given.texts), torch.empty(texts * top, device=given.texts.features.device)
    for block in given.blocks:
        first = block.numbers[0]
        mine = np.flatnonzero((videos >= first) & (videos < first + len(block.numbers)))
        found = match(given.model, block, given.texts, read, owners[mine], videos[mine] - first)
        scores[torch.from_numpy(mine).to(scores.device)] = found
    return scores.view(texts, top)


def copied(given: Case, once: bool = False) -> Tensor:
    """A text at a time, its k clips in one padded batch; with `once` keys and values are copied instead of tokens."""
    fusion, words = given.model.fusion, given.texts.words
    assert fusion is not None and words is not None
    clips = sum(len(block.numbers) for block in given.blocks)
    tokens = torch.cat([block.frames.values for block in given.blocks]).unflatten(0, (clips, -1))  # (clips, n, D)
    made = [block.key_value(tokens) for block in fusion.blocks] if once else []
    device, scores = tokens.device, []
    for own, best in zip(words.values.split(list(words.lengths)), given.best, strict=True):
        index = torch.from_numpy(best).to(device)
        x = own.expand(len(best), -1, -1)
        frames = None if once else tokens.index_select(0, index)
        for number, block in enumerate(fusion.blocks):
            both = made[number].index_select(0, index) if once else block.key_value(frames)
            x = _block(block, x, both)
        no, yes = given.model.heads["vtm"](fusion.norm(x[:, 0])).float().unbind(1)
        scores.append(yes - no)
    return torch.stack(scores)


def _block(block: FusionBlock, x: Tensor, key_value: Tensor) -> Tensor:
    """The fusion block on (k, L, D) words and (k, n, 2 D) keys and values."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    q, k, v = (heads(y) for y in block.attention.qkv(block.norm1(x)).chunk(3, dim=-1))
    x = x + block.attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    k, v = (heads(y) for y in key_value.chunk(2, dim=-1))
    q = heads(block.query(block.norm_cross(x)))
    x = x + block.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.down(F.gelu(block.up(block.norm2(x))))


PROVIDERS: dict[str, Callable[[Case], Tensor]] = {
    "smaug": smaug,
    "copied": copied,
    "copied_kv": lambda given: copied(given, once=True),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("point", [SHORT, pytest.param(FULL, marks=pytest.mark.full)], ids=lambda p: f"{p[1]}x{p[2]}")
@torch.no_grad()
def test_scoring(timed, device, point, dtype, provider):
    given = case(*point, device, dtype)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return PROVIDERS[provider](given)

    if point == SHORT:  # the others' minute would be spent twice
        truth = copied(case(*point, device, torch.float32))
        assert (run() - truth).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    size, texts, clips, top = point
    timed(run, f"singularity {size}, {texts} texts, {top} of {clips} clips each", dtype)


@torch.no_grad()
def main(
    size: Literal["tiny", "small", "base"] = "tiny",
    texts: int = 1000,
    clips: int = 1000,
    top: int = 128,
    rounds: int = 2,
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
) -> None:
    """Providers take turns in a random order, on one thread; each keeps its fastest round. Appends to results/.

    The ratio is that of the processor's seconds: on a machine that others use as well, those of the clock say little.
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
    truth = None
    for name in dtypes:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        given = case(size, texts, clips, top, device, dtype)
        least, scores, order = dict.fromkeys(PROVIDERS, (math.inf, math.inf)), {}, random.Random(0)
        warm = case(*SHORT, device, dtype)
        for run in PROVIDERS.values():  # what is made at a first call counts for nobody
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                run(warm)
        for _ in range(rounds):
            for provider in order.sample(list(PROVIDERS), len(PROVIDERS)):
                began = time.process_time(), time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    scores[provider] = PROVIDERS[provider](given)
                took = time.process_time() - began[0], time.perf_counter() - began[1]
                least[provider] = min(least[provider], took)
        truth = scores["copied"] if name == "fp32" else truth
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["date", "size", "texts", "clips", "top", "dtype", "provider", "seconds", "cpu_seconds",
                                 "pairs_per_second", "times_smaug", "largest_difference",
                                 "first_call", "machine"])  # fmt: skip
            for provider, (cpu, seconds) in least.items():
                away = "" if truth is None else f"{(scores[provider] - truth).abs().max().item():.2g}"
                row = [time.strftime("%Y-%m-%d"), size, texts, clips, top, name, provider,
                       f"{seconds:.3f}", f"{cpu:.3f}", f"{texts * top / cpu:.0f}", f"{cpu / least['smaug'][0]:.2f}",
                       away, "left out", describe(device)]  # fmt: skip
                print(*row, flush=True)
                writer.writerow(row)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
