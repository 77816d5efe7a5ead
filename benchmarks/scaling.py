"""The cost model's tables: what many GPUs would do, and how far the model is off where it can be checked.

    python -m benchmarks.scaling              # renews the tables of docs/scaling.md and docs/cost_on_cpu.png
    python -m benchmarks.scaling --measure    # first times steps on this machine, one thread, for the last table

Every table but those of what was measured is a prediction: arithmetic of smaug/cost.py on data sheets.
"""

from __future__ import annotations

import csv
import functools
import io
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from benchmarks.bench_train_step import VOCABULARY, batch_of
from benchmarks.timing import clock
from smaug import calibration, cost, device
from smaug.cost import BF16_CPU, CLUSTERS, FP32, RAW, REENCODED, Clips, Device, Job, Load, Work
from smaug.optim import Update
from smaug.recipe import Recipe, load
from smaug.run import build, refuse, write
from smaug.step import training_step

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/scaling.md", ROOT / "docs/cost_on_cpu.png"
MEASURED, CALIBRATED = (ROOT / f"benchmarks/results/cost_on_cpu{what}.csv" for what in ("", "_rates"))
THREADS = 1, 2  # that steps are timed with
BAND = 0.15  # median error that the model may have on this CPU
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Options:
    measure: bool = False  # time the steps again
    rounds: int = 5  # of the interleaved steps and calibrations; medians count
    seconds: float = 5.0  # of each calibration


# --- what is measured here --------------------------------------------------------------------------------------------


def configurations() -> dict[str, tuple[Recipe, int]]:
    """Name -> recipe and pairs."""
    smaug, mac = load("smaug"), load("mac")
    return {
        "dense, tiny, 32 pairs": (load("dense"), 32),
        "smaug, tiny, 32 pairs": (smaug, 32),
        "smaug, tiny, 128 pairs": (smaug, 128),
        "smaug, tiny, patches of 16": (with_video(smaug, patch=16), 64),
        "smaug, tiny, 16 frames": (with_video(smaug, frames=16), 32),
        "mac, tiny, 64 pairs": (mac, 64),
        "mac, tiny, 16 frames": (with_video(mac, frames=16), 32),
        "singularity, tiny, 64 pairs": (load("singularity"), 64),
        "retrieval, tiny, 32 pairs": (load("retrieval"), 32),
        "qa, tiny, 32 pairs": (load("qa"), 32),
        "mc, tiny, 16 pairs": (load("mc"), 16),
        "smaug, small, 2 pairs": (load("smaug", "small"), 2),
        "dense, small, 1 pair": (load("dense", "small"), 1),
        "mac, small, 2 pairs": (load("mac", "small"), 2),
        "singularity, small, 4 pairs": (load("singularity", "small"), 4),
    }


def with_video(recipe: Recipe, **changed: object) -> Recipe:
    return replace(recipe, model=replace(recipe.model, video=replace(recipe.model.video, **changed)))


