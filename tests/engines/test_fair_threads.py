"""Owners take turns at the threads, whatever becomes of their work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
from support.work import Work

from loraplex.engines.fair_threads import FairThreads


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def noted(order: list[str], name: str) -> None:
    order.append(name)


def test_owner_with_much_work_leaves_threads_to_others() -> None:
    threads = FairThreads(3, 2, "test")
    heavy = [Work() for _ in range(6)]
    results = [threads.submit("heavy", work) for work in heavy]
    until(lambda: sum(work.began.is_set() for work in heavy) == 2)
    assert threads.submit("light", lambda: 7).result(10) == 7
    assert [work.began.is_set() for work in heavy] == [True, True, False, False, False, False]
    for work in heavy:
        work.goes.set()
    assert [result.result(10) for result in results] == ["done"] * 6


def test_owners_take_turns() -> None:
    threads, first = FairThreads(1, 1, "test"), Work()
    threads.submit("a", first)
    order: list[str] = []
    results = [threads.submit(name, partial(noted, order, name)) for name in "aaabbc"]
    first.goes.set()
    for result in results:
        result.result(10)
    assert "".join(order) == "abcaba"


def test_what_is_cancelled_is_left_out() -> None:
    threads, work = FairThreads(1, 1, "test"), Work()
    running = threads.submit("a", work)
    waiting = [threads.submit("b", partial(int, text)) for text in ("1", "2")]
    until(work.began.is_set)
    assert not running.cancel()
    assert waiting[0].cancel()
    work.goes.set()
    assert waiting[1].result(10) == 2
    assert threads.submit("b", lambda: 3).result(10) == 3


def test_work_that_fails_gives_its_thread_back() -> None:
    threads = FairThreads(1, 1, "test")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            threads.submit("a", lambda: 1 // 0).result(10)
