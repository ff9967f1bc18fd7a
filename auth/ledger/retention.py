"""Rows of requests that are older than they need be are deleted; what they come to by day stays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.store.tables import usage_records

_log = logging.getLogger("loraplex.ledger")

_EVERY_SECONDS = 3600.0
_BATCH = 1000


async def prune(database: AsyncEngine, before: float) -> int:
    """Delete the rows of requests that began earlier. Returns how many. Raises SQLAlchemyError or OSError."""
    table = usage_records
    old = select(table.c.request_id).where(table.c.began_at < before).limit(_BATCH)
    num_deleted = 0
    while True:
        async with database.begin() as connection:  # a short one each time: others write as well
            num_now = (await connection.execute(delete(table).where(table.c.request_id.in_(old)))).rowcount
        num_deleted += num_now
        if num_now < _BATCH:
            return num_deleted


class Retention:
    """Prunes at the start and every hour until it is closed."""

    def __init__(self, database: AsyncEngine, days: int, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._days = days
        self._clock = clock
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                num_deleted = await prune(self._database, self._clock() - self._days * 86400)
                if num_deleted:
                    _log.info("deleted %d usage records older than %d days", num_deleted, self._days)
            except (SQLAlchemyError, OSError) as error:
                _log.error("usage records could not be pruned: %s", error)
            await asyncio.sleep(_EVERY_SECONDS)
