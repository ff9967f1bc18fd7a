"""What takes long of a request beside its computing: done in threads, so that it holds up no stream.

Tenants take turns at them. Before it is known how much a request asks for, its tenant's limits hold it as one more.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from litestar import Request

from loraplex.engines.fair_threads import FairThreads
from loraplex.gateway.accounts import Accounts
from loraplex.gateway.guards import caller_of
from loraplex.gateway.middleware import tell_limits

# Few: what a long text takes in memory is taken as often. More than one tenant may have: others find one free.
_NUM_THREADS, _MOST_EACH = 4, 2

T = TypeVar("T")


class LongWork:
    """For all requests of one server."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._threads = FairThreads(_NUM_THREADS, _MOST_EACH, "long-work")

    async def do(self, request: Request[Any, Any, Any], work: Callable[[], T], *, is_counted: bool) -> T:
        """What the work gives. Of one that `is_counted` it is first seen whether its caller may ask anything now.

        Raises what the work raises; LimitReached, or LimitsUnavailable.
        """
        caller = caller_of(request)
        if not is_counted:
            return await self._in_turn(caller.tenant_id, work)
        async with self._accounts.preparing(caller, partial(tell_limits, request)):
            return await self._in_turn(caller.tenant_id, work)

    async def _in_turn(self, tenant_id: str, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._threads.submit(tenant_id, work))
