"""A whole training step: forward, backward, AdamW.

    pytest benchmarks/bench_train_step.py --benchmark-only                  # size tiny, beside its rivals
    python -m benchmarks.bench_train_step --recipe smaug --size base        # any recipe and size, phase by phase

In the first, `fast` and `reference` are our two ways in one precision. `eager` is the same step, on the same weights,
in the PyTorch that one writes today (`eager_step.py`), `eager_compiled` that one under torch.compile, `eager_dense`
that one with nothing masked, pruned or rebuilt: what a step costs without the method.

The second takes what else it is given as `smaug.train` does: `--model.video.frames 8`. Phases are timed without the
profiler, parts within them are shares that the profiler gives (`parts.times`). FLOPs and launches are counted.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import pytest
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import parts
from benchmarks.eager_step import EagerStep, padded
from benchmarks.launches import Launches
from benchmarks.timing import clock, compiled, in_phases, peak_memory
from smaug import cost
from smaug import device as devices
from smaug.blocks import checkpoint_blocks, compile_blocks
from smaug.data.clips import Clips
from smaug.data.loader import Batch
from smaug.data.manifest import Sample
from smaug.data.text import CLS, MASK, PAD, SEP, UNK, word_pieces
from smaug.ledger import Stopwatch, count_tokens, encoded
from smaug.loop import out_of_memory
from smaug.micro_batches import backward_in_parts
from smaug.objectives.answer import Answer
from smaug.optim import Update, adamw
from smaug.recipe import Recipe, load
from smaug.run import build, open_loader, refuse
from smaug.step import Step, seed_of, text_views, training_step

VOCABULARY = 200  # about as many pieces as the embedded data set has
WORDS = [f"w{number}" for number in range(5, VOCABULARY)]
ON_A_CPU = {"tiny": 32, "small": 8, "base": 4, "large": 2}  # pairs: a step of a few seconds on one core


def batch_of(recipe, pairs, device):
    """Noise in the shapes of the embedded data set, from the middle of a run, at which patches are pruned; time does
    not depend on what is seen. The recipe's own loader makes it: words, questions, options or answers are its."""
    rng = np.random.default_rng(0)

    def said(least, most):
        return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))

    video, objectives = recipe.model.video, dict(recipe.objectives)
    samples = []
    for number in range(pairs):
        options = tuple(said(6, 13) for _ in range(5)) if recipe.task == "mc" else ()
        answers = {"retrieval": (), "qa": (said(1, 2),), "mc": options[:1]}[recipe.task]
        samples.append(Sample(Path(str(number)), "video", (said(6, 13),), str(number), answers, options))
    for name, objective in objectives.items():
        if isinstance(objective, Answer):
            objectives[name] = replace(objective, answers=tuple({sample.answers[0]: 0 for sample in samples}))
    frames = rng.integers(0, 256, (pairs, video.frames, video.image_size, video.image_size, 3), np.uint8)
    clips = Clips("noise", samples, video.image_size, None, frames)  # nothing to decode
    recipe = replace(recipe, objectives=objectives, data=replace(recipe.data, batch=pairs, image_share=None))
    tokenizer = word_pieces({piece: number for number, piece in enumerate([PAD, UNK, CLS, SEP, MASK, *WORDS])})
    return open_loader(recipe, clips, tokenizer).batch(recipe.optim.steps // 2).to(device)


def loss_of(provider, model, recipe, batch):
    """A function that runs the forward -> the loss."""
    if provider in ("fast", "reference"):
        return lambda: training_step(model, recipe, batch)[0]
    theirs, eager = padded(batch, text_views(recipe, batch)), EagerStep(model, recipe).to(batch.video_keys.device)
    forward = compiled(eager) if provider == "eager_compiled" else eager
    return lambda: forward(theirs, eager.draw(theirs, batch.step), batch.step)


@pytest.mark.parametrize("provider", ["fast", "reference", "eager", "eager_compiled", "eager_dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["smaug", "mac"])
def test_train_step(timed, device, name, dtype, provider):
    recipe, pairs = load(name), 32
    if provider == "eager_dense":
        recipe = cost.dense(recipe)
    batch = batch_of(recipe, pairs, device)
    torch.manual_seed(0)
    model = build(recipe, VOCABULARY, "reference" if provider == "reference" else "auto").to(device)
    loss, optimizer = loss_of(provider, model, recipe, batch), adamw(model, recipe.optim)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    video = recipe.model.video
    times = video.times(video.frames)
    kept = recipe.video_mask.keep(times, video.patches)
    shape = f"{name}, {pairs} pairs, {kept} of {times * video.patches} tokens kept, width {video.width}"
    timed(step, shape, dtype, countable=provider != "eager_compiled")


@dataclass(frozen=True)
class Options:
    recipe: str = "smaug"
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    pairs: int | None = None  # default: the recipe's batch on a GPU; on a CPU 32, 8, 4, 2 from tiny to large
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: as --fast chooses
    compile: bool = False  # the transformer blocks by torch.compile
    checkpoint_blocks: bool = False  # activations of a block are computed again in the backward
    micro_batch: int = 0  # pairs that are encoded at once; 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seconds: float = 5.0  # of timed steps, at least three; half as long to warm up
    json: str = ""  # file for the numbers; -: they are printed instead of the table


def measure(options: Options, recipe: Recipe) -> dict[str, Any]:
    """All numbers of a step; times in seconds, memory in bytes."""
    if not Path(options.json).absolute().parent.is_dir():  # said before the work, not after it
        raise ValueError(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    way = devices.choose(True, options.device)
    if options.dtype != "auto":
        way = replace(way, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype])
    pairs = options.pairs
    if pairs is None:
        pairs = recipe.data.batch if way.device.type == "cuda" else ON_A_CPU[options.size]
    if pairs < 1 or options.micro_batch < 0 or options.seconds <= 0:
        raise ValueError("--pairs must be at least 1, --micro-batch at least 0, --seconds above 0")
    batch, few = (batch_of(recipe, count, torch.device("cpu")) for count in (pairs, min(pairs, 4)))
    if way.device.type == "cuda":
        batch = batch.map(torch.Tensor.pin_memory)  # as the loader has it, whose copies run beside the step before
    torch.manual_seed(0)
    vocabulary = VOCABULARY if options.size == "tiny" else recipe.data.vocabulary
    model = build(recipe, vocabulary, way.impl)
    on_meta = Step(copy.deepcopy(model).to("meta"), recipe)
    model.to(way.device)
    whole, update, now = Step(model, recipe), Update(model, recipe.optim), clock(way.device)
    watch, at_once = Stopwatch(way.device, now), options.micro_batch or pairs

    def step(given: Batch = batch, at_once: int = at_once) -> None:
        with watch.phase("copying"):
            there = given.to(way.device)
        with watch.phase("forward"):
            if at_once < len(given):
                backward_in_parts(whole, there, at_once, way.autocast)
            else:
                with way.autocast():
                    loss, _ = whole(there)
                loss.backward(seed_of(loss))
        update(given.step)

    def repeat(seconds: float) -> list[dict[str, float]]:
        """On a GPU the host waits after several steps only, so that it can be ahead, as it is in a run."""
        several = 10 if way.device.type == "cuda" else 1
        taken, began = [], time.perf_counter()
        while len(taken) < 3 or time.perf_counter() - began < seconds:
            watch.read()
            for _ in range(several):
                step()
            taken.append({phase: time_ / several for phase, time_ in watch.read().items()})
        return taken

    # Counted is the plain step: what is computed twice to save memory is no work, and what is compiled makes no calls.
    # Its memory may be more than there is. FLOPs need none, and launches are those of a few pairs.
    shapes = batch.map(lambda x: x.to("meta"))
    flops, flops_forward = parts.flops(lambda: on_meta(shapes)[0].backward())
    step(few, len(few))  # the optimiser makes its state
    with Launches() as launches:
        step(few, len(few))
    if options.compile:
        compile_blocks(model)
    if options.checkpoint_blocks:
        checkpoint_blocks(model)
    with in_phases(watch, clipping=(Update, "__call__")):
        began = time.perf_counter()
        step()  # compiles
        first = time.perf_counter() - began
        repeat(options.seconds / 2)
        taken = repeat(options.seconds)
        rate = devices.matrix_rate(way, now)  # right after, for what else the machine does meanwhile
        booked = parts.times(step, 1, way.device)
    held = [*model.parameters(), *(x for state in update.optimizer.state.values() for x in state.values())]

    whole_steps = [sum(one.values()) for one in taken]
    seconds = median(whole_steps)
    order = ("copying", "forward", "backward", "clipping", "optimizer", "rest")
    phases = {name: median(one[name] for one in taken) for name in order}
    of_phase: Counter[str] = Counter()
    for (phase, _), time_ in booked.items():
        of_phase[phase] += time_
    within: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    for (phase, part), time_ in booked.most_common():
        if phase in within:
            within[phase][part] = phases[phase] * time_ / of_phase[phase]
    computed, dense_rows = encoded(count_tokens(recipe, batch))
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "size": options.size,
        "pairs": pairs,
        "dtype": str(way.dtype).removeprefix("torch."),
        "machine": devices.describe(way.device),
        "clock": "of the GPU" if watch.cuda else "of the process" if now is time.process_time else "of the wall",
        "compile": options.compile,
        "checkpoint_blocks": options.checkpoint_blocks,
        "micro_batch": options.micro_batch,
        "steps": len(taken),
        "first_seconds": first,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "seconds_range": [min(whole_steps), max(whole_steps)],
        "clips_per_second": pairs / seconds,
        "tokens_per_second": computed / seconds,
        "tokens_kept": computed / dense_rows,
        "flops": flops,
        "flops_forward": dict(flops_forward),
        "matrix_rate": rate,
        "utilisation": flops / seconds / rate,
        "phases": phases,
        "parts": within,
        "resident_bytes": sum(x.nbytes for x in held),
        "peak_bytes": peak_memory(step, way.device),
        "launches": launches.dense.total() + launches.outside.total(),
    }
    if way.device.type == "cuda":
        found["busy"] = booked.total() / 1e6 / seconds
        gpu = cost.of_gpu(torch.cuda.get_device_name(way.device))
        if gpu and way.dtype is torch.bfloat16:
            found |= {"stated_rate": gpu.flops, "utilisation_of_stated": flops / seconds / gpu.flops}
    return found


def show(found: dict[str, Any], console: Console) -> None:
    def line(what: str, said: str) -> None:
        console.print(f"{what:<15}{said}", highlight=False, soft_wrap=True)

    how = ", compiled" * found["compile"] + ", blocks computed again" * found["checkpoint_blocks"]
    how += f", {found['micro_batch']} encoded at once" if found["micro_batch"] else ""
    ms, (least, most) = 1e3 * found["seconds"], (1e3 * x for x in found["seconds_range"])
    line("step", f"{found['recipe']}, size {found['size']}, {found['pairs']} pairs, {found['dtype']}, "
         f"{found['parameters'] / 1e6:.1f} M parameters{how}")  # fmt: skip
    line("machine", found["machine"])
    line(
        "time",
        f"{ms:.1f} ms, the median of {found['steps']} ({least:.1f} to {most:.1f}), by the clock {found['clock']}",
    )
    if found["compile"]:
        line("first call", f"{found['first_seconds']:.0f} s, most of it to compile")
    line("clips/s", f"{found['clips_per_second']:.2f}")
    line("kept tokens/s", f"{found['tokens_per_second']:.0f}; {found['tokens_kept']:.0%} of a dense model's are kept")
    line("utilisation", f"{found['utilisation']:.0%} of the {found['matrix_rate'] / 1e9:.0f} GFLOP/s of a matrix "
         f"product here; {found['flops'] / 1e9:.1f} GFLOP counted")  # fmt: skip
    if "stated_rate" in found:
        line("", f"{found['utilisation_of_stated']:.0%} of the {found['stated_rate'] / 1e12:.0f} TFLOP/s stated")
    if "busy" in found:
        line("busy", f"{found['busy']:.0%} of the step some kernel runs")
    line("memory", f"{found['peak_bytes'] / 1e6:.0f} MB at the peak of a step, beside "
         f"{found['resident_bytes'] / 1e6:.0f} MB of weights and optimiser")  # fmt: skip
    line("launches", str(found["launches"]))
    table = Table("phase", "part", "ms", "share", "GFLOP")
    for column in table.columns[2:]:
        column.justify = "right"
    for phase, seconds in found["phases"].items():
        flops = sum(found["flops_forward"].values()) if phase == "forward" else 0
        table.add_row(phase, "", f"{1e3 * seconds:.1f}", f"{seconds / found['seconds']:.1%}", gflop(flops))
        for part, time_ in found["parts"].get(phase, {}).items():
            flops = found["flops_forward"].get(part, 0) if phase == "forward" else 0
            table.add_row("", part, f"{1e3 * time_:.1f}", f"{time_ / found['seconds']:.1%}", gflop(flops))
    console.print(table)


def gflop(flops: int) -> str:
    return f"{flops / 1e9:.1f}" if flops else ""


def main() -> int:
    options, rest = tyro.cli(
        Options, prog="python -m benchmarks.bench_train_step", description=__doc__, return_unknown_args=True
    )
    try:
        recipe = tyro.cli(
            Recipe,
            prog="python -m benchmarks.bench_train_step",
            args=rest,
            default=load(options.recipe, options.size),
            config=(tyro.conf.AvoidSubcommands,),
        )
        found = measure(options, recipe)
        if options.json == "-":
            print(json.dumps(found, indent=2))
            return 0
        show(found, Console(markup=False))
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    except (ValueError, OSError) as error:
        return refuse(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return refuse(ValueError("out of memory; try fewer --pairs, --micro-batch or --checkpoint-blocks"))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
