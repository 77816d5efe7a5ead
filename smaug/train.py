"""Pre-train a video-language model: `python -m smaug.train [recipe] [--size tiny] --fast`.

With no data named it trains on the embedded data set. The run folder holds all that is needed to go on, to evaluate
and to know a year later what was run. Top to bottom: options, set-up, loop, evaluation.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import nn

import smaug
from smaug import checkpoint, device, pretrained
from smaug import recipe as recipes
from smaug.data.clips import Clips
from smaug.data.journal import one_line
from smaug.data.loader import Batch, Loader
from smaug.data.manifest import ManifestError, Skip
from smaug.data.shapes import DamagedError
from smaug.data.text import train_tokenizer
from smaug.evaluate.scores import evaluate, print_result, provenance
from smaug.model.model import SIZES, Model, ModelConfig
from smaug.objectives.answer import Answer
from smaug.objectives.mlm import Mlm
from smaug.objectives.vtm import Vtm
from smaug.optim import adamw, learning_rate
from smaug.recipe import Recipe
from smaug.run import (
    build,
    open_loader,
    open_split,
    progress,
    read_config,
    read_tokenizer,
    refuse,
    reporting,
    start_from,
    with_answers,
    write,
)
from smaug.step import keep_rate, text_views, training_step, video_mask

DEFAULT_RECIPE = "smaug"
SHOWN = 20  # skipped files on the terminal; skipped.txt has them all


@dataclass(frozen=True)
class Options:
    """A run. Everything of the recipe can be changed by a flag of its own."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    fast: bool = False  # the fastest correct way on this machine; without it plain reference ops in fp32
    run_dir: Path | None = None  # default: runs/{recipe}-{size}-{time}
    init: Path | None = None  # start from the model and the tokenizer of this run
    resume: bool = False  # go on with the run in --run-dir
    max_steps: int | None = None  # stop after this many steps; the schedule stays as long as it is
    checkpoint_every: int = 200  # steps
    log_every: int = 10  # steps; losses are read from the device only then
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
    fast = False
    run_dir = _peek(rest, "--run-dir")
    if "--resume" in rest:
        if run_dir is None:
            raise ValueError("--resume needs --run-dir: the folder of the run to go on with")
        if _peek(rest, "--init"):
            raise ValueError(f"--resume goes on with {run_dir}, which has begun already; leave --init out")
        config = read_config(Path(run_dir))
        saved = recipes.from_json(config["recipe"])
        if arguments[:1] == [name] and name != saved.name:
            raise ValueError(f"{run_dir} is a run of the recipe {saved.name}, not of {name}")
        default, fast, size = saved, config["fast"], config["size"]
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
    """Removes `flag value` or `flag=value` and returns the value."""
    for i, word in enumerate(arguments):
        if word == flag and i + 1 < len(arguments):
            del arguments[i]
            return arguments.pop(i)
        if word.startswith(flag + "="):
            return arguments.pop(i).split("=", 1)[1]
    return None


def _peek(arguments: list[str], flag: str) -> str | None:
    return _take(list(arguments), flag)


def _differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key), b.get(key), f"{at}.{key}" if at else key)
    elif a != b:
        yield f"{at} was {a}, is {b}"


