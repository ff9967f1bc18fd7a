"""A client that leaves -> cancelled work, which no framework sees to."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from litestar.types import Receive, Scope

from loraplex.gateway.connections import connection_of
from loraplex.gateway.errors import ClientLeft

T = TypeVar("T")

_MOMENT_SECONDS = 0.02  # work that takes no longer is not worth a task that watches its client


async def unless_client_leaves(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels it when the client disconnects. Raises ClientLeft."""
    task, has_left = asyncio.current_task(), False
    assert task is not None, "requests are answered in tasks"

    def leave() -> None:
        nonlocal has_left
        has_left = True
        task.cancel()

    connection = connection_of(scope)
    unwatch = _watch(receive, leave) if connection is None else connection.watch(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise ClientLeft("The client closed the connection before its answer was complete.") from None
    finally:
        unwatch()


def _watch(receive: Receive, leave: Callable[[], None]) -> Callable[[], None]:
    """Under any ASGI server: a task waits for the client to leave. Returns what ends that."""
    watchers: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    timer = asyncio.get_running_loop().call_later(
        _MOMENT_SECONDS, lambda: watchers.append(asyncio.create_task(watch()))
    )

    def unwatch() -> None:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()

    return unwatch
