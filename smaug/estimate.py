"""What a run would cost, before it is begun: GPU-hours of a recipe and of its dense baseline on a named device.

    python -m smaug.estimate                                     # the default recipe, base, 5 M pairs, on an A6000
    python -m smaug.estimate RECIPE --size base --gpu a6000 --pairs 5e6 --epochs 10
    python -m smaug.estimate RECIPE --gpu all                    # a line for each device; cpu: this machine
    python -m smaug.estimate RECIPE --gpu a100 --gpus 8 --data.batch 1024 --json - --html page.html

All of it is arithmetic of smaug/cost.py, which nobody has measured on a GPU. No model is built, no data are read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import torch
import tyro
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from smaug import cost
from smaug import device as devices
from smaug import recipe as recipes
from smaug.cost import CLUSTERS, IB200, PCIE4, RANGE, Cluster, Device, Job, Load, Stage, Work
from smaug.model.model import SIZES
from smaug.objectives.answer import Answer
from smaug.objectives.mc import Mc
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.recipe import Recipe
from smaug.run import refuse, warn, write
from smaug.train import DEFAULT_RECIPE

PREDICTION = "PREDICTION, from counted FLOPs and bytes: nobody measured it."
LIKE = {"3090": "4090", "A100-40": "A100-80", "H200": "H100"}  # whose machine is taken; of other GPUs an A6000's
CLIPS = {"reencoded": cost.REENCODED, "raw": cost.RAW}


@dataclass(frozen=True)
class Options:
    """A run to be predicted. Everything of the recipe can be changed by a flag of its own."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    gpu: tuple[str, ...] = ("a6000",)  # one or several; all: those of docs/scaling.md; cpu: this machine, calibrated
    gpus: int = 1  # they share the batch
    shard: bool = False  # each GPU holds a part of the weights (FSDP2), not all (DDP)
    pairs: float = 5e6  # of the corpus
    epochs: float = 10  # over it
    words: float = 16  # of a caption, [CLS] and [SEP] included; a mean
    clips: Literal["reencoded", "raw"] = "reencoded"  # as `smaug.data reencode` leaves them, or as they come
    efficiency: float = cost.EFFICIENCY  # share of a GPU's peak that products reach
    checkpoint_blocks: bool = False  # blocks are computed again in the backward, for much less memory
    json: str = ""  # file for the numbers, of several devices a list; -: they are printed instead of the table
    html: str = ""  # file for a page with charts

    def check(self) -> None:
        if not (0 < self.pairs < math.inf and 0 < self.epochs < math.inf):
            raise ValueError(f"--pairs and --epochs must be above 0, not {self.pairs:g} and {self.epochs:g}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"--efficiency is a share of the peak, above 0 and at most 1, not {self.efficiency:g}")
        most = self.recipe.model.text.max_words
        if not 1 <= self.words <= most:
            raise ValueError(f"--words must be 1 to {most}, where captions are cut (--model.text.max-words)")
        if self.shard and self.job.gpus == 1:
            raise ValueError("--shard shares the weights among GPUs: say among how many by --gpus")
        if self.batch % self.job.gpus:
            raise ValueError(
                f"a batch of {self.batch} pairs (--data.batch) cannot be shared equally by {self.gpus} GPUs"
            )
        for flag, file in (("json", self.json), ("html", self.html)):  # said before the work, not after it
            path = Path(file).absolute()
            if not path.parent.is_dir():
                raise ValueError(f"--{flag} {file}: there is no folder {Path(file).parent}")
            if file and path.exists() and not path.is_file():  # writing would put a file in its place
                raise ValueError(f"--{flag} {file} is there already, and is no file")

    @property
    def job(self) -> Job:
        return Job(self.gpus, self.shard, self.checkpoint_blocks)

    @property
    def batch(self) -> int:
        """Of all GPUs."""
        return min(self.recipe.data.batch, math.ceil(self.pairs))

    @property
    def steps(self) -> float:
        return self.pairs * self.epochs / self.batch


def parse(arguments: list[str]) -> tuple[Options, str]:
    """Recipe and size come first, as they decide the defaults."""
    named = bool(arguments) and not arguments[0].startswith("-")
    first = argparse.ArgumentParser(prog="python -m smaug.estimate", add_help=False, allow_abbrev=False)
    first.add_argument("--size", default="base")
    given, rest = first.parse_known_args(arguments[named:])
    options = tyro.cli(
        Options,
        prog=f"python -m smaug.estimate [{'|'.join(recipes.names())}] [--size {'|'.join(SIZES)}]",
        description=__doc__,
        args=rest,
        default=Options(recipes.load(arguments[0] if named else DEFAULT_RECIPE, given.size)),
        config=(tyro.conf.AvoidSubcommands,),
    )
    options.check()
    return options, given.size


# --- what is computed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A device and what stands around it."""

    name: str
    cluster: Cluster
    precision: cost.Precision
    clips: cost.Clips
    efficiency: float
    launch: float  # seconds of the host for a kernel
    rates: str  # for people
    measured: bool  # now, on this machine; else rates are of a data sheet


def machines(options: Options) -> list[Machine]:
    found = []
    for name in [name for asked in options.gpu for name in (CLUSTERS if asked == "all" else [asked])]:
        if name.lower() == "cpu":
            found.append(this_machine(options))
            continue
        device = cost.find_device(name)
        around = device.name if device.name in CLUSTERS else LIKE.get(device.name, "A6000")
        cluster = replace(CLUSTERS[around], device=device)
        rates = (
            "A part takes the longer of what its FLOPs and its bytes need (roofline). "
            f"Products reach {options.efficiency:.0%} of the {device.flops / 1e12:.0f} TFLOP/s of the data sheet "
            f"(dense bf16): a guess, as {RANGE[1]:.0%} to {RANGE[0]:.0%} is most of what is published for training, "
            "and some is 5%. Memory reaches its "
            f"{device.bandwidth / 1e9:,.0f} GB/s. The host takes {1e6 * cost.LAUNCH:.0f} us to start a kernel."
        )
        clips = CLIPS[options.clips]
        found.append(
            Machine(device.name, cluster, cost.BF16_GPU, clips, options.efficiency, cost.LAUNCH, rates, measured=False)
        )
    return found


def this_machine(options: Options) -> Machine:
    """The CPU, calibrated now. Its rates are measured, so there is no share of a peak."""
    if options.gpus > 1:
        raise ValueError("--gpu cpu is this machine alone; leave --gpus out")
    way = devices.choose(True, "cpu")
    device = cost.calibrate(way)
    rates = (
        "Operations run one after the other and take what they took in a few seconds just now; products reached "
        f"{device.flops / 1e9:,.0f} GFLOP/s, a copy {device.bandwidth / 1e9:.0f} GB/s. Clips are decoded already. "
        f"What else the machine does is in it: {devices.describe(way.device)}."
    )
    cluster = Cluster(device, PCIE4, IB200, adapters=1, cores=1, storage=1.0, per_machine=1)  # nothing waits for these
    precision, clips = cost.FP32 if way.dtype is torch.float32 else cost.BF16_CPU, cost.Clips("decoded", 0.0, 0.0)
    return Machine("CPU", cluster, precision, clips, 1.0, 0.0, rates, measured=True)


@dataclass
class Row:
    """A part of a step; a mean over the run."""

    flops: float = 0.0  # of a pair, forward and backward
    bytes: float = 0.0  # of a pair, moved at least
    bound: dict[str, float] = field(default_factory=dict)  # seconds of a step, by what they are bound by

    def add(self, other: Row, share: float = 1.0) -> None:
        self.flops += share * other.flops
        self.bytes += share * other.bytes
        for by, seconds in other.bound.items():
            self.bound[by] = self.bound.get(by, 0.0) + share * seconds

    @property
    def seconds(self) -> float:
        return sum(self.bound.values())

    @property
    def most(self) -> str:
        """What binds it for the most of its time."""
        return max(self.bound, key=self.bound.__getitem__, default="")


@dataclass(frozen=True)
class Side:
    """What a recipe costs on a machine: one side of the table, whose other is the dense baseline."""

    rows: dict[str, Row]  # in the order of the forward, then what a step waits for
    memory: float  # bytes of a GPU, at most
    weights: float
    tokens: list[float]  # of a clip, that enter each video block

    @property
    def whole(self) -> Row:
        """A step; its bytes are those of memory, not of links."""
        whole = Row()
        for row in self.rows.values():
            whole.add(replace(row, bytes=0.0) if "links" in row.bound else row)
        whole.bound = dict(sorted(whole.bound.items(), key=lambda item: -item[1]))
        return whole


def stages(recipe: Recipe, options: Options, precision: cost.Precision) -> list[Stage]:
    """Of the run that is asked for, of one GPU."""
    load = Load(options.batch // options.gpus, words=options.words, world=options.gpus)
    count = partial(cost.parts, vocabulary=vocabulary(recipe), precision=precision)
    return cost.stages(recipe, load, count)


def side(recipe: Recipe, counted: list[Stage], job: Job, machine: Machine) -> Side:
    rows, memory, weights, tokens = defaultdict[str, Row](Row), 0.0, 0.0, [0.0] * recipe.model.video.depth
    for stage in counted:
        for name, row in spent(stage, recipe, job, machine):
            rows[name].add(row, stage.share)
        held = cost.memory(stage.counted, job)
        memory = max(memory, sum(held.values()) - machine.measured * held["context"])  # a CPU has none
        weights = cost.total(stage.counted.values()).weights
        seen = cost.video_tokens(recipe, stage.load.step)
        tokens = [m + stage.share * (seen.sequences * n) for m, n in zip(tokens, seen.rows[:-1], strict=True)]
    return Side(dict(rows), memory, weights, tokens)


def spent(stage: Stage, recipe: Recipe, job: Job, machine: Machine) -> Iterator[tuple[str, Row]]:
    """What a step spends, as rows of the table."""
    load, counted, computing = stage.load, stage.counted, 0.0
    for name, work in counted.items():
        bound = bounds(name, work, job, machine)
        computing += sum(bound.values())
        moved = (work.bytes + work.backward_bytes) / load.pairs
        yield row_of(name, recipe), Row(work.step_flops / load.pairs, moved, bound)
    embed_dim = next((o.embed_dim for o in recipe.objectives.values() if isinstance(o, Vtc)), 0)
    step = cost.step_time(
        counted, load, job, machine.cluster, clips=machine.clips, efficiency=machine.efficiency, launch=machine.launch,
        embed_dim=embed_dim,
    )  # fmt: skip
    if step.compute > 1.000001 * computing:  # more than rounding leaves
        yield "wait: host", Row(bound={"host": step.compute - computing})
    if talks := cost.collectives(counted, load, job, embed_dim):
        gradients = talks.pop("gradients").bytes / load.pairs
        yield "gradient traffic", Row(bytes=gradients, bound={"links": step.reduce})
        gathered = sum(talk.bytes for talk in talks.values()) / load.pairs
        yield "gathering", Row(bytes=gathered, bound={"links": step.gather})
    if step.step > step.gpu:
        yield "wait: clips", Row(bound={step.limit: step.step - step.gpu})


def bounds(name: str, work: Work, job: Job, machine: Machine) -> dict[str, float]:
    """Seconds of a part by what it is bound by: the roof that it meets, or on a calibrated device what they are of."""
    device = machine.cluster.device

    def takes(on: Device) -> float:
        return sum(cost.computing({name: work}, on, job, machine.efficiency))

    if not device.rates:
        products, memory = takes(replace(device, bandwidth=math.inf)), takes(replace(device, flops=math.inf))
        return {"compute" if products >= memory else "memory": takes(device)}
    found = defaultdict[str, float](float)
    for unit, count in cost.amounts(work).items():
        kind = "host" if unit in ("launch", "attention") else "memory"  # what it takes to start an operation
        kind = "compute" if unit.startswith(("product ", "attention ")) else kind
        found[kind] += count * sum(device.rates.get(unit, ()))
    return {kind: takes(device) * seconds / sum(found.values()) for kind, seconds in found.items() if seconds}


def row_of(part: str, recipe: Recipe) -> str:
    """The row of the table that a part of `cost.parts` belongs to."""
    for start, row in {
        "patch": "patch embedding", "video": "video blocks", "temporal": "video blocks", "word": "text encoder",
        "text": "text encoder", "fusion": "fusion encoder", "frame": "frame selector", "optimiser": "optimiser",
    }.items():  # fmt: skip
        if part.startswith(start):
            return row
    objective = recipe.objectives[next(name for name in recipe.objectives if part.startswith(f"{name} "))]
    decodes = isinstance(objective, Mvm) or (isinstance(objective, Answer) and objective.by == "decoder")
    return "decoder" if decodes else "heads, losses"


def vocabulary(recipe: Recipe) -> int:
    return 30522 if recipe.model.text.start else recipe.data.vocabulary  # BERT's


@dataclass(frozen=True)
class Estimate:
    options: Options
    size: str
    machine: Machine
    this: Side
    dense: Side
    range: tuple[float, float] | None  # GPU-hours at the shares of RANGE; none where rates are measured

    def hours(self, seconds: float) -> float:
        """GPU-hours of a run, of seconds of a step."""
        return seconds * self.options.steps * self.options.gpus / 3600

    @property
    def ratio(self) -> float:
        return self.dense.whole.seconds / self.this.whole.seconds

    def share(self, part: str) -> float:
        """Of the hours."""
        return self.this.rows.get(part, Row()).seconds / self.this.whole.seconds

    def json(self) -> dict[str, Any]:
        """FLOPs, bytes, seconds. `parts` are of a pair but for their hours; `gpu_hours` and `flops` are of the run."""
        options, this, dense, pairs = self.options, self.this, self.dense, self.options.pairs * self.options.epochs

        def parts(of: Side) -> dict[str, Any]:
            return {
                name: {"flops": row.flops, "bytes": row.bytes, "bound": row.most, "gpu_hours": self.hours(row.seconds)}
                for name, row in of.rows.items()
            }

        return {
            "what": PREDICTION,
            "recipe": options.recipe.name,
            "size": self.size,
            "device": self.machine.name,
            "gpus": options.gpus,
            "pairs": options.pairs,
            "epochs": options.epochs,
            "batch": options.batch,
            "efficiency": None if self.machine.measured else self.machine.efficiency,
            "gpu_hours": self.hours(this.whole.seconds),
            "range": self.range,
            "dense_gpu_hours": self.hours(dense.whole.seconds),
            "ratio": self.ratio,
            "hours": self.hours(this.whole.seconds) / options.gpus,
            "flops": this.whole.flops * pairs,
            "dense_flops": dense.whole.flops * pairs,
            "seconds_per_step": this.whole.seconds,
            "clips_per_second": options.batch / this.whole.seconds,
            "bound": {by: seconds / this.whole.seconds for by, seconds in this.whole.bound.items()},
            "memory_bytes": this.memory,
            "dense_memory_bytes": dense.memory,
            "device_memory_bytes": self.machine.cluster.device.memory,
            "weights": this.weights,
            "parts": parts(this),
            "dense_parts": parts(dense),
            "tokens_by_block": this.tokens,
            "dense_tokens_by_block": dense.tokens,
            "assumptions": assumptions(self),
        }


def estimate(options: Options, size: str, machine: Machine) -> Estimate:
    job, both = options.job, (options.recipe, cost.dense(options.recipe))
    counted = [stages(recipe, options, machine.precision) for recipe in both]
    this, dense = (side(recipe, each, job, machine) for recipe, each in zip(both, counted, strict=True))
    found = Estimate(options, size, machine, this, dense, range=None)
    if machine.measured:
        return found
    ends = (side(options.recipe, counted[0], job, replace(machine, efficiency=share)) for share in RANGE)
    least, most = (found.hours(end.whole.seconds) for end in ends)
    return replace(found, range=(least, most))


def assumptions(found: Estimate) -> list[str]:
    """What the numbers stand on, for people."""
    options, recipe, cluster, clips = found.options, found.options.recipe, found.machine.cluster, found.machine.clips
    video = recipe.model.video
    said = [
        "FLOPs are those of matrix products, forward and backward. Bytes are the least: each operation reads and "
        "writes everything once.",
        found.machine.rates,
        f"{options.pairs:,.0f} pairs x {options.epochs:g} epochs are {options.steps:,.0f} steps of {options.batch}; "
        "numbers are means over all of them.",
        f"Every pair is a video, of {video.frames} frame{'s' * (video.frames > 1)} of {video.image_size} pixels, and "
        f"{options.words:g} words, [CLS] and [SEP] included, of a vocabulary of {vocabulary(recipe):,}.",
    ]
    if clips.core_seconds:
        said.append(
            f"Clips lie on disk {clips.name}. To decode one takes {1e3 * clips.core_seconds:.0f} ms of a core, "
            f"measured on another machine; a GPU has {cluster.cores / cluster.per_machine:g} cores."
        )
    for objective in recipe.objectives.values():
        if isinstance(objective, Mc):
            said.append(f"A question has {Load(1).options} options.")
        if isinstance(objective, Answer) and objective.by == "decoder":
            said.append(f"An answer is spelled in {Load(1).beginnings:g} steps.")
    if options.gpus > 1:
        said.append(
            f"{cluster.per_machine} GPUs share a machine, at {cluster.inside.share:.0%} of {cluster.inside.name}; "
            f"machines talk at {cluster.between.share:.0%} of {cluster.adapters} x {cluster.between.name}. What is "
            "sent while a GPU computes does not slow it down."
        )
    if options.checkpoint_blocks:
        said.append("Blocks are computed again in the backward: that is in the hours, not in FLOPs and bytes.")
    return [
        *said,
        "Dense is the same recipe with every patch, word and frame in it and no pixel decoder, on as many clips. Which "
        "score either reaches is not said here.",
        "Memory is that at the end of the forward, without what the allocator loses.",
        "Evaluation, checkpoints and failures are left out.",
    ]


def too_large(found: Estimate) -> list[str]:
    """Why it does not fit and what would, for people; nothing if it fits."""
    options, machine, room = found.options, found.machine, found.machine.cluster.device.memory

    def needs(**changed: Any) -> float:
        now = replace(options, **changed)
        return side(now.recipe, stages(now.recipe, now, machine.precision), now.job, machine).memory

    if found.this.memory <= room:
        return []
    said = f"a step needs {number(found.this.memory / 1e9)} GB, and {machine.name} has {room / 1e9:.0f}"
    if not options.checkpoint_blocks:
        said += f"; with --checkpoint-blocks it needs {number(needs(checkpoint_blocks=True) / 1e9)}"
    pairs = options.batch // options.gpus
    while pairs > 1 and needs(pairs=pairs * options.gpus) > room:
        pairs //= 2
    fits = f"--data.batch {pairs * options.gpus} fits"
    return [f"{said}; {fits if needs(pairs=pairs * options.gpus) <= room else 'not even one pair fits'}"]


# --- what is shown ----------------------------------------------------------------------------------------------------


COLUMNS = ("GFLOP", "MB", "bound", "hours")  # the first two of a pair


def parts_of(found: Estimate) -> list[str]:
    """Rows of the table."""
    return list(dict.fromkeys([*found.this.rows, *found.dense.rows]))


def cells(found: Estimate, row: Row | None) -> list[str]:
    """COLUMNS of a row; empty where a recipe lacks it."""
    if row is None:
        return [""] * len(COLUMNS)
    return [number(row.flops / 1e9), number(row.bytes / 1e6), row.most, number(found.hours(row.seconds))]


def number(x: float) -> str:
    """Three digits, or all before the point; empty for nothing."""
    if x == 0:
        return ""
    if x < 0.001:
        return f"{x:.1g}"
    digits = 0 if x >= 99.95 else 1 if x >= 9.995 else 2 if x >= 0.9995 else 3
    return f"{x:,.{digits}f}"


def summary(found: Estimate) -> list[tuple[str, str]]:
    """What is said beside the table, for people."""
    options, name, room = found.options, found.machine.name, found.machine.cluster.device.memory
    sides, steps = (found.this, found.dense), [found.this.whole, found.dense.whole]
    hours, dense_hours = (found.hours(step.seconds) for step in steps)
    each = ""
    if options.gpus > 1:
        each = f", {number(hours / options.gpus)} hours on {options.gpus} of them"
    elif hours < 1:
        each = f" ({number(60 * hours)} minutes)"
    said = [
        ("cost", f"{number(hours)} {name}-hours{each}; dense {number(dense_hours)}; dense / this {found.ratio:.2f}x")
    ]
    if found.range:
        ends = [f"{number(x)} at {share:.0%}" for x, share in zip(found.range, RANGE, strict=True)]
        said.append(("range", f"{' of the peak, '.join(ends)}; {number(hours)} is at {found.machine.efficiency:.0%}"))
    speeds = [f"{number(options.batch / s.seconds)} clips/s, {number(1e3 * s.seconds)} ms a step" for s in steps]
    limits = [", ".join(f"{by} {seconds / s.seconds:.0%}" for by, seconds in s.bound.items()) for s in steps]
    sizes = [
        f"{number(s.memory / 1e9)} of {room / 1e9:.0f} GB, {'fits' if s.memory <= room else 'does not fit'}"
        for s in sides
    ]
    both = (("speed", speeds), ("bound by", limits), ("memory", sizes))
    return said + [(what, "; dense ".join(words)) for what, words in both]


def title(found: Estimate) -> str:
    options, weights = found.options, found.this.weights / 1e6
    return (
        f"{options.recipe.name}, size {found.size}, {number(weights)} M weights; {options.pairs:,.0f} pairs x "
        f"{options.epochs:g} epochs, {options.batch} a step"
    )


def show(found: Estimate, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_footer=True)
    table.add_column("GFLOP and MB\nof a pair", "all", no_wrap=True)
    for name, total in zip(COLUMNS, cells(found, found.this.whole), strict=True):
        table.add_column(name, total, vertical="bottom", justify="left" if name == "bound" else "right", no_wrap=True)
    table.add_column("share", vertical="bottom", justify="right", no_wrap=True)
    table.add_column("")
    # What binds the baseline is left to the page: it is nearly always the same, and a terminal is narrow.
    for name, total in zip(COLUMNS, cells(found, found.dense.whole), strict=True):
        if name != "bound":
            table.add_column(f"dense\n{name}", total, justify="right", no_wrap=True)
    for part in parts_of(found):
        share, (gflop, mb, _, hours) = found.share(part), cells(found, found.dense.rows.get(part))
        this = cells(found, found.this.rows.get(part))
        table.add_row(part, *this, f"{share:.0%}", Bar(1, 0, share, width=10), gflop, mb, hours)
    sentences = Table.grid(padding=(0, 2, 0, 0))
    for what, sentence in [*summary(found), *zip_longest(["assumed"], assumptions(found))]:
        sentences.add_row(what, sentence)
    console.print(table, sentences, sep="")


def show_devices(found: list[Estimate], console: Console) -> None:
    """A line for each device."""
    table = Table("device", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("GPU-hours", "from", "to", "clips/s", "dense", "ratio", "GB", "of"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for one in found:
        step, room, ends = one.this.whole, one.machine.cluster.device.memory, one.range or (0, 0)
        table.add_row(
            one.machine.name, number(one.hours(step.seconds)), *map(number, ends),
            number(one.options.batch / step.seconds), number(one.hours(one.dense.whole.seconds)), f"{one.ratio:.2f}x",
            number(one.this.memory / 1e9), f"{room / 1e9:.0f}",
            f"{step.most} {step.bound[step.most] / step.seconds:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"GPU-hours at {found[0].options.efficiency:.0%} of the peak, from {RANGE[0]:.0%} to {RANGE[1]:.0%}. Parts and "
        "assumptions: one --gpu at a time, or --html.", soft_wrap=True,
    )  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------

COLOURS = {
    "patch embedding": "#9dc6e0", "video blocks": "#1f5fbf", "text encoder": "#2a9d8f", "frame selector": "#7a5195",
    "fusion encoder": "#ff9614", "heads, losses": "#c9a227", "decoder": "#d1495b", "optimiser": "#6c757d",
    "wait: host": "#343a40", "gradient traffic": "#8d6e63", "gathering": "#bcaaa4", "wait: clips": "#adb5bd",
}  # fmt: skip
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
  :root { color-scheme: light; --ink: #1d2329; --soft: #5b6670; --line: #d9dee3 }
  body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; color: var(--ink); background: #fff;
         font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere }
  h1 { font-size: 1.375rem; line-height: 1.25; margin: 0 0 .25rem } h2 { font-size: 1.125rem; margin: 1.75rem 0 .5rem }
  h3 { font-size: 1rem; margin: 1rem 0 .25rem } p { margin: .25rem 0 } figure { margin: 0 }
  dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: 0 }
  dt, th, li { color: var(--soft) } dd { margin: 0 } ul { margin: 0; padding-left: 1.25rem }
  li, table { font-size: .875rem } .scroll { overflow-x: auto } table { border-collapse: collapse }
  th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: normal;
           white-space: nowrap; font-variant-numeric: tabular-nums }
  th:first-child, td:first-child { text-align: left } tr:last-child td { font-weight: 600 }
  @media print { body { padding: 0; max-width: none; font-size: 10pt } .scroll { overflow: visible }
                 th { white-space: normal } figure, tr, dl { break-inside: avoid } h2, h3 { break-after: avoid } }
</style>
</head>
<body>
<h1>$title</h1>
<p><strong>$prediction</strong></p>
$summaries
$charts
$tables
</body>
</html>
""")


def page(found: list[Estimate]) -> str:
    """HTML that asks nothing of a network: where the hours go, and how many tokens enter each video block."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ValueError("--html needs plotly: pip install -c constraints.txt -e '.[plots]'") from None
    bars, lines = go.Figure(), go.Figure()
    sides = [both for one in found for both in ((one, "", one.this), (one, ", dense", one.dense))]
    for part in dict.fromkeys(part for one in found for part in parts_of(one)):
        bars.add_bar(
            x=[one.hours(of.rows.get(part, Row()).seconds) for one, _, of in sides],
            y=[one.machine.name + which for one, which, _ in sides],
            name=part, orientation="h", marker_color=COLOURS[part],
        )  # fmt: skip
    bars.update_layout(
        barmode="stack", xaxis_title="hours", yaxis={"type": "category", "autorange": "reversed"},
        height=180 + 72 * len(found),
    )  # fmt: skip
    for name, of, colour in (("this recipe", found[0].this, "#1f5fbf"), ("dense", found[0].dense, "#6c757d")):
        lines.add_scatter(y=of.tokens, name=name, mode="lines+markers", marker_color=colour)
    lines.update_layout(xaxis_title="video block", yaxis_title="tokens of a clip", yaxis_rangemode="tozero", height=300)
    charts = ""
    for heading, figure in (("Where the hours go", bars), ("Tokens that enter each video block", lines)):
        figure.update_layout(
            template="plotly_white", margin={"l": 8, "r": 8, "t": 8, "b": 8}, dragmode=False,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        )  # fmt: skip
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=not charts, config={"displayModeBar": False, "responsive": True}
        )
        charts += f"<h2>{heading}</h2><figure>{drawn}</figure>"
    return PAGE.substitute(
        title=escape(title(found[0])), prediction=escape(PREDICTION), charts=charts,
        summaries="".join(
            f"<h2>{escape(one.machine.name)}</h2><dl>"
            + "".join(f"<dt>{what}</dt><dd>{escape(said)}</dd>" for what, said in summary(one))
            + "</dl>"
            for one in found
        ),
        tables="".join(map(details, found)),
    )  # fmt: skip


def details(found: Estimate) -> str:
    """Table and assumptions of a device."""
    heads = ["GFLOP, MB of a pair", *COLUMNS, "share", *(f"dense: {name}" for name in COLUMNS)]
    lines = [
        [part, *cells(found, found.this.rows.get(part)), f"{found.share(part):.0%}",
         *cells(found, found.dense.rows.get(part))]
        for part in parts_of(found)
    ]  # fmt: skip
    lines.append(["all", *cells(found, found.this.whole), "100%", *cells(found, found.dense.whole)])
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return (
        f"<h2>{escape(found.machine.name)}, by part</h2><div class='scroll'>"
        f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{rows}</table></div>"
        f"<h3>What this stands on</h3><ul>{''.join(f'<li>{escape(said)}</li>' for said in assumptions(found))}</ul>"
    )


def main() -> int:
    try:
        options, size = parse(sys.argv[1:])
        found = [estimate(options, size, machine) for machine in machines(options)]
        for one in found:
            warn(too_large(one))
        if options.html:
            write(Path(options.html), page(found))
        if options.json:
            numbers = json.dumps([one.json() for one in found] if len(found) > 1 else found[0].json(), indent=2)
            if options.json == "-":
                print(numbers)
                return 0
            write(Path(options.json), numbers + "\n")
        console = Console(markup=False, highlight=False)
        console.print(PREDICTION)
        console.print(title(found[0]), soft_wrap=True)
        if len(found) > 1:
            show_devices(found, console)
        else:
            show(found[0], console)
        for file in filter(None, (options.json, options.html)):
            console.print(f"{'written':<10}{file}", soft_wrap=True)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
