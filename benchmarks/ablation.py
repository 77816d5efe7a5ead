"""What each part of SMAUG saves, on paper: FLOPs, bytes and predicted A6000-hours, one part after the other.

    python -m benchmarks.ablation    # renews the tables and the picture of docs/cost.md, and prints the tables

Nothing runs. Rows of our own code are `cost.parts`; rows of plain PyTorch are `plain` below, which is held to
`benchmarks/eager_step.py`. Every number of hours is a prediction: arithmetic of smaug/cost.py on data sheets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import tyro

from benchmarks.scaling import given, group, renewed, rows_of, with_video
from smaug import cost
from smaug.cost import BF16_GPU, Job, Load, Precision, Work
from smaug.masks import TextMask, VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.video_encoder import PruneConfig
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe, load
from smaug.run import refuse, write

ROOT = Path(__file__).resolve().parents[1]
PAGE, CHART = ROOT / "docs/cost.md", ROOT / "docs/cost_ablation.png"
SEEN = 5e6 * 10  # pairs of a run: 5 M for 10 epochs
PAIRS = 128  # of a step
LONGEST = 32  # words that captions are padded to; Singularity, configs/pretrain.yaml
A6000 = cost.CLUSTERS["A6000"]
CASTS = 13  # kernels a block, since autocast's stream is fp32: counted by `benchmarks.launches`
MAE = DecoderConfig(width=512, depth=8, heads=16, share=1.0, cls=True)  # He et al. 2022, models_mae.py


# --- a step in plain PyTorch ------------------------------------------------------------------------------------------


def plain(
    recipe: Recipe, each: Load, *, vocabulary: int = 30522, longest: int = LONGEST, precision: Precision = BF16_GPU
) -> dict[str, Work]:
    """As `cost.parts`, of the step that one writes after the published code of MAE, EViT and Singularity.

    All patches become floats and are embedded before some are gathered; indices are int64 and expanded over channels;
    captions are padded to `longest` and masked words replaced; pruning reads a matrix of attention that is written out;
    every pair has a copy of its frames, of which it projects its own keys and values; the fusion encoder computes all
    words in all blocks; MAE's decoder has all patches, and targets in fp32 of all of them. Attention is SDPA's
    elsewhere, and heads see masked words alone, which not all of that code has; nor are bytes of autocast's fp32 stream
    counted. So it is a lower bound. Clips alone, no images.
    """
    for name, objective in recipe.objectives.items():
        if not isinstance(objective, Vtc | Vtm | Mlm | Mvm):
            raise ValueError(f"{recipe.name} has the objective {name}; plain PyTorch is counted for pre-training alone")
    p, model, video = precision, recipe.model, recipe.model.video
    recipe = replace(recipe, text_mask=replace(recipe.text_mask, kind="mask"))
    masked = next((o.ratio * (each.words - 1) for o in recipe.objectives.values() if isinstance(o, Mlm)), 0.0)
    each = replace(each, words=float(longest), masked=masked if each.masked is None else each.masked)
    found = dict(cost.parts(recipe, each, vocabulary=vocabulary, precision=p))

    seen = cost.video_tokens(recipe, each.step, each.frames)
    sequences, stay, pixels = each.pairs * seen.sequences, seen.patches[0], 3 * video.patch**2 * video.tubelet
    every = sequences * (stay + seen.masked)
    made = {"patch embedding": _embedding(every, sequences, stay, pixels, video.width, p)}
    for number, (patches, left) in enumerate(pairwise(seen.patches)):
        if left < patches:
            name, tokens = f"video block {number}", seen.rows[number]
            made[name] = found[name] + _pruning(sequences, tokens, patches, left, video.width, video.heads, p)
    if model.fusion.depth:
        made |= _fusion(recipe, each, seen.sequences, seen.rows[-1], p)
    for name, objective in recipe.objectives.items():
        if isinstance(objective, Mvm) and sequences * stay < every:
            rebuilt = _decoder(objective.decoder, video.width, pixels, sequences, every, stay, p)
            made |= {f"{name} {part}": work for part, work in rebuilt.items()}
    # the same networks, so the same weights
    made = {name: replace(work, weights=found.get(name, Work()).weights) for name, work in made.items()}
    casts = Work(launches=CASTS)
    return {name: work + casts if work.enters else work for name, work in (found | made).items()}


def gathered(rows: float, of: float, width: int, p: Precision) -> Work:
    """`x.gather(1, ids[..., None].repeat(1, 1, width))`, rows of `of`; its gradient is added to zeros."""
    index = 8 * rows * width
    return Work(
        bytes=2 * index + 2 * p.stream * rows * width,
        backward_bytes=index + p.stream * (3 * rows + of) * width,
        saved=index,
        launches=4,
    )


def copied(numbers: float, p: Precision) -> Work:
    """What cat and indexing by rows do, forward and backward."""
    return Work(bytes=2 * p.stream * numbers, backward_bytes=2 * p.stream * numbers, launches=2)


def _embedding(every: int, sequences: int, stay: int, pixels: int, width: int, p: Precision) -> Work:
    flops, numbers, kept = 2.0 * every * pixels * width, every * pixels, sequences * stay
    # less the mean, by the deviation, to what the convolution reads
    floats = (1 + 4) * numbers + (4 + 4) * numbers + (4 + p.stream) * numbers
    embed = Work(
        flops=flops,
        backward_flops=flops,  # pixels need no gradient
        bytes=floats + p.stream * (numbers + every * width + pixels * width),
        backward_bytes=p.stream * (numbers + every * width) + 4 * pixels * width,
        saved=p.stream * numbers,
        launches=20,
    )
    embed += cost.pointwise(every * width, p, reads=2) + copied((kept + sequences) * width, p)  # places, [CLS]
    return embed + gathered(kept, every, width, p) if kept < every else embed


def _pruning(sequences: int, tokens: int, patches: int, left: int, width: int, heads: int, p: Precision) -> Work:
    """What EViT's code moves beyond the rows themselves, which are counted already."""
    matrix, gone = sequences * heads * tokens**2, sequences * (patches - left)
    # written and read: logits, probabilities in fp32, and these as what the product reads
    moved = (4 * p.stream + 8) * matrix
    index = 8 * sequences * patches * width
    weighted = cost.pointwise(gone * width, p, reads=2, keeps=True)
    joined = copied(sequences * (tokens - patches + left + 1) * width, p)
    extra = Work(bytes=moved + 2 * index, backward_bytes=2 * moved + index, saved=(4 + p.stream) * matrix + index)
    return extra + weighted + joined + Work(launches=15)


