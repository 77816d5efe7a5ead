"""Training steps recorded as CUDA graphs: the host starts one thing where it would start hundreds of kernels.

A graph replays what it recorded, to the address and the number. So a batch is rounded up to few sets of shapes and
copied to where the graph reads (`Batch.rounded`), random draws count by a tensor, and what the host decides by the step
(what is masked, how many patches stay) tells recorded steps apart. What cannot be recorded, or does not recur, runs as
it does without graphs; the losses and gradients are the same.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smaug import distributed
from smaug.data.loader import Batch
from smaug.objectives.answer import Answer
from smaug.objectives.mlm import Mlm
from smaug.ops.implementation import load_kernels
from smaug.recipe import Recipe
from smaug.step import Step, keep_rate, seed_of, video_mask

BUCKET = 256  # rows of words are rounded up to a multiple of this
MOST = 4  # graphs: each has gradients of its own, as large as the weights; activations share their memory
RECENT = 64  # steps among which a set of shapes has to recur to be recorded
WARM_UPS = 2  # runs before a recording: what compiles, allocates or is chosen at first sight must not be recorded

Result = tuple[Tensor, dict[str, Tensor]]  # the loss and its parts


def check(recipe: Recipe, device: torch.device, impl: str, micro_batch: int) -> None:
    """ValueError, of one line, where the steps of a run cannot be recorded."""
    wrong = ""
    spelled = any(isinstance(o, Answer) and o.by == "decoder" for o in recipe.objectives.values())
    if device.type != "cuda":
        wrong = f"needs a CUDA device, and this run is on the {device.type}"
    elif distributed.ranks() > 1:
        wrong = f"records the steps of a single process, and these are {distributed.ranks()}"
    elif impl == "reference":
        wrong = "records the Triton kernels: add --fast"
    elif load_kernels() != "ok":
        wrong = f"records the Triton kernels, which cannot run here: {load_kernels().rstrip('.')}"
    elif micro_batch:
        wrong = "records steps of whole batches: leave out --micro-batch"
    elif spelled and any(isinstance(o, Mlm) for o in recipe.objectives.values()):
        wrong = "cannot round up batches with both masked words and answers that are spelled"
    if wrong:
        raise ValueError(f"--cuda-graphs {wrong}; without it the run would start")


@dataclass(frozen=True)
class Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # where it reads the batch
    gradients: list[Tensor | None]  # where it leaves those of the parameters
    loss: Tensor
    parts: dict[str, Tensor]


class Graphs:
    """`loss, parts = step(batch); loss.backward()` for rounded batches, by a graph where one is recorded.

    The gradients that parameters had are lost; those of a graph are its own, and the next replay overwrites them. Loss
    and parts come detached: a graph of autograd that outlives a step would bind the next recording to its stream.
    """

    def __init__(self, step: Step, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self.step, self.autocast = step, autocast
        self.parameters = [p for p in step.parameters() if p.requires_grad]
        self.recorded: dict[Hashable, Recorded] = {}
        self.recent: collections.deque[Hashable] = collections.deque(maxlen=RECENT)

    def __call__(self, batch: Batch) -> Result:
        key = self._key(batch)
        if key not in self.recorded:
            if key is None or key not in self.recent or len(self.recorded) == MOST:
                self.recent.append(key)
                return self._run(batch)
            self.recorded[key] = self._record(batch)
        found = self.recorded[key]
        for there, x in zip(found.inputs, tensors(batch), strict=True):
            there.copy_(x)
        found.graph.replay()
        for p, grad in zip(self.parameters, found.gradients, strict=True):
            p.grad = grad
        return found.loss.clone(), {name: part.clone() for name, part in found.parts.items()}

    def _key(self, batch: Batch) -> Hashable | None:
        """All that a step depends on beside the numbers in tensors; None: it cannot be recorded, or will not recur."""
        recipe = self.step.recipe
        prune = recipe.model.video.prune
        warming = bool(prune.blocks) and keep_rate(recipe, batch.step) != prune.keep
        # Where images begin behind videos the host tells the device, and a graph takes no copy from there.
        if batch.counters is None or len(batch.groups) > 1 or warming:
            return None
        return video_mask(recipe, batch.step), tuple((x.shape, x.dtype) for x in tensors(batch))

    def _run(self, batch: Batch) -> Result:
        forget(self.parameters)
        with self.autocast():
            loss, parts = self.step(batch)
        loss.backward(seed_of(loss))
        return loss.detach(), {name: part.detach() for name, part in parts.items()}

    def _record(self, batch: Batch) -> Recorded:
        own = batch.map(torch.clone)
        pool = next((found.graph.pool() for found in self.recorded.values()), None)
        try:
            graph, (loss, parts) = record(lambda: self._run(own), self.parameters, pool)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = str(error).splitlines()[0]
            raise ValueError(f"a step cannot be recorded: {said}; --resume without --cuda-graphs goes on") from error
        gradients = [p.grad for p in self.parameters]
        return Recorded(graph, tensors(own), gradients, loss, parts)


def record(run: Callable[[], Result], parameters: Sequence[Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `run` and the result that its replays fill in; nothing has been computed yet.

    pool: that of another graph, whose memory it may use, or None.
    """
    side = side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
        forget(parameters)  # so that the recording makes gradients of its own instead of adding to these
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's thread pins memory meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        result = run()
    return graph, result


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all recordings: graphs that share memory have to be recorded on the same."""
    return torch.cuda.Stream()


def forget(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.grad = None


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in an order that is the same for all."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    batch.map(note)
    return found