def run(options: Options, size: str, command: str) -> int:
    console = Console(markup=False)  # a file may be called clip[1].mp4
    began = time.perf_counter()
    recipe, way = options.recipe, device.choose(options.fast, options.device)
    steps = min(recipe.optim.steps, options.max_steps if options.max_steps is not None else recipe.optim.steps)
    folder = options.run_dir or Path("runs") / f"{recipe.name}-{size}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "config.json").exists() and not options.resume:
        raise ValueError(f"{folder} holds a run already; add --resume to go on with it, or choose another --run-dir")
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
    seconds = predicted_seconds(scratch, recipe, steps, device.matrix_rate(way))
    console.print(
        f"[bold]smaug {smaug.__version__}[/]  recipe {recipe.name}, size {size}, seed {recipe.seed}", markup=True
    )
    console.print(f"machine    {device.describe(way.device)}", highlight=False)
    console.print(f"way        {'--fast: ' if options.fast else ''}{way.why}", highlight=False)
    console.print(f"model      {parameters / 1e6:.2f} M parameters", highlight=False)
    console.print(
        f"predicted  {seconds / 60:.1f} minutes of training for {steps} steps (from counted FLOPs)", highlight=False
    )
    for sentence in starts:
        console.print(f"start      {sentence}", highlight=False, soft_wrap=True)
    console.print(f"run        {folder}", highlight=False, soft_wrap=True)

    clips, held_out = (open_split(recipe, split, console, way.device) for split in ("train", "test"))
    tokenizer = _tokenizer(folder, clips, options)
    init = options.init.resolve() if options.init else None  # a run may be resumed from another folder
    if options.resume:
        init = read_config(folder).get("init")
    else:
        recipe = with_answers(recipe, clips)

    torch.manual_seed(recipe.seed)  # again, so that the weights do not depend on what came before
    model = build(recipe, tokenizer.get_vocab_size(), way.impl).to(way.device)
    optimizer = adamw(model, recipe.optim)
    totals: dict[str, float] = {
        "step": 0, "clips": 0, "tokens_computed": 0, "tokens_dense": 0,
        "device_seconds": 0.0, "data_seconds": 0.0, "wall_seconds": 0.0,
    }  # fmt: skip
    state = None
    if options.resume:
        state, damaged = checkpoint.load_newest(folder / "checkpoints", model, optimizer)
        for sentence in damaged:
            console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
        totals |= state["totals"] if state else {}
        at = f"step {totals['step']:.0f}" if state else "step 0, since there is no checkpoint yet"
        console.print(f"resuming at {at}", highlight=False)
    if state is None and not init:
        pretrained.load_weights(model, recipe.model)
    if init and not totals["step"]:
        console.print(f"init       {start_from(model, recipe, Path(init))}", highlight=False, soft_wrap=True)
    if not options.resume:  # written when all that is read has been read, since with it a folder holds a run
        config = {
            "init": str(init) if init else None,
            "size": size,
            "fast": options.fast,
            "command": command,
            "machine": device.describe(way.device),
            "smaug": smaug.__version__,
            "recipe": recipes.to_json(recipe),
        }
        write(folder / "config.json", json.dumps(config, indent=2))

    loader = open_loader(recipe, clips, tokenizer)
    if loader.size < recipe.data.batch:
        console.print(f"batch is {loader.size}, since there are no more clips", highlight=False)
    loop = Loop(options, recipe, folder, console, way, model, optimizer, loader, totals, began)
    try:
        finished = loop.train(steps)
    finally:  # a run that too many bad files end names all of them, too
        skipped = _name_skipped(console, folder / "skipped.txt", [*clips.skipped, *loader.skipped.values()])
    if not finished:
        console.print(f"stopped at step {totals['step']:.0f} and saved; go on with:", highlight=False)
        console.print(
            f"  python -m smaug.train --resume --run-dir {shlex.quote(str(folder))}", highlight=False, soft_wrap=True
        )
        return 0

    with reporting(console) as report:
        result = evaluate(model, recipe, held_out, tokenizer, way, report=report)
    totals["wall_seconds"] += time.perf_counter() - loop.began
    result |= {
        **totals,
        **provenance(recipe.data, recipe.data),
        "init": str(init) if init else None,
        "checkpoint": checkpoint.fingerprint(folder / "checkpoints", int(totals["step"])),
        "recipe": recipe.name,
        "size": size,
        "batch": loader.size,
        "machine": device.describe(way.device),
        "skipped": len(skipped),
    }
    write(folder / "result.json", json.dumps(result, indent=2))
    print_result(console, result)
    return 0


def _name_skipped(console: Console, path: Path, skips: Sequence[Skip]) -> list[str]:
    """Tells what was skipped, and keeps it beside what the run had met before it was resumed; a line each."""
    lines = [one_line(f"{skip.name}: {skip.reason}") for skip in skips]
    for line in lines[:SHOWN]:
        console.print(f"skipped {line}", style="yellow", highlight=False, soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"skipped {len(lines) - SHOWN} more, all in {path}", style="yellow", soft_wrap=True)
    known = list(dict.fromkeys([*(path.read_text().splitlines() if path.exists() else []), *lines]))
    if known:
        write(path, "".join(line + "\n" for line in known))
    return known


