"""Pre-train a video-language model: `python -m smaug.train [recipe] [--size tiny] --fast`.

With no data named it trains on the embedded data set. The run folder holds all that is needed to go on, to evaluate
and to know a year later what was run. Top to bottom: options, set-up, loop, evaluation.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn

import smaug
from smaug import checkpoint, cost, device, distributed, graphs, pretrained
from smaug import recipe as recipes
from smaug.blocks import checkpoint_blocks, compile_blocks
from smaug.data.clips import Clips
from smaug.data.journal import one_line
from smaug.data.manifest import ManifestError, Skip
from smaug.data.shapes import DamagedError
from smaug.data.text import train_tokenizer
from smaug.evaluate.scores import evaluate, print_result, provenance
from smaug.ledger import Book, Ledger, behind
from smaug.loop import Loop
from smaug.model.fusion import FusionBlock
from smaug.model.layers import Block
from smaug.model.model import SIZES, Model, ModelConfig
from smaug.objectives.answer import Answer
from smaug.optim import Update
from smaug.recipe import Recipe
from smaug.run import (
    build,
    open_loader,
    open_split,
    read_config,
    read_tokenizer,
    refuse,
    reporting,
    start_from,
    with_answers,
    with_pools,
    write,
)
from smaug.step import Step

DEFAULT_RECIPE = "smaug"
SHOWN = 20  # skipped files on the terminal; skipped.txt has them all
SHORT = 3.0  # seconds of nothing but products, below which the time of a run on a CPU is not told


@dataclass(frozen=True)
class Options:
    """A run. Everything of the recipe can be changed by a flag of its own."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    fast: bool = False  # the fastest correct way on this machine; without it plain reference ops in fp32
    run_dir: Path | None = None  # default: runs/{recipe}-{size}-{time}
    init: Path | None = None  # start from the model and the tokenizer of this run
    resume: bool = False  # go on with the run in --run-dir
    requeue: bool = False  # go on if --run-dir holds a run, else begin it: a line that may be run again and again
    max_steps: int | None = None  # stop after this many steps; the schedule stays as long as it is
    checkpoint_every: int = 200  # steps
    keep: int = 2  # newest checkpoints that are kept
    eval_every: int = 0  # steps; scores on the val split, and keeps the best checkpoint, too; 0: only at the end
    log_every: int = 10  # steps; losses are read from the device only then
    compile: Literal["auto", "yes", "no"] = "auto"  # transformer blocks by torch.compile; auto: with --fast on a GPU
    cuda_graphs: bool = False  # steps that recur are recorded and replayed; with --fast on one GPU
    checkpoint_blocks: bool = False  # blocks are computed again in the backward, for much less memory
    micro_batch: int = 0  # pairs of a process that are encoded at once, for less memory; 0: all
    max_nonfinite: int = 10  # steps in a row that may be skipped since their gradients are not finite
    shard: bool = False  # with torchrun: each process holds a part of the weights (FSDP2), not all (DDP)
    timeout: float = 30.0  # minutes that a process waits for the others
    device: Literal["auto", "cpu", "cuda"] = "auto"


