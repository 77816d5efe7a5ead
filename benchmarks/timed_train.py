"""`smaug.train` with a clock in it, which is what bench_engine starts:

    python -m benchmarks.timed_train times.json smaug --fast --max-steps 60

The loop is the trainer's own. What it calls is timed, and the evaluation at its end is left out. Of each step the first
process writes the seconds by phase: forward, backward, clipping (with what else `Update` does), optimizer, waiting for
the batch, saving, the ledger (but for the marks between its own phases), and the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.timing import in_phases
from smaug import device, train
from smaug.data.loader import Batch, Loader
from smaug.ledger import Book, Stopwatch
from smaug.loop import Loop
from smaug.optim import Update


def main() -> int:
    path, *sys.argv[1:] = sys.argv[1:]
    watch, steps = Stopwatch(torch.device("cpu"), time.perf_counter), []
    ahead, count = Loader.ahead, Loop._count

    def waited_for(*arguments: Any) -> Iterator[Batch]:
        with contextlib.closing(ahead(*arguments)) as batches:
            while True:
                with watch.phase("waiting"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def counted(loop: Loop, batch: Batch) -> None:
        count(loop, batch)
        steps.append(watch.read())  # what follows, a log line or a checkpoint, is the next step's

    calls: dict[str, tuple[Any, *tuple[str, ...]]] = {
        "forward": (Loop, "_forward_and_backward"), "clipping": (Update, "__call__"), "saving": (Loop, "_save"),
        "ledger": (Book, "count", "settle"),
    }  # fmt: skip
    with (
        in_phases(watch, **calls),
        mock.patch.object(Loader, "ahead", waited_for),
        mock.patch.object(Loop, "_count", counted),
        mock.patch.object(train, "evaluate", lambda *_, **__: {}),
        mock.patch.object(train, "print_result", lambda *_: None),
    ):
        code = train.main()
    if os.environ.get("RANK", "0") == "0":
        machine = device.describe(torch.device("cpu"))
        Path(path).write_text(json.dumps({"machine": machine, "steps": steps}))
    return code


if __name__ == "__main__":
    sys.exit(main())
