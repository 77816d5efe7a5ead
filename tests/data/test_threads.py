"""Threads that are left behind, not waited for."""

import threading
import time

import pytest

from smaug.data.decode.threads import Threads


def test_results_come_in_order_whatever_takes_longer():
    threads = Threads(3, 10)
    assert threads.map(lambda i: (time.sleep(0.001 * (i % 3)), i)[1], range(50), lambda i: -1) == list(range(50))
    assert threads.map(lambda i: i, [], lambda i: -1) == []
    threads.close()


def test_no_threads_would_wait_for_ever():
    with pytest.raises(ValueError, match="0 threads decode nothing"):
        Threads(0, 10)


def test_errors_reach_who_asked_and_the_threads_go_on():
    threads = Threads(2, 10)
    with pytest.raises(ZeroDivisionError):
        threads.map(lambda i: 1 // i, [1, 0, 2], lambda i: -1)
    assert threads.map(lambda i: 1 // i, [1, 2], lambda i: -1) == [1, 0]
    threads.close()


def test_what_hangs_is_given_up_and_the_others_are_not():
    release = threading.Event()
    threads = Threads(2, 0.3)
    began = time.monotonic()
    # Both threads hang; what waits behind them is not late, since its time counts from when it is begun.
    got = threads.map(lambda i: release.wait() if i < 2 else i, range(6), lambda i: f"{i} is late")
    assert got == ["0 is late", "1 is late", 2, 3, 4, 5] and threads.left_behind == 2
    assert time.monotonic() - began < 5
    count = threading.active_count()
    release.set()
    until = time.monotonic() + 5
    while threading.active_count() > count - 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == count - 2  # those that came back ended: others have their places
    assert threads.map(lambda i: i, range(4), lambda i: -1) == [0, 1, 2, 3]
    threads.close()
