"""What a run has cost and what it reached for that: RUN/ledger.json, written at every log line.

    ledger = read(Path("runs/a"))
    ledger.total().training_seconds / 3600      # device-hours, of all turns of the run
    ledger.results[-1].scores["t2v_r1"]

A turn is what one start of the run did. A run that is resumed begins another, and what a kill has made to be done again
stays counted: it was paid for. Time is told by marks between phases: on a GPU events of its stream, for which the host
does not wait. Tokens and FLOPs are reckoned from what the host knows of a batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import resource
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

import smaug
from smaug import cost, device, distributed
from smaug.data.loader import Batch
from smaug.model.model import Model
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import VtcHeads
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.run import warn, write
from smaug.step import Step, text_views

VERSION = 1  # of the file
FILE = "ledger.json"


@dataclass(frozen=True)
class Turn:
    """From a start of the run to its end. Device-seconds, clips, tokens, FLOPs and joules are sums over the processes
    of the turn; peak_bytes is the first one's."""

    began: str  # ISO 8601, UTC
    ended: str  # when this was written
    from_step: int
    to_step: int
    machine: str
    device: str  # "cpu" or "cuda"
    device_name: str
    way: str
    dtype: str
    processes: int
    command: str
    smaug: str  # version
    # Device-seconds by phase, of which each moment is in one: data (waiting for a batch), forward: its parts and rest,
    # backward, optimizer, checkpoint (what the loop stands still for), evaluation, rest. Set-up is in none.
    seconds: Mapping[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0  # of the turn, with its set-up
    clips: int = 0
    steps: int = 0
    tokens: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by stage: computed, and avoided by reason
    flops: float = 0.0  # of the model in the steps taken; see `Flops` for what is computed twice
    flops_dense: float = 0.0  # of the same batches with nothing left out, see `cost.dense`
    rate: float | None = None  # FLOP/s of a device at most; None: not known
    rate_is: str = ""
    peak_bytes: int = 0
    energy_joules: float | None = None  # evaluations included
    energy_is: str = ""  # how it was read, or why it was not

    @property
    def training_seconds(self) -> float:
        """Device-seconds of all phases but evaluation: the cost of a result. Waiting for data counts."""
        return sum(self.seconds.values()) - self.seconds.get("evaluation", 0.0)

    @property
    def utilisation(self) -> float | None:
        """The share of the device's rate that the model's FLOPs are, over all of the training."""
        if not (self.rate and self.flops and self.training_seconds):
            return None
        return self.flops / self.training_seconds / self.rate


@dataclass(frozen=True)
class Result:
    """A score, and what had been spent when it was reached: by all turns, its own evaluation included."""

    step: int
    split: str  # "val": while it trained; "test": at the end, whatever one's own files are called
    scores: Mapping[str, float]
    device_seconds: float
    evaluation_seconds: float  # of these, those of evaluations
    wall_seconds: float
    date: str  # ISO 8601, UTC
    clips: int | None = None  # trained on by then, those of steps that were done again included; None: not known
    flops: float | None = None  # of the model, likewise

    @property
    def training_seconds(self) -> float:
        """As of `Turn`: what the score has cost."""
        return self.device_seconds - self.evaluation_seconds


@dataclass(frozen=True)
class Ledger:
    turns: tuple[Turn, ...]
    results: tuple[Result, ...]

    def total(self) -> Turn:
        """All turns as one: sums, the highest peak, the mean rate, what it ran on from the newest. Rate and energy are
        None if those of a turn are."""
        newest = self.turns[-1]
        tokens = {
            stage: dict(_sum(t.tokens.get(stage, {}) for t in self.turns)) for t in self.turns for stage in t.tokens
        }
        energies = [t.energy_joules for t in self.turns]
        rates = [t.rate * t.training_seconds if t.rate is not None else None for t in self.turns]
        seconds = sum(t.training_seconds for t in self.turns)
        return replace(
            newest,
            began=self.turns[0].began,
            from_step=self.turns[0].from_step,
            seconds=dict(_sum(t.seconds for t in self.turns)),
            wall_seconds=sum(t.wall_seconds for t in self.turns),
            clips=sum(t.clips for t in self.turns),
            steps=sum(t.steps for t in self.turns),
            tokens=tokens,
            flops=sum(t.flops for t in self.turns),
            flops_dense=sum(t.flops_dense for t in self.turns),
            rate=None if None in rates or not seconds else sum(r for r in rates if r is not None) / seconds,
            peak_bytes=max(t.peak_bytes for t in self.turns),
            energy_joules=None if None in energies else sum(e for e in energies if e is not None),
        )


def _sum(several: Iterable[Mapping[str, float]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in several:
        found.update(one)
    return found


def read(folder: Path) -> Ledger:
    """The ledger of a run's folder. ValueError, of one line, where it has none or the file is damaged."""
    path = folder / FILE
    try:
        saved = json.loads(path.read_text())
        if saved["version"] != VERSION:
            raise ValueError(f"its version is {saved['version']}, and this smaug reads {VERSION}")
        ledger = Ledger(tuple(Turn(**t) for t in saved["turns"]), tuple(Result(**r) for r in saved["results"]))
        ledger.total()  # numbers that cannot be added are none
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no ledger: there is no {path}. `python -m smaug.train` writes it") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {str(error) or type(error).__name__}") from None
    return ledger


# --- time -------------------------------------------------------------------------------------------------------------

FORWARD = "forward: rest"
REPLAYED = "forward and backward"  # with CUDA graphs, which have no marks inside
BESIDE = ("data", "checkpoint", "evaluation")  # phases in which no step is computed
MARKS = 256  # on a GPU, kept before it is asked which of them it has passed


class Stopwatch:
    """Seconds by phase; outside all phases it is "rest", and a phase within another stops that one's clock.

    On a GPU by events of its stream, so that nothing waits for the device before `read`. To the profiler, if it is on,
    phases are spans.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.now = device.type == "cuda", now
        self.running: tuple[str, ...] = ("rest",)
        self.seconds: Counter[str] = Counter()
        self.marks: deque[tuple[str, Any]] = deque([("rest", self._mark())])  # what runs from when on

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.running
        self._switch((*before, name))
        try:
            with record_function(f"phase {name}"):
                yield
        finally:
            self._switch(before)

    def read(self, wait: bool = True) -> Counter[str]:
        """Since the last reading, or the first moment. wait: for a GPU; else what it has not done yet is left for the
        next one."""
        self._switch(self.running)
        if self.cuda and wait:
            self.marks[-1][1].synchronize()
        self._settle()
        seconds, self.seconds = self.seconds, Counter()
        return seconds

    def _switch(self, running: tuple[str, ...]) -> None:
        self.running = running
        self.marks.append((running[-1], self._mark()))
        if not self.cuda or len(self.marks) > MARKS:
            self._settle()

    def _settle(self) -> None:
        while len(self.marks) > 1 and (not self.cuda or self.marks[1][1].query()):
            (name, began), (_, ended) = self.marks.popleft(), self.marks[0]
            self.seconds[name] += began.elapsed_time(ended) / 1e3 if self.cuda else ended - began

    def _mark(self) -> Any:
        if not self.cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def parts(model: Model) -> dict[str, nn.Module]:
    """What the forward of a step is told apart by, by phase."""
    named = {
        "video encoder": model.video, "text encoder": model.text, "frame selector": model.selector,
        "fusion encoder": model.fusion, **model.heads,
    }  # fmt: skip
    return {f"forward: {name}": module for name, module in named.items() if module is not None}


def time_parts(model: Model, watch: Stopwatch) -> None:
    """From now on each part of the model runs in a phase of its own, where it is called in the phase FORWARD: not in an
    evaluation, nor where a backward computes it again. Losses behind the heads stay in FORWARD.

    Method by method, as `blocks` does: compiled blocks and the hooks of FSDP2 are inside and outside of it.
    """

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if watch.running[-1] != FORWARD:
                return call(*args, **kwargs)
            with watch.phase(name):
                return call(*args, **kwargs)

        return inner

    for name, module in parts(model).items():
        for method in ("embed", "scores") if isinstance(module, VtcHeads) else ("forward",):
            setattr(module, method, timed(getattr(module, method), name))


# --- tokens -----------------------------------------------------------------------------------------------------------

Tokens = dict[str, dict[str, int]]


def count_tokens(recipe: Recipe, batch: Batch) -> Tokens:
    """Of a training step by stage: computed, and what was avoided by reason; together all that there is.

    video encoder   rows, [CLS] included, a mean over the blocks, in which fused tokens count.
    text encoder    rows of all views of the captions that are told apart; "padding" up to the longest of the batch.
    fusion encoder  keys that a text looks at, once for each pair of a text and a video that meet. Where a batch mixes
                    videos and images, which of them a negative meets only the device knows: then it is a mean.
    pixel decoder   rows that enter; "not decoded" are masked patches, "pruned" those whose states it is not given.

    Of batches with capacity (`Batch.rounded`) rows are those that are computed, and padding is not known.
    """
    mvm = next((o for o in recipe.objectives.values() if isinstance(o, Mvm)), None)
    rows = dict.fromkeys(("computed", "masked", "pruned"), 0)
    keys = dict.fromkeys(("computed", "masked", "pruned", "not selected"), 0)  # if each clip met one text
    pixels = dict.fromkeys(("computed", "not decoded", "pruned"), 0)
    for group in batch.groups:
        clips, seen = len(group.samples), cost.video_tokens(recipe, batch.step, group.video.shape[1])
        each, (entered, *_, kept), last = seen.sequences, seen.patches, seen.rows[-1]
        removed, sequences = seen.masked, clips * each
        computed = round(sequences * sum(seen.rows[1:]) / recipe.model.video.depth)
        rows["computed"] += computed
        rows["masked"] += sequences * removed
        rows["pruned"] += sequences * (1 + entered) - computed
        looked = min(each, recipe.model.selector.keep or each)
        keys["computed"] += clips * looked * last
        keys["masked"] += sequences * removed
        keys["pruned"] += sequences * (1 + entered - last)
        keys["not selected"] += clips * (each - looked) * last
        if mvm is not None and removed:
            asked = min(removed, max(1, round(mvm.decoder.share * removed)))
            given = entered if mvm.decoder.decoder_input == "exit" else kept
            pixels["computed"] += sequences * (given + mvm.decoder.cls + asked)
            pixels["not decoded"] += sequences * (removed - asked)
            pixels["pruned"] += sequences * (entered - given)

    words = dict.fromkeys(("computed", "dropped", "padding"), 0)
    views = text_views(recipe, batch)
    for view in {id(view): view for view in views.values()}.values():
        whole = batch.options if batch.options is not None and view is batch.options else batch.words
        words["computed"] += view.rows
        words["dropped"] += whole.rows - view.rows
        words["padding"] += whole.num_sequences * whole.max_seqlen - whole.rows if whole.lengths is not None else 0

    found = {"video encoder": rows, "text encoder": words}
    if recipe.model.fusion.depth:
        pairs = len(batch)
        negatives = [min(o.negatives, pairs) for o in recipe.objectives.values() if isinstance(o, Vtm)]
        met = sum(pairs * (1 + n) for n in negatives)
        met += sum(view.num_sequences for name, view in views.items() if name in ("options", "question", "masked"))
        found["fusion encoder"] = {why: round(met * n / pairs) for why, n in keys.items()}
    return found | ({} if mvm is None else {"pixel decoder": pixels})


def encoded(tokens: Mapping[str, Mapping[str, int]]) -> tuple[int, int]:
    """Rows that both encoders have computed, and rows if nothing were masked, dropped or pruned."""
    both = [tokens.get(stage, {}) for stage in ("video encoder", "text encoder")]
    computed = sum(stage.get("computed", 0) for stage in both)
    return computed, sum(n for stage in both for why, n in stage.items() if why != "padding")


# --- FLOPs ------------------------------------------------------------------------------------------------------------


class Flops:
    """Of steps, by `cost.parts`: own and dense. What a backward computes again counts once, but for the logits of
    attention, which torch counts again, too. That takes a millisecond, so it is asked once for each state of the
    schedule; from there on lengths of texts count linearly, which leaves out the squares of attention among words."""

    def __init__(self, recipe: Recipe, vocabulary: int, world: int) -> None:
        self.recipes, self.vocabulary, self.world = (recipe, cost.dense(recipe)), vocabulary, world
        self.known: dict[tuple[int, ...], tuple[dict[str, float], list[tuple[float, dict[str, float]]]]] = {}

    def __call__(self, batch: Batch, rows: Mapping[str, int]) -> list[float]:
        """rows: of the video encoder, which tell states of the schedule apart."""
        pairs = len(batch)
        at: dict[str, float] = {"words": batch.words.rows / pairs}
        if batch.masked is not None and batch.counters is None:  # with capacity their number is on the device
            at["masked"] = len(batch.masked_labels) / pairs
        if batch.begun is not None:
            at["beginnings"] = batch.begun.num_sequences / pairs
            at["begun_words"] = batch.begun.rows / batch.begun.num_sequences
        options = batch.options.num_sequences // pairs if batch.options is not None else 0
        found = [0.0, 0.0]
        for group in batch.groups:  # of a mix, as if each kind were a batch
            clips, frames = len(group.samples), group.video.shape[1]
            key = (clips, frames, options, *rows.values())
            if key not in self.known:
                load = cost.Load(clips, frames=frames, options=options, step=batch.step, world=self.world)
                self.known[key] = at, [self._slopes(recipe, load, at) for recipe in self.recipes]
            there, known = self.known[key]
            for i, (flops, slopes) in enumerate(known):
                found[i] += flops + sum(slope * (at[name] - there[name]) for name, slope in slopes.items())
        return found

    def _slopes(self, recipe: Recipe, load: cost.Load, at: dict[str, float]) -> tuple[float, dict[str, float]]:
        def flops(at: dict[str, float]) -> float:
            given: dict[str, Any] = at
            counted = cost.parts(recipe, replace(load, **given), vocabulary=self.vocabulary)
            return cost.total(counted.values()).step_flops

        here = flops(at)
        return here, {name: flops(at | {name: value + 1}) - here for name, value in at.items()}


# --- what a device is and consumes ------------------------------------------------------------------------------------


@functools.cache
def rate_of(way: device.Way) -> tuple[float, str]:
    """FLOP/s at most, and what that is: of the data sheet for bf16 on a GPU that `cost` knows, else measured now."""
    if way.device.type == "cuda":
        gpu = cost.of_gpu(torch.cuda.get_device_name(way.device))
        if gpu is not None and way.dtype is torch.bfloat16:
            return gpu.flops, "data sheet, bf16"
    side = 8192 if way.device.type == "cuda" else 1024
    return device.matrix_rate(way), f"measured, product of {side} x {side}"


def peak_bytes(device: torch.device) -> int:
    """Of what torch has allocated on a GPU; on a CPU of the whole process, Python and data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def energy(device: torch.device) -> tuple[Callable[[], float], str]:
    """Joules that a device has consumed from now on, NaN where that is not known; and how it is read, or why not."""
    if device.type != "cuda":
        return lambda: math.nan, "NVML reads NVIDIA GPUs, and this ran on a CPU"
    try:
        import pynvml
    except ImportError:
        return lambda: math.nan, "needs nvidia-ml-py: pip install -c constraints.txt -e '.[energy]'"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        first = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # mJ since the driver was loaded
    except pynvml.NVMLError as error:
        return lambda: math.nan, f"NVML: {error}"

    def joules() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - first) / 1e3
        except pynvml.NVMLError:  # no reason to end a run
            return math.nan

    return joules, "NVML, of the whole GPU"


# --- the ledger of a run that runs ------------------------------------------------------------------------------------


class Book:
    """What this turn has cost so far. Each process counts its own; the first one writes what all have."""

    def __init__(
        self, folder: Path, step: Step, way: device.Way, *, at: int, began: float, command: str, fast: bool,
        past: Ledger, graphs: bool = False,
    ) -> None:  # fmt: skip
        """at: steps that were taken before. began: by time.perf_counter, before the set-up. graphs: whether steps are
        recorded, which marks inside would spoil."""
        self.path, self.recipe, self.began, self.past = folder / FILE, step.recipe, began, past
        self.written = [asdict(turn) for turn in past.turns]
        self.results = [asdict(result) for result in past.results]
        self.joules, energy_is = energy(way.device)
        rate, rate_is = rate_of(way)
        machine = device.describe(way.device)
        self.turn = Turn(
            began=_now(), ended="", from_step=at, to_step=at, machine=machine, device=way.device.type,
            device_name=machine.split(",")[0], way=("--fast: " if fast else "") + way.why,
            dtype=str(way.dtype).removeprefix("torch."), processes=distributed.ranks(), command=command,
            smaug=smaug.__version__, rate=rate, rate_is=rate_is, energy_is=energy_is,
        )  # fmt: skip
        self.device = way.device
        self.flops = Flops(step.recipe, step.model.text.word.num_embeddings, distributed.ranks())
        phases = ("data", *parts(step.model), FORWARD, REPLAYED, "backward", "optimizer", *BESIDE, "rest")
        # The same keys in all processes, whose numbers are added.
        self.own: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.own.update({("seconds", name): 0.0 for name in phases})
        self.others: dict[tuple[str, ...], float] = {}  # of the other processes, when they last told
        self.watch = Stopwatch(way.device)
        if not graphs:
            time_parts(step.model, self.watch)
        if way.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(way.device)  # the set-up had its own, as of `rate_of`

    def count(self, batch: Batch) -> None:
        """A step that was taken."""
        tokens = count_tokens(self.recipe, batch)
        own, dense = self.flops(batch, tokens["video encoder"])
        self.own["clips",] += len(batch)
        self.own["flops",] += own
        self.own["dense",] += dense
        for stage, reasons in tokens.items():
            for why, n in reasons.items():
                self.own["tokens", stage, why] += n

    def settle(self, step: int, *, together: bool = True, wait: bool = False) -> Turn:
        """The turn up to a step, of all processes, which the first one writes. All have to call it, but at the very
        end, when the first is the last (together=False). wait: as for `Stopwatch.read`."""
        for name, seconds in self.watch.read(wait).items():
            self.own["seconds", name] += seconds
        self.own["joules",] = self.joules()
        if together and distributed.ranks() > 1:
            names = sorted(self.own)
            own = torch.tensor([self.own[name] for name in names], dtype=torch.float64, device=self.device)
            self.others = dict(zip(names, (distributed.total(own) - own).tolist(), strict=True))
        sums = {name: value + self.others.get(name, 0.0) for name, value in self.own.items()}
        tokens: Tokens = {}
        for _, stage, why in (name for name in sums if name[0] == "tokens"):
            tokens.setdefault(stage, {})[why] = round(sums["tokens", stage, why])
        joules = sums["joules",]
        self.turn = replace(
            self.turn, ended=_now(), to_step=step, steps=step - self.turn.from_step, tokens=tokens,
            seconds={name[1]: value for name, value in sums.items() if name[0] == "seconds" and value},
            wall_seconds=time.perf_counter() - self.began, clips=round(sums.get(("clips",), 0.0)),
            flops=sums.get(("flops",), 0.0), flops_dense=sums.get(("dense",), 0.0), peak_bytes=peak_bytes(self.device),
            energy_joules=None if math.isnan(joules) else joules,
        )  # fmt: skip
        self._write()
        return self.turn

    def total(self) -> Turn:
        """With the turns before."""
        return Ledger((*self.past.turns, self.turn), ()).total()

    def reached(self, step: int, split: str, scores: Mapping[str, float]) -> None:
        """A result, and what it has cost up to the last `settle`, which on a GPU has to wait."""
        spent = self.total()
        counted = all(turn.flops or not turn.steps for turn in (*self.past.turns, self.turn))  # else see `behind`
        result = Result(
            step, split, dict(scores), sum(spent.seconds.values()), spent.seconds.get("evaluation", 0.0),
            spent.wall_seconds, _now(), spent.clips, spent.flops if counted else None,
        )  # fmt: skip
        self.results.append(asdict(result))
        self._write()

    def _write(self) -> None:
        if distributed.rank() == 0:
            turns = [*self.written, asdict(self.turn)]
            write(self.path, json.dumps({"version": VERSION, "turns": turns, "results": self.results}))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def behind(folder: Path, totals: Mapping[str, float]) -> Ledger:
    """The ledger of a run that is resumed, for the first process, which writes it. Of a run that has none, or one that
    is damaged and is put aside, what its checkpoint's totals say."""
    if distributed.rank():
        return Ledger((), ())
    why = "not recorded: the run began before there were ledgers"
    path = folder / FILE
    if path.exists():
        try:
            return read(folder)
        except ValueError as error:
            aside = path.with_name(f"{FILE}.damaged")
            if aside.exists():  # what it had, nothing else has
                raise
            path.rename(aside)
            warn([f"{error}; it is {aside.name} from now on, and costs before this start are those of the checkpoint"])
            why = f"not recorded: {FILE} was damaged"
    if not totals["step"]:
        return Ledger((), ())
    turn = Turn(
        began="", ended="", from_step=0, to_step=int(totals["step"]), machine=why, device="", device_name="", way=why,
        dtype="", processes=1, command=why, smaug="", wall_seconds=totals["wall_seconds"], rate_is=why, energy_is=why,
        seconds={"data": totals["data_seconds"], "rest": totals["device_seconds"]}, clips=round(totals["clips"]),
        steps=int(totals["step"]),
    )  # fmt: skip
    return Ledger((turn,), ())