def _tokenizer(folder: Path, clips: Clips, options: Options) -> Tokenizer:
    """The run's own: that of the run or the checkpoint it starts from, or trained on its texts when it started."""
    path = folder / "tokenizer.json"
    if options.resume and path.exists():
        return read_tokenizer(folder)
    if options.init:
        tokenizer = read_tokenizer(options.init)
    elif options.recipe.model.text.start:
        tokenizer = pretrained.load_tokenizer(options.recipe.model.text.start)
    else:
        texts = [text for s in clips.samples for text in (*s.captions, *s.options, *s.answers)]
        tokenizer = train_tokenizer(texts, options.recipe.data.vocabulary)
    write(path, tokenizer.to_str(pretty=True))
    return tokenizer


def count_tokens(recipe: Recipe, batch: Batch) -> tuple[int, int]:
    """Rows that the encoders compute for a batch, and rows if nothing were masked or pruned; a mean over the blocks."""
    video, mask, rate = recipe.model.video, video_mask(recipe, batch.step), keep_rate(recipe, batch.step)
    computed, dense = 0.0, 0
    for group in batch.groups:
        times = video.times(group.video.shape[1])
        sequences = len(group.samples) * video.sequences(group.video.shape[1])
        kept = len(group.samples) * mask.keep(times, video.patches) // sequences
        rows = []
        fused = 0
        for block in range(video.depth):
            if block in video.prune.blocks:
                stay = video.prune.count(kept, rate)
                fused += stay < kept and video.prune.fuse != "none"
                kept = stay
            rows.append(sequences * (1 + kept + fused))
        computed += sum(rows) / len(rows)
        dense += sequences + len(group.samples) * times * video.patches
    views = {id(view): view for view in text_views(recipe, batch).values()}
    whole = [batch.options if view is batch.options else batch.words for view in views.values()]
    return round(computed) + sum(v.rows for v in views.values()), dense + sum(w.rows for w in whole if w is not None)


def predicted_seconds(model: Model, recipe: Recipe, steps: int, rate: float) -> float:
    """Rough: 6 FLOPs a weight and token, at a third of the machine's matrix rate, which is what size tiny reaches on
    two cores. Attention, pruning, the pixel decoder and data are not in it."""
    video, words = recipe.model.video, min(12, recipe.model.text.max_words)
    kept = recipe.video_mask.keep(video.times(video.frames), video.patches)
    vtm = next((o for o in recipe.objectives.values() if isinstance(o, Vtm)), None)
    masked = any(isinstance(o, Mlm) for o in recipe.objectives.values())
    rows: list[tuple[nn.Module | None, int]] = [
        (model.video.patch_embed, kept),
        (model.video.blocks, kept + video.sequences(video.frames)),
        (model.text.blocks, words * (1 + masked)),
        (model.fusion, words * ((1 + vtm.negatives if vtm else 0) + masked)),
    ]
    flops = sum(6 * n * sum(p.numel() for p in part.parameters()) for part, n in rows if part is not None)
    return flops * recipe.data.batch * steps / (rate / 3)