def _fusion(recipe: Recipe, each: Load, times: int, tokens: int, p: Precision) -> dict[str, Work]:
    model, width, key_width = recipe.model, recipe.model.text.width, recipe.model.video.width
    texts = sum(count for _, count, _ in cost.meetings(recipe, each))
    rows, keep = texts * each.words, model.selector.keep
    found = {"copies": copied(rows * width, p) + copied(texts * times * tokens * key_width, p)}
    seen = times * tokens
    if 0 < keep < times:
        seen = keep * tokens
        scores = cost.linear(texts * times, key_width, model.selector.width, p)
        scores += cost.linear(texts, width, model.selector.width, p)
        selects = Work(saved=12.0 * texts * times * model.selector.width, launches=60)
        found["frame selector"] = scores + selects + gathered(texts * seen, texts * times * tokens, key_width, p)
    found["copies"] += Work(saved=p.stream * texts * seen * key_width)  # for the weights of keys and values
    for number in range(model.fusion.depth):
        work = cost.self_attention(rows, rows * each.words, width, model.fusion.heads, p)
        work += cost.cross_attention(
            rows, texts * seen, rows * seen, width, key_width, model.fusion.heads, p, gathered=0.0
        )
        work += cost.mlp(rows, width, model.fusion.mlp_ratio, p)
        found[f"fusion block {number}"] = work + Work(enters=p.stream * rows * width)
    found["fusion blocks' norm"] = cost.norm(rows, width, p)
    return found


