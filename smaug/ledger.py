"""What a run has cost and what it reached for that: RUN/ledger.json, written at every log line.

    ledger = read(Path("runs/a"))
    ledger.total().training_seconds / 3600      # device-hours, of all turns of the run
    ledger.results[-1].scores["t2v_r1"]

A turn is what one start of the run did. A run that is resumed begins another, and what a kill has made to be done again
stays counted: it was paid for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

VERSION = 1  # of the file
FILE = "ledger.json"


@dataclass(frozen=True)
class Turn:
    """From a start of the run to its end. Numbers are sums over the processes of the turn but for wall_seconds, and for
    peak_bytes, which is the first one's."""

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
    flops: float = 0.0  # of the model in the steps taken; what is computed twice counts once
    flops_dense: float = 0.0  # of the same batches with nothing left out, see `cost.dense`
    rate: float | None = None  # FLOP/s of a device at most; None: not known
    rate_is: str = ""
    peak_bytes: int = 0
    energy_joules: float | None = None
    energy_is: str = ""  # how it was read, or why it was not

    @property
    def training_seconds(self) -> float:
        """Device-seconds of all phases but evaluation: the cost of a result. Waiting for data counts."""
        return sum(self.seconds.values()) - self.seconds.get("evaluation", 0.0)

    @property
    def utilisation(self) -> float | None:
        """The share of the device's rate that the model's FLOPs are, over all of the training."""
        if not self.rate or not self.training_seconds:
            return None
        return self.flops / self.training_seconds / self.rate


@dataclass(frozen=True)
class Result:
    """A score, and what had been spent when it was reached: by all turns, its own evaluation included."""

    step: int
    split: str  # "val" or "test"
    scores: Mapping[str, float]
    device_seconds: float
    evaluation_seconds: float  # of these, those of evaluations
    wall_seconds: float
    date: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Ledger:
    turns: tuple[Turn, ...]
    results: tuple[Result, ...]

    def total(self) -> Turn:
        """All turns as one: sums, the highest peak, what it ran on from the newest. The energy is None if that of a turn
        is; so is the rate, or if they differ, since then there is no one rate that is used in part."""
        newest = self.turns[-1]
        tokens = {
            stage: dict(_sum(t.tokens.get(stage, {}) for t in self.turns)) for t in self.turns for stage in t.tokens
        }
        energies = [t.energy_joules for t in self.turns]
        rates = {t.rate for t in self.turns}
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
            rate=newest.rate if len(rates) == 1 else None,
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