def measure(options: Options) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Steps of all configurations, forward to AdamW, in bf16 where the processor has it, and the rates of as many
    calibrations, all interleaved, with one thread and with two. Each has a few steps at a time, the first of them not
    timed: a run repeats its step, and what the library has made for these shapes is there. Seconds of one thread are of
    the processor, since others use it too."""
    way = device.choose(True, "cpu")
    steps = {name: stepper(recipe, pairs, way) for name, (recipe, pairs) in configurations().items()}
    times: dict[tuple[int, str], list[float]] = {(count, name): [] for count in THREADS for name in steps}
    rates, machines = list[dict[str, object]](), dict[int, str]()
    for number in range(1, options.rounds + 1):
        for count in THREADS:
            torch.set_num_threads(count)
            machines[count] = device.describe(way.device)
            for name, step in steps.items():
                times[count, name] += [step() for _ in range(4)][1:]
            rates += [
                {
                    "threads": count, "calibration": number, "unit": unit, "forward": f"{there:.4g}",
                    "backward": f"{back:.4g}",
                }
                for unit, (there, back) in calibration.rates(way, options.seconds).items()
            ]  # fmt: skip
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    rows: list[dict[str, object]] = [
        {
            "threads": count, "configuration": name, "seconds": f"{median(took):.5f}", "least": f"{min(took):.5f}",
            "most": f"{max(took):.5f}", "dtype": str(way.dtype).removeprefix("torch."),
            "machine": machines[count], "date": time.strftime("%Y-%m-%d"),
        }
        for (count, name), took in times.items()
    ]  # fmt: skip
    return rows, rates


def stepper(recipe: Recipe, pairs: int, way: device.Way) -> Callable[[], float]:
    torch.manual_seed(0)
    model, batch = build(recipe, VOCABULARY, way.impl), batch_of(recipe, pairs, way.device)
    update = Update(model, recipe.optim)

    def step() -> float:
        now = clock(way.device)
        before = now()
        with way.autocast():
            loss = training_step(model, recipe, batch)[0]
        loss.backward()
        update(batch.step)
        return now() - before

    return step


# --- tables -----------------------------------------------------------------------------------------------------------

WORDS = 16.0  # of a caption, [CLS] and [SEP] included: an assumption for web captions
HIGH = cost.RANGE[0]
FAILURES = 419 / (54 * 24 * 16384)  # a GPU-hour: Llama 3 405B on H100, Grattafiori et al. 2024, section 3.3.4
RESTART = 300.0  # seconds from a failure to the first step: an assumption
EVERY = 600.0  # seconds between checkpoints
WRITE = 2e9  # bytes a second that checkpoints are written with: an assumption
# Of the list of clips that every process keeps: bytes a clip and rows a second, by read_manifest on 50,000 rows of 12
# words, one core of an AMD EPYC, 2026-11-28.
LISTED, LISTING = 656, 65e3


def rows_of(header: str, rows: list[list[object]]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 or seconds == 0 else f"{1e3 * seconds:.1f}"


def given(pairs: int, gpus: int = 1, **more: int) -> Load:
    return Load(pairs, words=WORDS, world=gpus, **more)


def group(name: str) -> str:
    """Parts that a table shows as one."""
    for start, shown in {
        "word embedding": "text encoder", "text block": "text encoder", "fusion": "fusion encoder",
        "video block": "video blocks", "temporal": "temporal layer", "mvm": "mvm: pixel decoder",
        "mlm vocabulary": "mlm: vocabulary", "patch": "patch embedding",
    }.items():  # fmt: skip
        if name.startswith(start):
            return shown
    return "other"


def parts_table() -> str:
    found: dict[str, list[Work]] = {}
    recipes = ("smaug", "dense", "singularity")
    for number, name in enumerate(recipes):
        for part, work in cost.parts(load(name, "base"), given(128)).items():
            found.setdefault(group(part), [Work()] * 3)[number] += work
    order = sorted(found, key=lambda shown: (shown == "other", -found[shown][0].step_flops))
    sums = [cost.total(found[shown][i] for shown in order) for i in range(3)]
    body = [[shown, *(cells(work, whole) for work, whole in zip(found[shown], sums, strict=True))] for shown in order]
    body.append(["**all**", *(cells(whole, whole) for whole in sums)])
    body.append(["of these, attention's products", *(f"{w.attention_flops / w.flops:.0%}" for w in sums)])
    body.append(["million weights", *(f"{w.weights / 1e6:.0f}" for w in sums)])
    return rows_of("| prediction: GFLOP of a pair (share); MB kept | " + " | ".join(recipes) + " |", body)


def cells(work: Work, whole: Work) -> str:
    flops = work.step_flops / 128e9
    return f"{flops:.1f} ({work.step_flops / whole.step_flops:.1%}); {work.saved / 128e6:.1f}" if work.weights else ""


def blocks_table() -> str:
    recipe = load("smaug", "base")
    each = given(128)
    counted, rows = cost.parts(recipe, each), cost.video_tokens(recipe).rows
    body: list[list[object]] = []
    for number in range(recipe.model.video.depth):
        work = counted[f"video block {number}"]
        body.append([number, rows[number], f"{work.step_flops / 128e9:.1f}", f"{work.saved / 128e6:.1f}"])
    return rows_of("| video block | tokens of a frame that enter | prediction: GFLOP of a pair | MB kept |", body)


def machines_table() -> str:
    body = [
        [
            name, f"{c.device.flops / 1e12:.0f}", f"{c.device.bandwidth / 1e9:,.0f}", f"{c.device.memory / 1e9:.0f}",
            f"{c.inside.name}, {c.inside.bandwidth / 1e9:.0f} GB/s x {c.inside.share}",
            f"{c.adapters} x {c.between.name} x {c.between.share}", c.cores, f"{c.storage / 1e9:.0f}",
        ]
        for name, c in CLUSTERS.items()
    ]  # fmt: skip
    return rows_of(
        "| GPU, 8 a machine | bf16 TFLOP/s | memory GB/s | GB | inside | between machines | cores | reads GB/s |", body
    )


def scaling_table(name: str, size: str, kind: str, pairs: Callable[[int], int], clips: Clips = REENCODED) -> str:
    recipe, cluster, alone = load(name, size), CLUSTERS[kind], 0.0
    body: list[list[object]] = []
    for gpus in COUNTS:
        if (each := pairs(gpus)) < 2:
            continue
        given_each = given(each, gpus)
        counted, job = cost.parts(recipe, given_each), Job(gpus)
        found = cost.step_time(counted, given_each, job, cluster, clips=clips)
        rate = gpus * each / found.step
        alone = alone or rate
        body.append(
            [
                gpus, each, *(ms(x) for x in (found.compute, found.gather, found.reduce, found.decode, found.storage)),
                f"**{ms(found.step)}**", f"{rate:,.0f}", f"{rate / alone / gpus:.0%}", found.limit,
                fits(needed(recipe, given_each, job), cluster.device),
            ]
        )  # fmt: skip
    return rows_of(
        f"| prediction: {kind} | pairs a GPU | compute ms | all-gather | all-reduce | decode | storage | step | "
        "clips/s | of linear | limit | GB |",
        body,
    )


def needed(recipe: Recipe, each: Load, job: Job) -> float:
    """Bytes of a GPU at the first step, when nothing is pruned yet."""
    return sum(cost.memory(cost.parts(recipe, replace(each, step=0)), job).values())


def fits(needed: float, gpu: Device) -> str:
    return f"{needed / 1e9:.0f}" + ("" if needed <= gpu.memory else f", has {gpu.memory / 1e9:.0f}")


def fixed(whole: int) -> Callable[[int], int]:
    return lambda gpus: whole // gpus


def memory_table() -> str:
    body: list[list[object]] = []
    for name, size in (("smaug", "base"), ("dense", "base"), ("smaug", "large")):
        for pairs in (32, 128, 256):
            counted = cost.parts(load(name, size), given(pairs, 8, step=0))
            row: list[object] = [f"`{name}`, {size}", pairs]
            for job in (Job(8), Job(8, shard=True), Job(8, checkpoint_blocks=True)):
                found = cost.memory(counted, job)
                state = sum(found[k] for k in ("weights", "gradients", "moments"))
                row.append(f"{sum(found.values()) / 1e9:.1f} ({state / 1e9:.1f} + {found['activations'] / 1e9:.1f})")
            body.append(row)
    return rows_of(
        "| prediction: GB of a GPU of 8 (state + activations) | pairs a GPU | DDP | FSDP2 | DDP, blocks run again |",
        body,
    )


def shard_table() -> str:
    body: list[list[object]] = []
    for size, kind in (("base", "A6000"), ("base", "A100-80"), ("large", "A6000"), ("large", "H100")):
        for gpus in (8, 64):
            each = given(64, gpus)
            counted = cost.parts(load("smaug", size), each)
            times = [cost.step_time(counted, each, Job(gpus, shard=s), CLUSTERS[kind]) for s in (False, True)]
            sizes = [needed(load("smaug", size), each, Job(gpus, shard=s)) / 1e9 for s in (False, True)]
            body.append(
                [f"{size}, {gpus} x {kind}", *(ms(t.gpu) for t in times), *(ms(t.gather + t.reduce) for t in times),
                 *(f"{x:.1f}" for x in sizes)]
            )  # fmt: skip
    return rows_of(
        "| prediction: `smaug`, 64 pairs a GPU | DDP ms | FSDP2 ms | waits, DDP | waits, FSDP2 | GB, DDP | GB, FSDP2 |",
        body,
    )


def traffic_table() -> str:
    body: list[list[object]] = []
    for size, gpus, shard in (("base", 8, False), ("base", 128, False), ("base", 128, True), ("large", 128, True)):
        each, job = given(128, gpus), Job(gpus, shard=shard)
        for name, talk in cost.collectives(cost.parts(load("smaug", size), each), each, job).items():
            how = f"{size}, {gpus} GPUs, {'FSDP2' if shard else 'DDP'}"
            seconds = [ms(talk.seconds(gpus, CLUSTERS[kind])) for kind in ("A6000", "A100-80", "H100")]
            body.append([how, name, talk.kind, f"{talk.count:.0f}", f"{talk.bytes / 1e6:,.0f}", *seconds])
    return rows_of(
        "| prediction: `smaug`, 128 pairs a GPU | what | how | how many | MB | A6000 ms | A100-80 ms | H100 ms |", body
    )


def feeding_table() -> str:
    """What keeps a machine of 8 GPUs busy."""
    body: list[list[object]] = []
    each = given(128, 8)
    counted = cost.parts(load("smaug", "base"), each)
    for kind, cluster in CLUSTERS.items():
        row: list[object] = [kind]
        for efficiency in (cost.EFFICIENCY, HIGH):
            rate = 8 * 128 / cost.step_time(counted, each, Job(8), cluster, efficiency=efficiency).gpu
            row += [
                f"{rate:,.0f}",
                *(f"{rate * clips.core_seconds:.0f}" for clips in (REENCODED, RAW)),
                f"{rate * REENCODED.bytes / 1e9:.1f}",
            ]
        body.append([*row, cluster.cores])
    return rows_of(
        f"| prediction: 8 GPUs | clips/s at {cost.EFFICIENCY:.0%} of the peak | cores, re-encoded | cores, as they "
        f"come | GB/s | clips/s at {HIGH:.0%} | cores, re-encoded | cores, as they come | GB/s | cores there are |",
        body,
    )


@dataclass(frozen=True)
class Stage:
    clips: float
    epochs: int
    size: str
    kind: str
    gpus: int
    pairs: int  # a GPU


PLAN = [
    Stage(5e6, 10, "base", "A6000", 1, 128),
    Stage(5e6, 10, "base", "A6000", 8, 128),
    Stage(25e6, 10, "base", "A100-80", 8, 128),
    Stage(100e6, 5, "base", "H100", 16, 256),
    Stage(100e6, 5, "large", "H100", 32, 128),
    Stage(1e9, 1, "large", "H100", 64, 128),
    Stage(1e9, 2, "large", "B200", 128, 128),
]


def hours(stage: Stage) -> tuple[list[float], dict[Clips, float]]:
    """Of a run over its whole schedule: of GPUs that never wait for clips, by share of the peak; and with clips of two
    kinds at the first of these."""
    recipe, job, cluster = load("smaug", stage.size), Job(stage.gpus), CLUSTERS[stage.kind]
    run = cost.stages(recipe, given(stage.pairs, stage.gpus))
    steps = stage.clips * stage.epochs / (stage.gpus * stage.pairs)

    def whole(of: str, efficiency: float = cost.EFFICIENCY, clips: Clips = REENCODED) -> float:
        times = (
            (share, cost.step_time(works, one, job, cluster, efficiency=efficiency, clips=clips))
            for share, one, works in run
        )
        return steps * sum(share * getattr(time, of) for share, time in times) / 3600

    fed = [whole("gpu", efficiency) for efficiency in (cost.EFFICIENCY, *cost.RANGE)]
    return fed, {clips: whole("step", clips=clips) for clips in (RAW, REENCODED)}


def plan_tables() -> dict[str, str]:
    """Time, and data."""
    time_rows: list[list[object]] = []
    data_rows: list[list[object]] = []
    for stage in PLAN:
        cluster, recipe = CLUSTERS[stage.kind], load("smaug", stage.size)
        (took, least, most), waiting = hours(stage)
        saved = 12 * cost.total(cost.parts(recipe, given(stage.pairs)).values()).weights  # with both moments, fp32
        rate = stage.clips * stage.epochs / took / 3600
        failures = FAILURES * took * stage.gpus
        machines, inside = -(-stage.gpus // cluster.per_machine), min(stage.gpus, cluster.per_machine)
        what = f"{stage.clips / 1e6:,.0f} M x {stage.epochs}"
        time_rows.append(
            [
                what, stage.size, f"{stage.gpus} x {stage.kind}", f"{stage.gpus * stage.pairs:,}",
                f"**{took:,.0f}** ({least:,.0f} to {most:,.0f})", f"{took * stage.gpus:,.0f}",
                *(f"{waiting[clips]:,.0f}" for clips in (REENCODED, RAW)), f"{saved / 1e9:.1f}; {saved / WRITE:.0f}",
                f"{failures:.3f}; {failures * (EVERY / 2 + RESTART) / 60:.1f}",
            ]
        )  # fmt: skip
        data_rows.append(
            [
                what, f"{stage.gpus} x {stage.kind}", f"{rate:,.0f}",
                *(f"{rate * clips.core_seconds:,.0f}" for clips in (REENCODED, RAW)),
                f"{machines * inside / cluster.per_machine * cluster.cores:,.0f}",
                f"{stage.clips * REENCODED.prepare / 3600:,.0f}",
                *(f"{stage.clips * clips.bytes / 1e12:,.1f}" for clips in (REENCODED, RAW)),
                f"{rate * REENCODED.bytes / 1e9:.1f}", f"{LISTED * stage.clips * inside / 1e9:,.0f}",
                f"{stage.clips / LISTING / 60:,.0f}",
            ]
        )  # fmt: skip
    return {
        "plan": rows_of(
            "| prediction: clips x epochs | size | GPUs | batch | hours, fed (range) | GPU-hours | hours, re-encoded | "
            "hours, as they come | checkpoint GB; s | failures; minutes lost |",
            time_rows,
        ),
        "data": rows_of(
            "| prediction: clips x epochs | GPUs | clips/s, fed | cores, re-encoded | cores, as they come | cores "
            "there are | core-hours to re-encode | TB, re-encoded | TB, as they come | GB/s, re-encoded | list: GB a "
            "machine | list: minutes |",
            data_rows,
        ),
    }


# Hours that others have published, and what our count of FLOPs then says of the share of the peak that they reached.
# (whose, recipe, words of a caption, clips seen, GPU-hours, device). Singularity: 3 A100 for about a day (its README),
# captions padded to 32; SMAUG: 50 A6000-hours (its abstract).
PUBLISHED = [
    ("Singularity, 5 M x 10 epochs", "singularity", 32, 5e6 * 10, 72, "A100-80"),
    ("SMAUG, if 5 M x 10 epochs of this project's recipe", "smaug", WORDS, 5e6 * 10, 50, "A6000"),
]


def published_table() -> str:
    body: list[list[object]] = []
    for whose, name, words, seen, taken, kind in PUBLISHED:
        recipe = load(name, "base")
        run = cost.stages(recipe, replace(given(128), words=float(words)))
        mean = sum(share * cost.total(works.values()).step_flops for share, _, works in run) / 128
        reached = mean * seen / (taken * 3600)
        peak = CLUSTERS[kind].device.flops
        body.append(
            [whose, f"{taken} {kind}-hours", f"{seen / taken / 3600:.0f}", f"{mean / 1e9:.0f}",
             f"{reached / 1e12:.0f} TFLOP/s", f"**{reached / peak:.0%}**"]
        )  # fmt: skip
    return rows_of("| published | cost | pairs/s of a GPU | GFLOP of a pair | reached | of the peak |", body)


# --- the model against this machine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A configuration as it was measured and as it is told; seconds."""

    row: dict[str, str]
    work: Work
    predicted: float  # with the medians of all calibrations
    single: tuple[float, ...]  # with each of them alone, as a user has it

    @property
    def seconds(self) -> float:
        return float(self.row["seconds"])

    @property
    def error(self) -> float:
        return self.predicted / self.seconds - 1