def _decoder(
    config: DecoderConfig, video_width: int, pixels: int, sequences: int, every: int, stay: int, p: Precision
) -> dict[str, Work]:
    width, cls = config.width, sequences * config.cls
    enters = sequences * stay + cls
    asked = sequences * max(1, round(config.share * (every // sequences - stay)))
    rows, numbers = enters + asked, every * pixels
    shown = rows if config.cls else asked  # MAE predicts what it saw too, and leaves it out of the loss
    enter = cost.linear(enters, video_width, width, p) + copied(rows * width, p)
    enter += gathered(rows, rows, width, p) + cost.pointwise(rows * width, p, reads=2)
    found = {"entrance": enter + cost.norm(enters, video_width, p) if config.cls else enter}
    for number in range(config.depth):
        found[f"block {number}"] = cost.block(rows, rows**2 / sequences, width, config.heads, config.mlp_ratio, p)
    # targets in fp32: patches put in order, mean, variance, less the one, by the other; difference, its square, mean
    target = Work(bytes=32 * numbers, saved=4 * numbers, launches=40)
    loss = Work(bytes=(p.stream + 20) * asked * pixels, backward_bytes=(p.stream + 16) * asked * pixels)
    found["pixels"] = cost.norm(shown, width, p) + cost.linear(shown, width, pixels, p) + target + loss
    return found


# --- rows -------------------------------------------------------------------------------------------------------------

Count = Callable[..., dict[str, Work]]
Counted = list[cost.Stage]  # of a run
SMAUG, DENSE = load("smaug", "base"), load("dense", "base")


def selecting(recipe: Recipe, keep: int) -> Recipe:
    return replace(recipe, model=replace(recipe.model, selector=replace(recipe.model.selector, keep=keep)))


def decoding(recipe: Recipe, decoder: DecoderConfig) -> Recipe:
    return replace(recipe, objectives=recipe.objectives | {"mvm": Mvm(decoder=decoder)})


STOCK = decoding(SMAUG, MAE)
UNPRUNED = with_video(selecting(STOCK, 0), prune=PruneConfig())
# (name, recipe, who computes it, what it computes that the next row does not)
ROWS: list[tuple[str, Recipe, Count, str]] = [
    (
        "dense, plain PyTorch", DENSE, plain,
        "all 196 patches of a frame in the video encoder; it has no pixel decoder",
    ),
    (
        "+ video masking", replace(UNPRUNED, text_mask=TextMask(0.0)), plain,
        "nothing: the recipe masks no words for the contrast (ratio 0); mlm's are masked in every row",
    ),
    (
        "+ word masking (off)", UNPRUNED, plain,
        "visible patches that [CLS] hardly looks at, from block 3 on, and their keys and values in fusion",
    ),
    (
        "+ spatial sparsification", selecting(STOCK, 0), plain,
        "keys, values and attention of two frames more for every pair of a text and a video",
    ),
    (
        "+ frame selection", STOCK, plain,
        f"padding to {LONGEST} words, masked patches' floats and embedding, int64 indices, attention's matrix, four "
        "copies of each video's keys and values, words and patches that no head reads, targets of visible patches",
    ),
    (
        "+ kernels that never touch dropped tokens", STOCK, cost.parts,
        "three quarters of the masked patches in the decoder, and its other 7 blocks and 448 channels",
    ),
    ("+ partial decoding (recipe `smaug`)", SMAUG, cost.parts, ""),
]  # fmt: skip
YARDSTICK = ("recipe `dense`, with the same kernels", DENSE, cost.parts)


def counted(recipe: Recipe, count: Count, *, frames: int | None = None) -> Counted:
    """Over a run of PAIRS a step; count: `cost.parts` or `plain`."""
    return cost.stages(recipe, replace(given(PAIRS), frames=frames), count)


def of_a_pair(run: Counted, field: str, part: str = "") -> float:
    """A mean over the run, of parts whose names begin so."""
    works = [(share, works) for share, _, works in run]
    return sum(s * getattr(w, field) for s, each in works for n, w in each.items() if n.startswith(part)) / PAIRS


def hours(run: Counted, efficiency: float = cost.EFFICIENCY, seen: float = SEEN) -> float:
    """A6000-hours of so many pairs, on a GPU that never waits for clips."""
    times = [share * cost.step_time(w, one, Job(), A6000, efficiency=efficiency).gpu for share, one, w in run]
    return sum(times) * seen / PAIRS / 3600


def share_needed(run: Counted, target: float) -> float:
    """Of the peak, for so many hours; infinite where all of it is too little."""
    if hours(run, 1.0) > target:
        return float("inf")
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if hours(run, middle) > target else (low, middle)
    return high


def ranged(run: Counted, seen: float = SEEN) -> str:
    return "**{:.0f}** ({:.0f} to {:.0f})".format(*(hours(run, e, seen) for e in (cost.EFFICIENCY, *cost.RANGE)))


def percent(share: float) -> str:
    return f"{share:.0%}" if share < 1 else "more than all"


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_table() -> str:
    most, least = cost.RANGE
    bases = [hours(counted(DENSE, count)) for count in (plain, cost.parts)]
    body: list[list[object]] = []
    for name, recipe, count, *_ in [*ROWS, YARDSTICK]:
        run = counted(recipe, count)
        moved = of_a_pair(run, "bytes") + of_a_pair(run, "backward_bytes")
        alone = moved * SEEN / A6000.device.bandwidth / 3600
        body.append(
            [
                name, f"{of_a_pair(run, 'step_flops') / 1e9:.0f}", f"{moved / 1e6:,.0f} ({alone:.0f})",
                f"{of_a_pair(run, 'saved') / 1e6:.0f}", ranged(run), *(f"{base / hours(run):.2f}x" for base in bases),
            ]
        )  # fmt: skip
    return rows_of(
        "| prediction | GFLOP of a pair | MB moved at least (hours for these alone) | MB kept | A6000-hours at "
        f"{cost.EFFICIENCY:.0%} of the peak ({most:.0%} to {least:.0%}) | plain dense / this | recipe `dense` / this |",
        body,
    )


def by_group(run: Counted, field: str) -> dict[str, float]:
    """Of a pair, by what a table shows as one."""
    found: dict[str, float] = {}
    for share, _, works in run:
        for name, work in works.items():
            shown = "fusion encoder" if name == "copies" else group(name)
            found[shown] = found.get(shown, 0.0) + share * getattr(work, field) / PAIRS
    return found


def computes_table() -> str:
    flops = [of_a_pair(counted(recipe, count), "step_flops") / 1e9 for _, recipe, count, _ in ROWS]
    body: list[list[object]] = [
        [row[0], row[3], f"{before - after:.0f}"] for row, before, after in zip(ROWS, flops, flops[1:], strict=False)
    ]
    table = rows_of("| row | what it computes that the next does not | prediction: GFLOP of a pair |", body)
    theirs, ours = (by_group(counted(STOCK, count), "step_flops") for count in (plain, cost.parts))
    less = sorted(((theirs[name] - ours.get(name, 0.0)) / 1e9, name) for name in theirs)
    said = ", ".join(f"{name.removeprefix('mvm: ')} {flops:.1f}" for flops, name in reversed(less) if flops > 0.1)
    return f"{table}\n\nPrediction: what kernels save by part, in GFLOP of a pair: {said}."


DECODERS = {
    "512 x 8, all masked patches (MAE's)": MAE,
    "512 x 4, all": replace(MAE, depth=4),
    "512 x 8, a quarter": replace(MAE, share=0.25),
    "64 x 1, a quarter (the recipe's)": next(o.decoder for o in SMAUG.objectives.values() if isinstance(o, Mvm)),
}


def decoders_table() -> str:
    base = hours(counted(DENSE, cost.parts))
    body: list[list[object]] = []
    for name, decoder in DECODERS.items():
        run = counted(decoding(SMAUG, decoder), cost.parts)
        encoder, own, whole = (of_a_pair(run, "step_flops", part) for part in ("video block", "mvm", ""))
        body.append(
            [
                name, f"{own / 1e9:.1f}", f"{own / encoder:.0%}", f"{own / whole:.0%}",
                f"{of_a_pair(run, 'saved', 'mvm') / 1e6:.0f}", ranged(run), f"{base / hours(run):.2f}x",
            ]
        )  # fmt: skip
    return rows_of(
        "| prediction: pixel decoder, width x blocks | GFLOP of a pair | of the video encoder's | of the step | "
        "MB kept | A6000-hours | dense / this |",
        body,
    )


def words_table() -> str:
    vtm = next(o for o in SMAUG.objectives.values() if isinstance(o, Vtm))
    same = replace(SMAUG, objectives=SMAUG.objectives | {"vtm": replace(vtm, words="contrast")})
    body: list[list[object]] = []
    for ratio in (0.0, 0.15, 0.3, 0.5):
        cells = []
        for recipe, count in ((STOCK, plain), (SMAUG, cost.parts), (same, cost.parts)):
            run = counted(replace(recipe, text_mask=TextMask(ratio)), count)
            whole = counted(replace(recipe, text_mask=TextMask(0.0)), count)
            flops, without = (of_a_pair(each, "step_flops") / 1e9 for each in (run, whole))
            cells.append(f"{flops:.1f} ({flops / without - 1:+.1%})")
        body.append([f"{ratio:.0%}", *cells])
    return rows_of(
        "| prediction: GFLOP of a pair; words that the contrast does not see | replaced, plain PyTorch | "
        "dropped, `smaug` (match sees all words) | dropped, match sees what the contrast sees |",
        body,
    )


def selector_table() -> str:
    body: list[list[object]] = []
    keep = SMAUG.model.selector.keep
    for frames in (4, 8, 16):
        for depth in (3, 12):
            recipe = with_video(SMAUG, frames=frames)
            fusion = replace(recipe.model.fusion, depth=depth)
            recipe = replace(recipe, model=replace(recipe.model, fusion=fusion))
            row: list[object] = [f"{keep} of {frames}", depth]
            for count in (cost.parts, plain):
                every, chosen = (counted(selecting(recipe, k), count) for k in (0, keep))
                before, after = (of_a_pair(run, "step_flops") for run in (every, chosen))
                row += [f"{(before - after) / 1e9:.1f} ({1 - after / before:.1%})"]
                row += [f"{hours(every) - hours(chosen):.1f}"]
            body.append(row)
    return rows_of(
        "| prediction: frames kept | fusion blocks | ours: GFLOP of a pair saved (of the step) | A6000-hours saved | "
        "plain PyTorch: GFLOP saved | A6000-hours saved |",
        body,
    )


def grid_table() -> str:
    bases = [hours(counted(DENSE, count)) for count in (plain, cost.parts)]
    body: list[list[object]] = []
    for ratio in (0.0, 0.5, 0.75):
        for keep in (1.0, 0.7, 0.5):
            prune = PruneConfig() if keep == 1 else replace(SMAUG.model.video.prune, keep=keep)
            row: list[object] = [f"{ratio:.0%}", f"{keep:.0%}"]
            for decoder in DECODERS.values():
                recipe = replace(with_video(decoding(SMAUG, decoder), prune=prune), video_mask=VideoMask(ratio, "even"))
                found = [
                    base / hours(counted(recipe, count)) for base, count in zip(bases, (plain, cost.parts), strict=True)
                ]
                row.append(" / ".join(f"**{r:.2f}**" if r >= 1.9 else f"{r:.2f}" for r in found))
            body.append(row)
    return rows_of(
        "| prediction: patches masked | a pruning block keeps | " + " | ".join(DECODERS) + " |",
        body,
    )


def needed_table() -> str:
    body: list[list[object]] = []
    for name, recipe, count, *_ in [YARDSTICK, *ROWS]:
        four, one = (counted(recipe, count, frames=frames) for frames in (4, 1))
        body.append(
            [
                name, *(percent(share_needed(four, target)) for target in (50, 25)), ranged(one),
                *(percent(share_needed(one, target)) for target in (50, 25)),
            ]
        )  # fmt: skip
    table = rows_of(
        "| prediction: share of the peak for | 4 frames, 50 hours | 4 frames, 25 hours | 1 frame: A6000-hours | "
        "1 frame, 50 hours | 1 frame, 25 hours |",
        body,
    )
    flops = of_a_pair(counted(DENSE, cost.parts), "step_flops") * SEEN / A6000.device.flops / 3600
    return (
        f"{table}\n\nPrediction: at the whole peak the dense recipe's products take {flops:.1f} hours. So (dense FLOPs "
        f"/ FLOPs) x (share of the peak) must be at least {flops / 50:.2f} for 50 hours and {flops / 25:.2f} for 25."
    )


def ways_table() -> str:
    sparse = replace(SMAUG, video_mask=VideoMask(0.75, "even"))
    sparser = with_video(sparse, prune=replace(SMAUG.model.video.prune, keep=0.5))
    small = partial(with_video, image_size=160)
    ways: list[tuple[str, Recipe, int, float]] = [
        ("the recipe", SMAUG, 4, 1.0),
        ("5 epochs", SMAUG, 4, 0.5),
        ("75 % masked", sparse, 4, 1.0),
        ("75 % masked, pruning keeps 50 %", sparser, 4, 1.0),
        ("160 pixels", small(SMAUG), 4, 1.0),
        ("2 frames", SMAUG, 2, 1.0),
        ("1 frame", SMAUG, 1, 1.0),
        ("75 % masked, 160 pixels", small(sparse), 4, 1.0),
        ("75 % masked, pruning keeps 50 %, 2 frames", sparser, 2, 1.0),
        ("75 % masked, 2 frames, 160 pixels", small(sparse), 2, 1.0),
        ("75 % masked, 5 epochs", sparse, 4, 0.5),
    ]
    body: list[list[object]] = []
    for name, recipe, frames, epochs in ways:
        run = counted(recipe, cost.parts, frames=frames)
        needed = share_needed(run, 25 / epochs)
        body.append([name, ranged(run, SEEN * epochs), percent(needed)])
    return rows_of("| prediction: `smaug`, and what is changed | A6000-hours | share of the peak for 25 hours |", body)


def launch_table() -> str:
    body: list[list[object]] = []
    for size, vocabulary in (("tiny", 200), ("small", 30522), ("base", 30522)):
        for name in ("dense", "smaug"):
            body.append([size, f"`{name}`", *waits(load(name, size), partial(cost.parts, vocabulary=vocabulary))])
    return rows_of(
        "| prediction: size | step | ms to start its kernels | pairs from which the GPU takes longer | video tokens "
        "then | pairs from which products take longer than bytes |",
        body,
    )


def waits(recipe: Recipe, count: Count) -> list[str]:
    """When the host is slower than the GPU in forward and backward, and bytes than products; in the middle of a run."""
    seen = cost.video_tokens(recipe)
    host = cost.LAUNCH * cost.total(count(recipe, given(PAIRS)).values()).launches

    def hosted(pairs: int) -> bool:
        return sum(cost.computing(count(recipe, given(pairs)), A6000.device, Job())[:2]) < host

    def moving(pairs: int) -> bool:
        whole = cost.total(work for name, work in count(recipe, given(pairs)).items() if name != "optimiser")
        products = whole.step_flops / (A6000.device.flops * cost.EFFICIENCY)
        return products < (whole.bytes + whole.backward_bytes) / A6000.device.bandwidth

    pairs, bound = first(hosted), first(moving)
    tokens = pairs * seen.sequences * seen.rows[0]
    return [f"{1e3 * host:.0f}", f"{pairs}", f"{tokens:,}", f"{bound}" if bound < MOST else f"not of {MOST:,}"]


MOST = 4096


def first(holds: Callable[[int], bool]) -> int:
    """The least number of pairs at which it does not hold any more; MOST if that is not less."""
    low, high = 0, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def tables() -> dict[str, str]:
    return {
        "rows": rows_table(),
        "computes": computes_table(),
        "decoders": decoders_table(),
        "words": words_table(),
        "selector": selector_table(),
        "grid": grid_table(),
        "needed": needed_table(),
        "ways": ways_table(),
        "launch": launch_table(),
    }


# --- the page ---------------------------------------------------------------------------------------------------------

COLOURS = {
    "video blocks": "#4477aa", "pixel decoder": "#ee6677", "fusion encoder": "#228833", "text encoder": "#ccbb44",
    "other": "#bbbbbb",
}  # fmt: skip


def draw(path: Path) -> None:
    """Where the hours of each row go, as `rows` has them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install -c constraints.txt -e '.[plots]'") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [(name, counted(recipe, count)) for name, recipe, count, *_ in [YARDSTICK, *ROWS]]
    for y, (_, run) in enumerate(shown):
        parts = dict.fromkeys(COLOURS, 0.0)
        for share, one, works in run:
            for name, work in works.items():
                label = "fusion encoder" if name == "copies" else group(name).removeprefix("mvm: ")
                taken = share * sum(cost.computing({name: work}, A6000.device, Job()))
                parts[label if label in parts else "other"] += taken * SEEN / one.pairs / 3600
        left = 0.0
        for label, taken in parts.items():
            axes.barh(y, taken, left=left, color=COLOURS[label], label=None if y else label)
            left += taken
        axes.text(left + 1, y, f"{left:.0f}", va="center")
    axes.axvline(50, color="black", linestyle="--", linewidth=1)
    axes.text(50.5, -0.75, "SMAUG's abstract: about 50, of which corpus and epochs are not known", fontsize=8)
    axes.set_yticks(range(len(shown)), [name.replace("`", "") for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -1)
    axes.set_xlabel(
        f"A6000-hours of 5 M pairs x 10 epochs: a prediction at {cost.EFFICIENCY:.0%} of the peak "
        f"({', '.join(f'x {cost.EFFICIENCY / share:.1f} at {share:.0%}' for share in cost.RANGE)})"
    )
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


@dataclass(frozen=True)
class Options:
    page: Path = PAGE  # whose tables are renewed
    chart: Path = CHART  # where the picture goes


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        page, found = options.page.read_text(), tables()
        write(options.page, renewed(page, found))
        draw(options.chart)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
