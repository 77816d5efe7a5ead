"""The training loop: batches in, steps, log lines, checkpoints, and what a run survives.

Between two log lines the host asks the device for nothing. What it wants to know by then (losses, skipped steps) waits
on the device, and with several processes all of them learn it together, as they do whether one was asked to stop.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from smaug import checkpoint, device, distributed, graphs
from smaug.data.loader import Batch, Loader
from smaug.data.manifest import ManifestError, Skip
from smaug.data.shapes import naming
from smaug.ledger import BESIDE, FORWARD, REPLAYED, Book, encoded
from smaug.micro_batches import backward_in_parts
from smaug.optim import Update, learning_rate
from smaug.run import progress, write
from smaug.step import Step, seed_of

if TYPE_CHECKING:
    from smaug.train import Options

Score = Callable[[], "dict[str, Any] | None"]


class Loop:
    """What the loop must remember between steps."""

    def __init__(
        self, options: Options, folder: Path, console: Console, way: device.Way, step: Step, engine: nn.Module,
        update: Update, keeper: checkpoint.Keeper, loader: Loader, totals: dict[str, float], book: Book, score: Score,
        note_skipped: Callable[[list[Skip]], object],
    ) -> None:  # fmt: skip
        self.options, self.folder, self.console, self.way = options, folder, console, way
        self.step, self.engine, self.update, self.keeper, self.loader = step, engine, update, keeper, loader
        self.book, self.score, self.note_skipped, self.recipe = book, score, note_skipped, step.recipe
        self.behind, self.phase = totals, book.watch.phase
        self.number = int(totals["step"])  # steps taken
        self.first = distributed.rank() == 0
        self.micro_batch = options.micro_batch or loader.size
        self.graphs = graphs.Graphs(step, way.autocast) if options.cuda_graphs else None
        self.asked = self.stop = False  # to stop; agreed on by all
        remembered = options.log_every + options.max_nonfinite  # as many as can be left out before it is seen
        self.names: collections.deque[tuple[int, tuple[str, ...]]] = collections.deque(maxlen=remembered)
        self.nonfinite = update.nonfinite()[0]

    def train(self, steps: int) -> bool:
        """Trains up to a step; False if Ctrl-C or SIGTERM ended it before. Saves at the end either way."""
        start = self.number
        saved = start if checkpoint.steps(self.keeper.folder) else -1  # step of the last checkpoint
        with self._signals(), self._open_log(start, steps) as note, self._written():
            bucket = graphs.BUCKET if self.graphs is not None else 0
            batches = self.loader.ahead(start, steps, self.way.device, bucket)
            with contextlib.closing(batches):
                self.book.watch.read()  # until here it is set-up, which is in the wall time alone
                logged_at, clips = time.perf_counter(), 0
                while self.number < steps and not self.stop:
                    try:
                        with self.phase("data"):
                            batch = next(batches)
                    except ManifestError:  # too many bad files; what was learned until then is kept
                        if saved != self.number and distributed.ranks() == 1:
                            self._save()
                        raise
                    loss, parts = self._step(batch)
                    self._count(batch)
                    clips += len(batch)
                    log_now = self.number % self.options.log_every == 0 or self.number == steps
                    if log_now:
                        self.keeper.check()
                        row = self._read(loss, parts)
                        rate = distributed.ranks() * clips / (time.perf_counter() - logged_at)
                        note(self._row(row, rate))
                        self._judge_skipped(row)
                        logged_at, clips = time.perf_counter(), 0
                    if distributed.ranks() == 1:
                        self.stop = self.asked
                    note({"step": self.number})
                    if self._due(self.options.eval_every):
                        note(self._score())
                        saved = self.number
                        logged_at, clips = time.perf_counter(), 0
                    elif self._due(self.options.checkpoint_every):
                        self._save()
                        saved = self.number
            if saved != self.number:
                self._save()
        return self.number >= steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.number % every == 0

    def _step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        while True:
            try:
                loss, parts = self._forward_and_backward(batch)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                said, pairs = str(error).splitlines()[0], min(self.micro_batch, len(batch))
            self._make_room(pairs, said)
        with self.phase("optimizer"):
            self.update(self.number)
        return loss, parts

    def _forward_and_backward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.graphs is not None:
            with self.phase(REPLAYED):
                return self.graphs(batch)
        with self.phase(FORWARD):
            going_back = functools.partial(self.phase, "backward")
            if self.micro_batch < len(batch):
                loss, parts = backward_in_parts(self.step, batch, self.micro_batch, self.way.autocast, going_back)
                if self.engine is not self.step:
                    with going_back():
                        distributed.average_gradients(self.update.parameters)  # the engine has not seen these backwards
                return loss, parts
            with self.way.autocast():
                loss, parts = self.engine(batch)
            with going_back():
                loss.backward(seed_of(loss))
        return loss, parts

    def _make_room(self, pairs: int, said: str) -> None:
        """After an error that has left some gradients behind, if it is not beyond help."""
        half = (pairs + 1) // 2
        # The others wait in the middle of this step, and a rounded batch cannot be parted.
        if pairs == 1 or distributed.ranks() > 1 or self.graphs is not None:
            instead = f"--micro-batch {half}" + (" without --cuda-graphs" if self.graphs is not None else "")
            raise ValueError(
                f"out of memory with {pairs} pairs at once in a process: {said}. Try {instead} or a smaller "
                "--data.batch; --resume goes on from the last checkpoint."
            )
        self.update.optimizer.zero_grad(set_to_none=True)
        if self.way.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = half
        self.console.print(
            f"out of memory with {pairs} pairs at once; going on with {half} (--micro-batch {half}), which computes "
            "the same in more time",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip

    def _count(self, batch: Batch) -> None:
        self.number += 1
        self.names.append((self.number, batch.names))
        self.book.count(batch)

    def _read(self, loss: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
        """The one place of the loop where the host waits for the device, and the processes for each other."""
        update, ranks = self.update, distributed.ranks()
        means = torch.stack([loss.detach(), *(p.detach() for p in parts.values())]).float()
        asked = torch.full((1,), float(self.asked), device=means.device)
        told = distributed.total(torch.cat([means / ranks, asked]))
        own = torch.stack([update.norm, update.skipped, update.in_a_row])
        loss_now, *numbers, stop, norm, skipped, in_a_row = torch.cat([told, own]).tolist()
        self.stop = stop > 0
        return {
            "step": self.number, "loss": loss_now, **dict(zip(parts, numbers, strict=True)),
            "lr": learning_rate(self.number - 1, self.recipe.optim), "grad_norm": norm, "nonfinite_steps": skipped,
            "in_a_row": in_a_row,
        }  # fmt: skip

    def totals(self, **how: bool) -> dict[str, float]:
        """Of all processes, on the way to this step: what a kill has made to be done again is in the ledger alone. All
        have to ask, as for `Book.settle`."""
        turn = self.book.settle(self.number, **how)
        computed, dense = encoded(turn.tokens)
        found = {
            "clips": turn.clips, "tokens_computed": computed, "tokens_dense": dense,
            "device_seconds": sum(seconds for phase, seconds in turn.seconds.items() if phase not in BESIDE),
            "data_seconds": turn.seconds.get("data", 0.0), "wall_seconds": turn.wall_seconds,
        }  # fmt: skip
        return {"step": self.number, **{key: self.behind[key] + value for key, value in found.items()}}

    def _row(self, read: dict[str, float], rate: float) -> dict[str, float]:
        row = {**read, "clips_per_second": rate} | {
            k: v for k, v in self.totals().items() if k not in ("step", "wall_seconds")
        }
        del row["in_a_row"]
        return row

    def _judge_skipped(self, row: dict[str, float]) -> None:
        if row["nonfinite_steps"] > self.nonfinite:
            self.console.print(
                f"step {self.number}: {row['nonfinite_steps']:.0f} steps so far were left out, since their gradients "
                "were not finite",
                style="yellow", highlight=False, soft_wrap=True,
            )  # fmt: skip
            self.nonfinite = row["nonfinite_steps"]
        in_a_row = int(row["in_a_row"])
        if in_a_row < self.options.max_nonfinite:
            return
        path = self.folder / "nonfinite.json"
        named: dict[int, list[str]] = {}
        for several in distributed.collect(list(self.names)[-in_a_row:]):
            for step, names in several:
                named[step] = [*named.get(step, []), *names]
        if self.first:
            write(path, json.dumps(named, indent=2))
        raise ValueError(
            f"the gradients of {in_a_row} steps in a row, up to step {self.number}, were not finite; {path} names "
            f"their samples. The checkpoints in {self.folder} have finite weights. Try a lower --optim.lr or "
            "--optim.clip 1."
        )

    def _score(self) -> dict[str, float]:
        """Evaluates, and saves with the score that tells which checkpoint is the best."""
        with self.phase("evaluation"):
            result = distributed.tell(self.score())
        reached = {key: value for key, value in result.items() if key in ("t2v_r1", "v2t_r1", "acc")}
        found = {f"val_{key}": value for key, value in reached.items()}
        name, score = next(iter(found.items()))
        self._save(score)
        self.book.settle(self.number, wait=True)  # with its evaluation and its checkpoint
        self.book.reached(self.number, "val", reached)
        self.console.print(f"step {self.number}  {name} {score:.1%}", highlight=False)
        return {"step": self.number, **found}

    def _skips(self) -> list[Skip]:
        """What could not be decoded so far, of all processes."""
        return [skip for several in distributed.collect(list(self.loader.skipped.values())) for skip in several]

    def _save(self, score: float | None = None) -> None:
        with self.phase("checkpoint"):
            self.note_skipped(self._skips())
            state = {"totals": self.totals(), "nonfinite": self.update.nonfinite()}
            update, model = self.update, self.step.model
            self.keeper.save(self.number, model, update.optimizer, state, update.ema or None, score)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """What is being saved is on the disk at the end, whatever ends the loop but a second Ctrl-C."""
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self.keeper.wait()
            raise
        with self.phase("checkpoint"):
            self.keeper.wait()

    @contextlib.contextmanager
    def _open_log(self, start: int, steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """A function that writes a row of numbers to metrics.jsonl, TensorBoard and the screen."""
        if not self.first:
            yield lambda row: None
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before the first step

        path = self.folder / "metrics.jsonl"
        _cut(path, start)
        board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)
        with contextlib.closing(board), progress(self.console) as bars, open(path, "ab", buffering=0) as log:
            task = bars.add_task("training", total=steps, completed=start, note="")

            def note(row: dict[str, float]) -> None:
                if len(row) > 1:
                    # what is no number is no JSON either
                    finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
                    left = (json.dumps(finite) + "\n").encode()
                    with naming(self.folder):
                        while left:  # unbuffered, or closing would try again and hide which file had no room
                            left = left[log.write(left) :]
                        for key, value in row.items():
                            board.add_scalar(key, value, row["step"])
                if "loss" in row:
                    self._tell(row, bars, task)
                bars.update(task, completed=row["step"])

            yield note

    def _tell(self, row: dict[str, float], bars: Progress, task: Any) -> None:
        share = row["tokens_computed"] / row["tokens_dense"]
        parts = "  ".join(f"{name} {row[name]:.3f}" for name in self.recipe.objectives)
        said = f"loss {row['loss']:.3f}  {parts}  {row['clips_per_second']:.0f} clips/s  {share:.0%} of encoder tokens"
        bars.update(task, note=said)
        if not self.console.is_terminal:
            self.console.print(f"step {row['step']:.0f}  {said}", highlight=False)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step, or with several processes those up to the next log line. A second
        Ctrl-C does not wait; at once it would be torchrun's, which passes on to each what all have heard."""

        first = 0.0  # seconds; of the first signal

        def ask(number: int, frame: object) -> None:
            nonlocal first
            now = time.monotonic()
            if self.asked:
                if number == signal.SIGINT and now - first > 1:
                    raise KeyboardInterrupt
                return
            first, self.asked = now, True
            self.console.print("finishing the step and saving; once more to stop at once")

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def out_of_memory(error: Exception) -> bool:
    """On a CPU the allocator raises a RuntimeError that only its words tell apart."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _cut(path: Path, step: int) -> None:
    """Rows beyond the checkpoint will be written again."""
    if path.exists():
        rows = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        write(path, "".join(row + "\n" for row in rows))