@functools.cache  # each is held against several thread counts
def counted_here(name: str, dtype: str) -> Work:
    recipe, pairs = configurations()[name]
    batch = batch_of(recipe, pairs, torch.device("cpu"))
    words, masked = batch.words, 0 if batch.masked is None else len(batch.masked_rows)
    load = Load(pairs, words=words.rows / words.num_sequences, masked=masked / pairs)
    precision = BF16_CPU if dtype == "bfloat16" else FP32
    return cost.total(cost.parts(recipe, load, vocabulary=VOCABULARY, precision=precision).values())


def kept(path: Path, threads: int) -> list[dict[str, str]]:
    return [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("threads") == str(threads)]


def calibrations(threads: int) -> list[dict[str, tuple[float, float]]]:
    """Those that are kept, each by unit; before them their medians."""
    single: dict[str, dict[str, tuple[float, float]]] = {}
    for row in kept(CALIBRATED, threads):
        single.setdefault(row["calibration"], {})[row["unit"]] = float(row["forward"]), float(row["backward"])
    if not single:
        raise ValueError(f"{CALIBRATED} has nothing of {threads} threads; run with --measure")
    each = list(single.values())
    return [{u: (median(one[u][0] for one in each), median(one[u][1] for one in each)) for u in each[0]}, *each]


