"""Threads for the work of many owners, who take turns: one with much of it holds up no other."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class FairThreads:
    """Each owner has at most so many of them at once. For any thread."""

    def __init__(self, num_threads: int, most_each: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num_free = num_threads
        self._most_each = most_each
        self._guard = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[Callable[[], bool]]] = OrderedDict()

    def submit(self, owner: str, work: Callable[[], T]) -> Future[T]:
        """What the work gives, once it was its owner's turn; before that it can be cancelled."""
        result: Future[T] = Future()

        def begin() -> bool:
            if not result.set_running_or_notify_cancel():
                return False
            self._threads.submit(self._do, owner, work, result)
            return True

        with self._guard:
            self._waiting.setdefault(owner, deque()).append(begin)
            self._admit()
        return result

    def _do(self, owner: str, work: Callable[[], T], result: Future[T]) -> None:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001  it is told to whoever waits
            self._leave(owner)
            result.set_exception(error)
        else:
            self._leave(owner)
            result.set_result(found)

    def _leave(self, owner: str) -> None:
        with self._guard:
            self._num_free += 1
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            self._admit()

    def _admit(self) -> None:
        """Give the free threads to those who wait: one to each owner, and again from the first."""
        for owner in list(self._waiting):
            turns = self._waiting[owner]
            while turns and self._num_free and self._running[owner] < self._most_each:
                if turns.popleft()():
                    self._num_free -= 1
                    self._running[owner] += 1
                    self._waiting.move_to_end(owner)
                    break
            if not turns:
                del self._waiting[owner]