def parse(arguments: list[str]) -> tuple[Options, str]:
    """Recipe, size and pre-trained starts come first, as they decide the defaults; a run to resume brings its own."""
    rest = list(arguments)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else DEFAULT_RECIPE
    asked = _take(rest, "--size")
    size = asked or "tiny"
    starts = {part: _take(rest, f"--model.{part}") or "" for part in ("vision", "text")}
    for part, start in starts.items():
        if start.startswith("-"):
            raise ValueError(f"--model.{part} needs a name on the Hugging Face Hub or a folder, and {start} is neither")
    fast = goes_on = False
    run_dir = _peek(rest, "--run-dir")
    requeue = "--requeue" in rest
    if run_dir is None and (requeue or "--resume" in rest):
        raise ValueError(f"--{'requeue' if requeue else 'resume'} needs --run-dir: the folder of the run to go on with")
    if "--resume" in rest or (requeue and (Path(str(run_dir)) / "config.json").exists()):
        assert run_dir is not None
        if _peek(rest, "--init") and not requeue:
            raise ValueError(f"--resume goes on with {run_dir}, which has begun already; leave --init out")
        config = read_config(Path(run_dir))
        saved = recipes.from_json(config["recipe"])
        if arguments[:1] == [name] and name != saved.name:
            raise ValueError(f"{run_dir} is a run of the recipe {saved.name}, not of {name}")
        default, fast, size, goes_on = saved, config["fast"], config["size"], True
        if asked not in (None, size):
            raise ValueError(f"{run_dir} is a run of the size {size}, not of {asked}")
        _same_starts(run_dir, saved, starts)
    elif init := _peek(rest, "--init"):
        config = read_config(Path(init))
        if asked not in (None, config["size"]):
            raise ValueError(f"--init {init} is a run of the size {config['size']}, not of {asked}")
        size = config["size"]
        default = recipes.load(name, size)
        saved = recipes.from_json(config["recipe"])
        _same_starts(init, saved, starts)
        model = begun_from(saved.model, default.model)
        # A decoder of answers starts from the fusion encoder, so it has its sizes.
        objectives = {
            key: replace(one, decoder=model.fusion) if isinstance(one, Answer) else one
            for key, one in default.objectives.items()
        }
        default = replace(default, model=model, objectives=objectives)
    else:
        default = recipes.load(name, size)
        default = replace(default, model=pretrained.fit(default.model, **starts))
    options = tyro.cli(
        Options,
        prog=f"python -m smaug.train [{'|'.join(recipes.names())}] [--size {'|'.join(SIZES)}] "
        "[--model.vision CHECKPOINT] [--model.text CHECKPOINT]",
        description=__doc__,
        args=rest,
        default=Options(recipe=default, fast=fast),
        config=(tyro.conf.AvoidSubcommands,),
    )
    if goes_on:
        options = replace(options, resume=True, init=None)
    if options.resume and (options.recipe, options.fast) != (default, fast):
        changed = "; ".join(_differences(recipes.to_json(default), recipes.to_json(options.recipe)))
        raise ValueError(
            "only limits, logging and devices may change when a run is resumed, but this differs from the run's "
            f"config.json: {changed or '--fast'}. Leave it out, or start a new run."
        )
    return options, size


def _same_starts(run: str, saved: Recipe, asked: dict[str, str]) -> None:
    began = {"vision": saved.model.video.start, "text": saved.model.text.start}
    for part, start in asked.items():
        if start not in ("", began[part]):
            raise ValueError(f"{run} began its {part} from {began[part] or 'random weights'}, not from {start}")


def begun_from(saved: ModelConfig, own: ModelConfig) -> ModelConfig:
    """What a recipe makes of a trained model: pruning and frames are the recipe's, as is what that model lacks."""
    video = replace(
        saved.video, prune=own.video.prune, frames=own.video.frames // own.video.tubelet * saved.video.tubelet
    )
    fusion = saved.fusion if saved.fusion.depth else own.fusion
    if saved.text.start:  # BERT's layers, new as they are
        fusion = replace(saved.fusion, depth=fusion.depth)
    return replace(saved, video=video, fusion=fusion)


def _take(arguments: list[str], flag: str) -> str | None:
    """Removes every `flag value` and `flag=value` and returns the last value, as the parser does."""
    rest, value = [], None
    words = iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, None)
        elif word.startswith(flag + "="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    arguments[:] = rest
    return value


def _peek(arguments: list[str], flag: str) -> str | None:
    return _take(list(arguments), flag)


def _differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key), b.get(key), f"{at}.{key}" if at else key)
    elif a != b:
        yield f"{at} was {a}, is {b}"