class Loop:
    """The training loop and what it must remember between steps."""

    def __init__(
        self, options: Options, recipe: Recipe, folder: Path, console: Console, way: device.Way, model: Model,
        optimizer: torch.optim.Optimizer, loader: Loader, totals: dict[str, float], began: float,
    ) -> None:  # fmt: skip
        self.options, self.folder, self.console, self.way = options, folder, console, way
        self.model, self.optimizer, self.loader, self.totals, self.began = model, optimizer, loader, totals, began
        self.recipe = recipe
        self.stop = False

    def train(self, steps: int) -> bool:
        """Trains up to a step; False if Ctrl-C or SIGTERM ended it before. Saves at the end either way."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before the first step

        start = int(self.totals["step"])
        _cut(self.folder / "metrics.jsonl", start)
        board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)
        with self._signals(), progress(self.console) as bars, open(self.folder / "metrics.jsonl", "a") as log:
            task = bars.add_task("training", total=steps, completed=start, note="")
            batches = self.loader.ahead(start, steps)
            with contextlib.closing(batches):
                saved = start
                logged_at, clips = time.perf_counter(), 0
                while self.totals["step"] < steps and not self.stop:
                    waiting = time.perf_counter()
                    try:
                        batch = next(batches).to(self.way.device)
                    except ManifestError:  # too many bad files; what was learned until then is kept
                        if saved != self.totals["step"]:
                            self._save()
                        raise
                    before = time.perf_counter()
                    self.totals["data_seconds"] += before - waiting
                    loss, parts = self._step(batch, int(self.totals["step"]))
                    step = self._count(batch)
                    clips += len(batch)
                    log_now = step % self.options.log_every == 0 or step == steps
                    if log_now:
                        # The one place of the loop where the host waits for the device.
                        numbers = torch.stack([loss.detach(), *(p.detach() for p in parts.values())]).tolist()
                    self.totals["device_seconds"] += time.perf_counter() - before
                    if log_now:
                        row = {"step": step, "loss": numbers[0], **dict(zip(parts, numbers[1:], strict=True))}
                        row["lr"] = learning_rate(step - 1, self.recipe.optim)
                        row["clips_per_second"] = clips / (time.perf_counter() - logged_at)
                        row |= {k: v for k, v in self.totals.items() if k not in ("step", "wall_seconds")}
                        self._log(row, log, board, bars, task)
                        logged_at, clips = time.perf_counter(), 0
                    bars.update(task, completed=step)
                    if step % self.options.checkpoint_every == 0:
                        self._save()
                        saved = step
            if saved != self.totals["step"] or not checkpoint.steps(self.folder / "checkpoints"):
                self._save()
        board.close()
        return not self.stop

    def _step(self, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe.optim)
        with self.way.autocast():
            loss, parts = training_step(self.model, self.recipe, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, parts

    def _count(self, batch: Batch) -> int:
        computed, dense = count_tokens(self.recipe, batch)
        for key, value in (("step", 1), ("clips", len(batch)), ("tokens_computed", computed), ("tokens_dense", dense)):
            self.totals[key] += value
        return int(self.totals["step"])

    def _log(self, row: dict[str, float], log: Any, board: Any, bars: Progress, task: Any) -> None:
        log.write(json.dumps(row) + "\n")
        log.flush()
        for key, value in row.items():
            board.add_scalar(key, value, row["step"])
        share = row["tokens_computed"] / row["tokens_dense"]
        parts = "  ".join(f"{name} {row[name]:.3f}" for name in self.recipe.objectives)
        note = f"loss {row['loss']:.3f}  {parts}  {row['clips_per_second']:.0f} clips/s  {share:.0%} of tokens kept"
        bars.update(task, note=note)
        if not self.console.is_terminal:
            self.console.print(f"step {row['step']:.0f}  {note}", highlight=False)
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss is {row['loss']} at step {row['step']:.0f}; the last checkpoint in {self.folder} is from "
                "before. Try a lower --optim.lr."
            )

    def _save(self) -> None:
        now = time.perf_counter()
        self.totals["wall_seconds"] += now - self.began
        self.began = now
        checkpoint.save(
            self.folder / "checkpoints", int(self.totals["step"]), self.model, self.optimizer, {"totals": self.totals}
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step; a second Ctrl-C does not wait."""

        def ask(number: int, frame: object) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            self.console.print("finishing the step and saving; once more to stop at once")

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _cut(path: Path, step: int) -> None:
    """Rows beyond the checkpoint will be written again."""
    if path.exists():
        rows = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        write(path, "".join(row + "\n" for row in rows))


def main() -> int:
    arguments = sys.argv[1:]
    try:
        options, size = parse(arguments)
        return run(options, size, shlex.join(["python", "-m", "smaug.train", *arguments]))
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once; --resume goes on from what the run had saved", highlight=False)
        return 130


if __name__ == "__main__":
    sys.exit(main())