def points(threads: int) -> list[Point]:
    """What was measured here, beside what the model makes of the rates of the same hour."""
    rows, rates = kept(MEASURED, threads), calibrations(threads)
    if {row.get("configuration") for row in rows} != configurations().keys():
        raise ValueError(f"{MEASURED} does not have the steps of `configurations`; run with --measure")
    found = []
    for row in rows:
        work = counted_here(row["configuration"], row["dtype"])
        told, *each = (sum(cost.calibrated(work, one)) for one in rates)
        found.append(Point(row, work, told, tuple(each)))
    return found


def median_error(found: list[Point]) -> float:
    return median(abs(point.error) for point in found)


def ms_range(seconds: float, each: Iterable[float]) -> str:
    each = list(each)
    return f"{1e3 * seconds:.0f} ({1e3 * min(each):.0f} to {1e3 * max(each):.0f})"


def cpu_table(found: list[Point]) -> str:
    body: list[list[object]] = [
        [
            point.row["configuration"], f"{point.work.step_flops / 1e9:.1f}", f"{point.work.launches:.0f}",
            ms_range(point.seconds, (float(point.row["least"]), float(point.row["most"]))),
            ms_range(point.predicted, point.single), f"{point.error:+.0%}",
        ]
        for point in found
    ]  # fmt: skip
    table = rows_of(
        "| step | GFLOP | operations | measured ms (range) | prediction ms (by single calibrations) | off by |", body
    )
    row = found[0].row
    off = [median(abs(point.single[i] / point.seconds - 1) for point in found) for i in range(len(found[0].single))]
    said = (
        f"Measured {row['date']} on {row['machine']}; {row['dtype']}. **Median error {median_error(found):.0%}, at "
        f"most {max(abs(point.error) for point in found):.0%}** with the medians of {len(off)} calibrations; with a "
        f"single one the median error is {min(off):.0%} to {max(off):.0%}."
    )
    return f"{table}\n\n{said}"


