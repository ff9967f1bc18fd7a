"""How gateways on one database learn of each other's changes: a number for each topic, raised with every change.

Whoever changes something raises its topic's number in the same transaction; every process reads the numbers a few
times a second. It works alike on every database and through every pooler, and needs no connection of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Self

from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.errors import KeysUnavailable
from loraplex.auth.store.tables import changes

_log = logging.getLogger("loraplex.changes")

ACCESS = "access"  # tenants, keys, admin keys, limits
CATALOGUE = "catalogue"  # adapters, their versions and routes
# A change in one process is known in every other after this many seconds and one query at most.
POLL_SECONDS = 0.2
_REST = 4.0


async def announce(connection: AsyncConnection, topic: str) -> None:
    """Part of the caller's transaction, and its last part: the number's row is locked until the transaction ends."""
    await connection.execute(update(changes).where(changes.c.topic == topic).values(number=changes.c.number + 1))


class ChangeWatch:
    """Calls back when a topic's number was raised, by whichever process."""

    def __init__(self, database: AsyncEngine, poll_seconds: float = POLL_SECONDS) -> None:
        self._database = database
        self._poll_seconds = poll_seconds
        self._callbacks: dict[str, list[Callable[[], Awaitable[None]]]] = defaultdict(list)
        self._resting: dict[str, float] = {}  # topics that rest -> until when
        self._known: dict[str, int] = {}
        self._is_away = False
        self._task: asyncio.Task[None] | None = None

    def on(self, topic: str, callback: Callable[[], Awaitable[None]], *, rests: bool = False) -> None:
        """A topic that `rests` is let alone for four times as long as its callbacks took, however fast it changes."""
        self._callbacks[topic].append(callback)
        if rests:
            self._resting[topic] = 0.0

    async def __aenter__(self) -> Self:
        """What changes from now on is noticed."""
        self._known = await self._read()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None, "it was entered"
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Read the numbers once, and call back for those that are new."""
        found = await self._read()
        clock = asyncio.get_running_loop().time
        for topic, number in found.items():
            began = clock()
            if number != self._known.get(topic) and began >= self._resting.get(topic, 0.0):
                for callback in self._callbacks[topic]:
                    await callback()
                self._known[topic] = number  # after the callbacks: one that failed is called again
                if topic in self._resting:
                    self._resting[topic] = clock() + _REST * (clock() - began)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.look()
            except (SQLAlchemyError, OSError, KeysUnavailable) as error:
                if not self._is_away:
                    _log.error("changes made by other gateways cannot be read: %s", type(error).__name__)
                self._is_away = True
            else:
                self._is_away = False

    async def _read(self) -> dict[str, int]:
        async with self._database.connect() as connection:
            rows = await connection.execute(select(changes.c.topic, changes.c.number))
            return {row.topic: row.number for row in rows}
