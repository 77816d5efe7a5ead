"""Worker threads that can be left behind: one that a C library does not give back is replaced, never waited for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """`workers` daemon threads. concurrent.futures would wait for one that hangs, at the latest when Python exits."""

    def __init__(self, workers: int, seconds: float):
        if workers < 1:
            raise ValueError(f"{workers} threads decode nothing; --data.workers is at least 1")
        self.workers, self.seconds = workers, seconds
        self.left_behind = 0  # threads that never came back
        self._work: queue.SimpleQueue[tuple[_Call, int, Any] | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        threading.Thread(target=_serve, args=(self._work,), name="smaug-decode", daemon=True).start()

    def map(self, work: Callable[[T], R], items: Sequence[T], late: Callable[[T], R]) -> list[R]:
        """Results in order; `late(item)` for one that takes longer than `seconds`. Raises what `work` raises."""
        call = _Call(work)
        for number, item in enumerate(items):
            self._work.put((call, number, item))
        try:
            with call.changed:
                while len(call.done) < len(items):
                    call.changed.wait(timeout=0.2)
                    for number, started in call.running.items():
                        if number not in call.done and time.monotonic() - started > self.seconds:
                            call.done[number] = (late(items[number]), None)
                            self.left_behind += 1
                            self._start()
        finally:
            call.over = True  # Ctrl-C: what still waits in the queue is not begun
        done, call.done = call.done, dict.fromkeys(call.done, (None, None))  # a thread left behind holds no frames
        for number in range(len(items)):
            if (error := done[number][1]) is not None:
                raise error
        return [done[number][0] for number in range(len(items))]

    def close(self) -> None:
        """Lets the threads end once they have nothing to do."""
        for _ in range(self.workers):
            self._work.put(None)


class _Call:
    """One `map`: what runs and what has come back."""

    def __init__(self, work: Callable[[Any], Any]):
        self.work = work
        self.over = False
        self.running: dict[int, float] = {}  # number of an item -> when a thread took it
        self.done: dict[int, tuple[Any, BaseException | None]] = {}
        self.changed = threading.Condition()  # guards the two


def _serve(work: queue.SimpleQueue[tuple[_Call, int, Any] | None]) -> None:
    while (task := work.get()) is not None:
        call, number, item = task
        with call.changed:
            call.running[number] = time.monotonic()
        try:
            outcome: tuple[Any, BaseException | None] = (None, None) if call.over else (call.work(item), None)
        except BaseException as error:  # it belongs to the thread that called map
            outcome = (None, error)
        with call.changed:
            if number in call.done:  # given up, and another thread has taken this one's place
                return
            call.done[number] = outcome
            del call.running[number]
            call.changed.notify()
        del task, call, item, outcome  # an idle thread holds no frames