UNITS = {
    "launch": "an operation, whatever it does, when something else has used the cache",
    "moved": "a byte of rows that are picked, or added in the backward",
    "sum": "a number of x + y",
    "gelu": "a number",
    "norm": "a number of a LayerNorm",
    "weight": "a weight that is cast to bf16, and its gradient that is cast back",
    "product": "a FLOP of a linear layer, by the narrower side of its weight",
    "pixel": "a pixel's channel, from uint8 to what is embedded or rebuilt",
    "attention": "a call",
    "attention 32": "a row and head of width 32, by the keys it looks at",
    "attention 64": "a row and head of width 64",
    "key": "a number of keys that are picked for a text, and as many of values",
    "adamw": "a weight, with the norm of all gradients",
}


def nanoseconds(seconds: float) -> str:
    return f"{1e9 * seconds:,.0f}" if seconds > 1e-7 else f"{1e9 * seconds:.3g}"


def rates_table() -> str:
    """Units of one kind stand in one row."""
    kinds: dict[str, dict[str, tuple[float, float]]] = {}
    for unit, rate in calibrations(1)[0].items():
        kind, _, size = unit.partition(" x ") if " x " in unit else unit.partition(" ")
        kinds.setdefault(kind, {})[size] = rate
    body: list[list[object]] = [
        [
            kind, UNITS[kind], ", ".join(sizes) if len(sizes) > 1 else "",
            *(", ".join(nanoseconds(rate[i]) for rate in sizes.values()) for i in (0, 1)),
        ]
        for kind, sizes in kinds.items()
    ]  # fmt: skip
    return rows_of("| unit | what one is | at | forward ns | backward ns |", body)