def run(options: Options, size: str, command: str) -> int:
    began = time.perf_counter()
    least = min(options.keep, options.log_every, options.checkpoint_every, options.max_nonfinite)
    if least < 1 or min(options.micro_batch, options.eval_every) < 0 or not options.timeout > 0:
        raise ValueError(
            "--keep, --log-every, --checkpoint-every and --max-nonfinite must be at least 1, --micro-batch and "
            "--eval-every at least 0, --timeout above 0"
        )
    recipe, way = options.recipe, device.choose(options.fast, options.device)
    if distributed.asked():
        way = replace(way, device=distributed.start(way.device, options.timeout))
    ranks, first = distributed.ranks(), distributed.rank() == 0
    if options.shard and ranks == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun may have one left
        raise ValueError("--shard shares the weights among processes: start them by torchrun, see docs/engine.md")
    console = Console(markup=False, quiet=not first)  # a file may be called clip[1].mp4
    steps = min(recipe.optim.steps, options.max_steps if options.max_steps is not None else recipe.optim.steps)
    default_folder = Path("runs") / f"{recipe.name}-{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.run_dir or distributed.tell(default_folder)
    if len(set(distributed.collect(options.resume))) > 1:
        raise ValueError(
            f"{folder} holds a run for some processes and none for others; --run-dir must be a folder that all see"
        )
    if (folder / "config.json").exists() and not options.resume:
        raise ValueError(f"{folder} holds a run already; add --resume to go on with it, or choose another --run-dir")
    if options.cuda_graphs:
        graphs.check(recipe, way.device, way.impl, options.micro_batch)
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(recipe.seed)
    # Sizes do not depend on the captions' words but for the word table, which costs no arithmetic.
    words, starts = 64, []
    begins = not options.resume and not options.init
    if recipe.model.text.start and begins:
        words = pretrained.load_tokenizer(recipe.model.text.start).get_vocab_size()
    scratch = build(recipe, words, impl=way.impl)
    if begins:  # refuses a start that does not fit before anything is written
        starts = pretrained.load_weights(scratch, recipe.model)
    parameters = sum(p.numel() for p in scratch.parameters())
    vocabulary = max(words, recipe.data.vocabulary if recipe.data.manifest else 0)  # at most; the embedded set is small
    seconds, why = predicted_seconds(
        recipe, steps, way, ranks, vocabulary, options.checkpoint_blocks, options.micro_batch
    )
    console.print(
        f"[bold]smaug {smaug.__version__}[/]  recipe {recipe.name}, size {size}, seed {recipe.seed}", markup=True
    )
    console.print(f"machine    {device.describe(way.device)}", highlight=False)
    console.print(f"way        {'--fast: ' if options.fast else ''}{way.why}", highlight=False)
    console.print(f"model      {parameters / 1e6:.2f} M parameters", highlight=False)
    told = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    console.print(
        f"predicted  {told if why else 'under a minute'} of training for {steps} steps, without "
        f"data{', messages' if ranks > 1 else ''} and evaluation{why and f' ({why})'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if options.cuda_graphs:
        console.print(
            f"graphs     up to {graphs.MOST} kinds of steps that recur are recorded and replayed; others run as ever: "
            "those of videos with images, and while pruning warms up",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if ranks > 1:
        how = "FSDP2, a part of the weights each" if options.shard else "DDP, all weights each"
        console.print(f"processes  {ranks}: {how}", highlight=False)
    for sentence in starts:
        console.print(f"start      {sentence}", highlight=False, soft_wrap=True)
    console.print(f"run        {folder}", highlight=False, soft_wrap=True)

    with distributed.one_before_others():  # builds the embedded set, reads what others then find in the cache
        clips = open_split(recipe, "train", console, way.device)
        held_out = open_split(recipe, "test", console, way.device) if first else clips
        chosen_on = open_split(recipe, "val", console, way.device) if first and options.eval_every else clips
    with distributed.one_before_others(of_all=True):
        tokenizer = _tokenizer(folder, clips, options, first)
    init = options.init.resolve() if options.init else None  # a run may be resumed from another folder
    if options.resume:
        init = read_config(folder).get("init")
    else:
        recipe = with_answers(recipe, clips)
    loader = open_loader(recipe, clips, tokenizer, distributed.rank(), ranks)
    recipe = with_pools(recipe, loader.size // ranks, ranks, begins=not options.resume)
    samples = [len(clips), clips.fingerprint()]
    if other := [number for number, theirs in enumerate(distributed.collect(samples)) if theirs != samples]:
        raise ValueError(
            f"process {distributed.rank()} has {len(clips)} samples, and process {other[0]} has others, or in another "
            "order. Batches are shared by number: give each machine the same manifest and all its files"
        )
    images = any(sample.kind == "image" for sample in clips.samples)
    if ranks > 1 and images and recipe.video_mask.kind == "frame":
        raise ValueError(
            "--video-mask.kind frame takes nothing from an image: a process with images alone would compute less than "
            "the others, who would wait for it. Use another kind, or one process"
        )

    torch.manual_seed(recipe.seed)  # again, so that the weights do not depend on what came before
    model = build(recipe, tokenizer.get_vocab_size(), way.impl).to(way.device)
    start = "" if options.resume and checkpoint.steps(folder / "checkpoints") else _begin(model, recipe, init)
    if start:
        console.print(start, highlight=False, soft_wrap=True)
    if options.compile == "yes" or (options.compile == "auto" and options.fast and way.device.type == "cuda"):
        compile_blocks(model)
    if options.checkpoint_blocks:
        checkpoint_blocks(model)
    step = Step(model, recipe)
    engine: nn.Module = step
    if ranks > 1 and options.shard:
        distributed.shard(step, (Block, FusionBlock))
    elif ranks > 1:
        engine = distributed.replicate(step, way.device, unused=images or recipe.unmask_last > 0)
    update = Update(model, recipe.optim)
    keeper = checkpoint.Keeper(folder / "checkpoints", options.keep, distributed.host_group())
    totals: dict[str, float] = {
        "step": 0, "clips": 0, "tokens_computed": 0, "tokens_dense": 0,
        "device_seconds": 0.0, "data_seconds": 0.0, "wall_seconds": 0.0,
    }  # fmt: skip
    if options.resume:
        totals |= _restore(keeper, model, update, console)
        if (was := read_config(folder).get("samples")) not in (None, samples):
            console.print(
                f"the data are not what they were when the run began: {samples[0]} samples, not {was[0]}, or others, "
                "or in another order. From here on batches are drawn from these",
                style="yellow", highlight=False, soft_wrap=True,
            )  # fmt: skip
    elif first:  # written when all that is read has been read, since with it a folder holds a run
        config = {
            "init": str(init) if init else None,
            "size": size,
            "fast": options.fast,
            "command": command,
            "machine": device.describe(way.device),
            "processes": ranks,
            "samples": samples,
            "smaug": smaug.__version__,
            "recipe": recipes.to_json(recipe),
        }
        write(folder / "config.json", json.dumps(config, indent=2))

    if loader.size < recipe.data.batch:
        console.print(f"batch is {loader.size}, since there are no more clips", highlight=False)

    def score(clips: Clips, report: Any = None) -> dict[str, Any] | None:
        """Of the weights as they are now, on the first process; all take part."""
        plain = evaluated(step, update, tokenizer, way)
        return evaluate(plain, recipe, clips, tokenizer, way, report=report) if plain is not None else None

    named: list[str] = []  # of skipped files, each once

    def name_skipped(skips: Sequence[Skip]) -> None:
        if first:
            named[:] = _name_skipped(console, folder / "skipped.txt", [*clips.skipped, *skips])

    past = behind(folder, totals) if options.resume else Ledger((), ())
    book = Book(
        folder, step, way, at=int(totals["step"]), began=began, command=command, fast=options.fast, past=past,
        graphs=options.cuda_graphs,
    )  # fmt: skip
    loop = Loop(
        options, folder, console, way, step, engine, update, keeper, loader, totals, book,
        score=lambda: score(chosen_on), note_skipped=name_skipped,
    )  # fmt: skip
    try:
        finished = loop.train(steps)
    except ManifestError:  # a run that too many bad files end names all of them, too
        name_skipped(list(loader.skipped.values()))
        raise
    totals = loop.totals(wait=True)
    if not finished:
        console.print(f"stopped at step {totals['step']:.0f} and saved; go on with:", highlight=False)
        console.print(
            f"  python -m smaug.train --resume --run-dir {shlex.quote(str(folder))}", highlight=False, soft_wrap=True
        )
        return 0

    with reporting(console) as report, book.watch.phase("evaluation"):
        result = score(held_out, report)
    if result is None:
        return 0
    totals = loop.totals(together=False, wait=True)  # the others have left
    scores = {key: result[key] for key in result if key.startswith(("t2v_", "v2t_", "acc"))}
    book.reached(loop.number, "test", scores)
    result |= {
        **totals,
        **provenance(recipe.data, recipe.data),
        "init": str(init) if init else None,
        "checkpoint": checkpoint.fingerprint(folder / "checkpoints", int(totals["step"])),
        "recipe": recipe.name,
        "size": size,
        "batch": loader.size,
        "machine": device.describe(way.device),
        "skipped": len(named),
    }
    write(folder / "result.json", json.dumps(result, indent=2))
    print_result(console, result, book.total())
    return 0


def _name_skipped(console: Console, path: Path, skips: Sequence[Skip]) -> list[str]:
    """Tells what was skipped since it last did, and keeps it beside what was known, also of a run that was resumed; a
    line each."""
    known = path.read_text().splitlines() if path.exists() else []
    lines = list(dict.fromkeys(one_line(f"{skip.name}: {skip.reason}") for skip in skips))
    if new := [line for line in lines if line not in set(known)]:
        write(path, "".join(line + "\n" for line in [*known, *new]))
    for line in new[: max(0, SHOWN - len(known))]:
        console.print(f"skipped {line}", style="yellow", highlight=False, soft_wrap=True)
    if new and len(known) + len(new) > SHOWN:
        console.print(
            f"{len(known) + len(new)} files are skipped so far, all in {path}", style="yellow", soft_wrap=True
        )
    return [*known, *new]


def _begin(model: Model, recipe: Recipe, init: Path | str | None) -> str:
    """Weights to begin with -> what to tell of them."""
    if init:
        return f"init       {start_from(model, recipe, Path(init))}"
    pretrained.load_weights(model, recipe.model)
    return ""


def _restore(keeper: checkpoint.Keeper, model: Model, update: Update, console: Console) -> dict[str, float]:
    """Loads the newest whole checkpoint, if there is any -> the totals at that step."""
    state, damaged = checkpoint.load(keeper.folder, model, update.optimizer, ema=update.ema or None, group=keeper.group)
    for sentence in damaged:
        console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
    if state is None and damaged:
        raise ValueError(f"no checkpoint in {keeper.folder} can be read. To begin the run again, remove that folder")
    totals: dict[str, float] = state["totals"] if state else {}
    if state and "nonfinite" in state:
        update.set_nonfinite(state["nonfinite"])
    at = f"step {totals['step']:.0f}" if state else "step 0, since there is no checkpoint yet"
    console.print(f"resuming at {at}", highlight=False)
    return totals


def evaluated(step: Step, update: Update, tokenizer: Tokenizer, way: device.Way) -> Model | None:
    """The model to evaluate: whole, with the mean weights if the recipe keeps a mean. On the first process; all of them
    have to take part if they hold parts."""
    if not (update.ema or any(isinstance(p, distributed.DTensor) for p in step.parameters())):
        return step.model if distributed.rank() == 0 else None
    weights = {name: distributed.whole(x) for name, x in (step.model.state_dict() | update.ema).items()}
    if distributed.rank():
        return None
    model = build(step.recipe, tokenizer.get_vocab_size(), way.impl).to(way.device)
    model.load_state_dict(weights)
    return model


def _tokenizer(folder: Path, clips: Clips, options: Options, first: bool) -> Tokenizer:
    """The run's own: that of the run or the checkpoint it starts from, or trained on its texts when it started. The
    first process writes it for the others."""
    path = folder / "tokenizer.json"
    if path.exists() and (options.resume or not first):
        return read_tokenizer(folder)
    if not first:
        raise ValueError(f"{path} of the first process is not to be seen; --run-dir must be a folder that all see")
    if options.init:
        tokenizer = read_tokenizer(options.init)
    elif options.recipe.model.text.start:
        tokenizer = pretrained.load_tokenizer(options.recipe.model.text.start)
    else:
        texts = [text for s in clips.samples for text in (*s.captions, *s.options, *s.answers)]
        tokenizer = train_tokenizer(texts, options.recipe.data.vocabulary)
    write(path, tokenizer.to_str(pretty=True))
    return tokenizer


def predicted_seconds(
    recipe: Recipe, steps: int, way: device.Way, ranks: int, vocabulary: int, again: bool, micro_batch: int = 0
) -> tuple[float, str]:
    """Of the first `steps` of a run's schedule, and what that is from: "" on a CPU for a run so short that to calibrate
    would take as long. again: the backward computes blocks again. micro_batch: pairs that are encoded at once, in two
    forwards (GradCache); 0: all, in one. What processes tell each other is left out."""
    pairs = max(1, recipe.data.batch // ranks)
    rounds = -(-pairs // (micro_batch or pairs))
    bf16 = cost.BF16_GPU if way.device.type == "cuda" else cost.BF16_CPU
    parts = partial(cost.parts, vocabulary=vocabulary, precision=cost.FP32 if way.dtype == torch.float32 else bf16)

    def encoders(counted: dict[str, cost.Work]) -> dict[str, cost.Work]:
        return {name: work for name, work in counted.items() if name.startswith(cost.ENCODERS)}

    def count(recipe: Recipe, load: cost.Load) -> dict[str, cost.Work]:
        part = encoders(parts(recipe, replace(load, pairs=round(pairs / rounds))))
        return parts(recipe, load) | {name: cost.total([work] * rounds) for name, work in part.items()}

    run = cost.stages(recipe, cost.Load(pairs, world=ranks), count if rounds > 1 else parts, steps)
    if way.device.type == "cuda":
        gpu = cost.of_gpu(torch.cuda.get_device_name(way.device)) if way.dtype == torch.bfloat16 else None
        whose = "of its data sheet" if gpu else "of a product"
        gpu, efficiency, launch = gpu or cost.calibrate(way), cost.EFFICIENCY, cost.LAUNCH
        why = f"a prediction, from counted FLOPs at {efficiency:.0%} of the {gpu.flops / 1e12:.0f} TFLOP/s {whose}"
    else:
        flops = steps * sum(share * cost.total(counted.values()).step_flops for share, _, counted in run)
        if flops < SHORT * device.matrix_rate(way):
            return 0.0, ""
        gpu, efficiency, launch = cost.calibrate(way, seconds=0.5), 1.0, 0.0
        why = "counted operations, at rates measured just now"
    seconds, job = 0.0, cost.Job(checkpoint_blocks=again)
    for share, _, counted in run:
        twice = encoders(counted) if rounds > 1 else {}
        computed = sum(cost.computing(counted, gpu, job, efficiency)) + cost.computing(twice, gpu, job, efficiency)[0]
        launches = cost.total(counted.values()).launches + cost.total(twice.values()).launches / 3  # as in `step_time`
        seconds += steps * share * max(computed, launch * launches)
    return seconds, why


def main() -> int:
    arguments = sys.argv[1:]
    try:
        options, size = parse(arguments)
        return run(options, size, shlex.join(["python", "-m", "smaug.train", *arguments]))
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except Exception as error:
        if distributed.ranks() == 1:
            raise
        if isinstance(error, RuntimeError) and "by peer" in str(error):
            return refuse(RuntimeError(f"process {distributed.rank()}: another process is gone ({error})"))
        traceback.print_exc()  # not raised, since the interpreter's own end may be a deadlock, see `distributed.leave`
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once; --resume goes on from what the run had saved", highlight=False)
        return 130


if __name__ == "__main__":
    distributed.leave(main())
