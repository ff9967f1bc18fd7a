"""What takes long of a request before it is known how much it asks for: done in threads, within its tenant's limits.

Such work holds up no stream, and a tenant with much of it holds up no other tenant.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from litestar import Request

from loraplex.gateway.accounts import Accounts
from loraplex.gateway.guards import caller_of
from loraplex.gateway.middleware import tell_limits

# Few: what a long text takes in memory is taken as often. More than an owner may have: there is always one soon.
_NUM_THREADS, _MOST_EACH = 4, 2

T = TypeVar("T")


class LongWork:
    """For all requests of one server."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._threads = FairThreads(_NUM_THREADS, _MOST_EACH)

    async def do(self, request: Request[Any, Any, Any], work: Callable[[], T], *, is_counted: bool) -> T:
        """What the work gives. Of one that `is_counted` it is first seen whether its caller may ask anything now.

        Raises what the work raises; LimitReached, or LimitsUnavailable.
        """
        caller = caller_of(request)
        if not is_counted:
            return await self._threads.do(caller.tenant_id, work)
        async with self._accounts.preparing(caller, partial(tell_limits, request)):
            return await self._threads.do(caller.tenant_id, work)


class FairThreads:
    """Threads for the work of many owners, who take turns; each has at most so many at once. For one event loop."""

    def __init__(self, num_threads: int, most_each: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "long-work")
        self._num_free = num_threads
        self._most_each = most_each
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def do(self, owner: str, work: Callable[[], T]) -> T:
        """What the work gives, once there is a thread for its owner. Whoever leaves while it is done waits no longer,
        but its thread is free only when it is.
        """
        await self._turn(owner)
        loop = asyncio.get_running_loop()
        doing = self._threads.submit(work)

        def over(_: object) -> None:
            with suppress(RuntimeError):  # the loop ended before the work
                loop.call_soon_threadsafe(self._leave, owner)

        doing.add_done_callback(over)
        return await asyncio.wrap_future(doing)

    async def _turn(self, owner: str) -> None:
        """Wait for a thread, and take it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(owner)
            raise

    def _leave(self, owner: str) -> None:
        self._num_free += 1
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]
        self._admit()

    def _admit(self) -> None:
        """Give the free threads to those who wait: one to each owner, and again from the first."""
        for owner in list(self._waiting):
            turns = self._waiting[owner]
            while turns and turns[0].cancelled():
                turns.popleft()
            if not turns:
                del self._waiting[owner]
            elif self._num_free and self._running[owner] < self._most_each:
                self._num_free -= 1
                self._running[owner] += 1
                turns.popleft().set_result(None)
                self._waiting.move_to_end(owner)