def draw(found: dict[int, list[Point]], path: Path) -> None:
    """Predicted against measured, and the band that the model has to keep in the median."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install -c constraints.txt -e '.[plots]'") from None
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    for axes, (threads, some) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        _draw(axes, threads, some)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, threads: int, found: list[Point]) -> None:
    each = [1e3 * x for point in found for x in (point.seconds, point.predicted)]
    line = [min(each) / 2, max(each) * 2]
    ticks = [x for x in (digit * 10**power for power in range(5) for digit in (1, 2, 5)) if line[0] <= x <= line[1]]
    axes.plot(line, line, color="0.5", linewidth=1)
    low, high = ([(1 + off) * x for x in line] for off in (-BAND, BAND))
    axes.fill_between(line, low, high, color="0.9", label=f"within {BAND:.0%}")
    for place, point in enumerate(sorted(found, key=lambda point: point.seconds)):
        recipe, size, load = point.row["configuration"].split(", ")
        x, y = 1e3 * point.seconds, 1e3 * point.predicted
        across = [1e3 * float(point.row[end]) for end in ("least", "most")]
        up = [1e3 * min(point.single), 1e3 * max(point.single)]
        color = {"tiny": "C0", "small": "C1"}[size]
        axes.plot(across, (y, y), (x, x), up, color=color, linewidth=0.8)
        axes.plot(x, y, "o", color=color, markersize=4)
        right = place % 2 == 1
        axes.annotate(
            f"{recipe}, {load}", (x, y), fontsize=7, color="0.25", textcoords="offset points",
            xytext=(10, -11) if right else (-10, 7), ha="left" if right else "right",
        )  # fmt: skip
    for size, color in (("tiny", "C0"), ("small", "C1")):
        axes.plot([], [], "o", color=color, markersize=4, label=f"size {size}")
    machine, date = found[0].row["machine"].split(",")[0], found[0].row["date"]
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line, aspect="equal")
    axes.set(title=f"A training step: cost model and {machine}, {threads} thread{'s' * (threads > 1)}, {date}")
    axes.set(xlabel="measured, ms (bar: range of steps)", ylabel="predicted, ms (bar: range of calibrations)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(loc="upper left", frameon=False)


def tables() -> dict[str, str]:
    return {
        "parts": parts_table(),
        "blocks": blocks_table(),
        "machines": machines_table(),
        "weak": "\n\n".join(scaling_table("smaug", "base", k, lambda _: 128) for k in ("A6000", "A100-80", "H100")),
        "strong": "\n\n".join(
            scaling_table("smaug", "base", kind, fixed(1024)) for kind in ("4090", "A6000", "A100-80", "H100")
        ),
        "traffic": traffic_table(),
        "feeding": feeding_table(),
        "memory": memory_table(),
        "shard": shard_table(),
        **plan_tables(),
        "published": published_table(),
        **{f"cpu {count}": cpu_table(points(count)) for count in THREADS},
        "rates": rates_table(),
    }


def renewed(page: str, found: dict[str, str]) -> str:
    """The page with each table between `<!-- table NAME -->` and `<!-- end -->` in its place."""
    for name, table in found.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page needs one '<!-- table {name} -->' with its '<!-- end -->' behind it")
        page = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
    return page


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        if options.rounds < 1 or options.seconds <= 0:
            raise ValueError("--rounds must be at least 1, --seconds above 0")
        if options.measure:
            for path, rows in zip((MEASURED, CALIBRATED), measure(options), strict=True):
                lines = io.StringIO()
                writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                write(path, lines.getvalue())
        found = tables()
        write(PAGE, renewed(PAGE.read_text(), found))
        draw({count: points(count) for count in THREADS}, PICTURE)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
