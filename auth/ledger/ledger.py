"""The books of a server: every request's slot in the journal, and its row in the database soon after it is over.

A row is queued when its request is settled and written with its neighbours in one transaction; until that is
committed the slot stands, so the books lose nothing that a process was told, however it ends. Writing again what is
there changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.errors import LimitsUnavailable, UsageUnrecorded
from loraplex.auth.ledger.journal import Journal, Leftover, fitting, leftovers
from loraplex.auth.ledger.rows import RowWriter, day_of, row_writer, tokens_since
from loraplex.auth.metering import Entry, UsageRecord

_log = logging.getLogger("loraplex.ledger")

_BATCH = 200
_GATHER_SECONDS = 0.02  # a row waits so long for neighbours
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
_LAST_FLUSH_SECONDS = 10.0
_MAX_UNWRITTEN = 100_000  # rows that the database did not take; beyond these no request is taken on


class Ledger:
    """Implements `Books` over a database and a journal. Made by `open_ledger`.

    `recovered` are the tenants and keys of requests that dead processes had left.
    """

    def __init__(
        self, database: AsyncEngine, rows: RowWriter, journal: Journal, recovered: frozenset[tuple[str, str]]
    ) -> None:
        self.recovered = recovered
        self._database = database
        self._rows = rows
        self._journal = journal
        self._queue: list[UsageRecord] = []
        self._unfit: set[str] = set()  # requests that run and whose records are not as the database can hold them
        self._num_settled = self._num_written = 0
        self._flushes: list[tuple[int, asyncio.Future[None]]] = []  # done when so many are written
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        self._writer = asyncio.create_task(self._write())

    def begin(self, record: UsageRecord) -> Entry:
        if len(self._queue) >= _MAX_UNWRITTEN:
            raise UsageUnrecorded("The database does not take what requests use; no more are taken on until it does.")
        fitted = fitting(record)
        entry = self._journal.begin(fitted)
        if fitted is not record:
            self._unfit.add(record.request_id)
        return entry

    def settle(self, record: UsageRecord) -> None:
        if record.request_id in self._unfit:
            self._unfit.remove(record.request_id)
            record = fitting(record)
        self._journal.settle(record)
        self._queue.append(record)
        self._num_settled += 1
        self._news.set()
        if len(self._queue) >= _BATCH:
            self._hurry.set()

    async def spent(self, tenant_id: str, key_id: str | None, since: float) -> int:
        try:
            await self.flush()
            return await tokens_since(self._database, tenant_id, key_id, day_of(since))
        except (UsageUnrecorded, SQLAlchemyError, OSError) as error:
            raise LimitsUnavailable("What was used so far cannot be read at the moment.") from error

    async def flush(self) -> None:
        """All that was settled until now is in the database. Raises UsageUnrecorded where it does not take it."""
        if self._num_written == self._num_settled:
            return
        done = asyncio.get_running_loop().create_future()
        self._flushes.append((self._num_settled, done))
        self._hurry.set()
        await done

    async def close(self) -> None:
        """Write what is left; what the database does not take stays in the journal, for the next start."""
        try:
            async with asyncio.timeout(_LAST_FLUSH_SECONDS):
                await self.flush()
        except (UsageUnrecorded, TimeoutError):
            _log.error("%d usage records stay in the journal until the next start", len(self._queue))
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await self._rows.close()
        self._journal.close()

    async def _write(self) -> None:
        pause = 0.0
        while True:
            await self._news.wait()
            await self._gather()
            batch = self._queue[:_BATCH]
            try:
                await self._rows.insert(batch)
            except Exception as error:  # noqa: BLE001  drivers have errors of their own, and no row may be lost to one
                if not pause:
                    _log.error("usage records cannot be written, trying again: %s", error)
                self._refuse_flushes(error)
                pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(pause)
                continue
            if pause:
                _log.warning("usage records are written again")
            pause = 0.0
            self._written(batch)

    async def _gather(self) -> None:
        """Let rows come together, unless there are enough or someone waits for them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_SECONDS):
                await self._hurry.wait()

    def _written(self, batch: list[UsageRecord]) -> None:
        self._journal.free(record.request_id for record in batch)
        del self._queue[: len(batch)]
        self._num_written += len(batch)
        while self._flushes and self._flushes[0][0] <= self._num_written:
            _, done = self._flushes.pop(0)
            if not done.done():  # whoever waits may have been cancelled
                done.set_result(None)
        if not self._queue:
            self._news.clear()
        if len(self._queue) < _BATCH and not self._flushes:
            self._hurry.clear()

    def _refuse_flushes(self, error: Exception) -> None:
        for _, done in self._flushes:
            if not done.done():
                refusal = UsageUnrecorded("What requests used cannot be written down at the moment.")
                refusal.__cause__ = error
                done.set_exception(refusal)
        self._flushes.clear()


async def open_ledger(database: AsyncEngine, directory: Path) -> Ledger:
    """Settle what dead processes left in the directory, then open a journal there.

    Raises OSError, or SQLAlchemyError or sqlite3.Error where the database does not take what was left.
    """
    rows = row_writer(database)
    recovered: set[tuple[str, str]] = set()
    try:
        for leftover in leftovers(directory):
            recovered.update((record.tenant_id, record.key_id) for record in await _settle(rows, leftover))
        return Ledger(database, rows, Journal(directory), frozenset(recovered))
    except BaseException:
        await rows.close()
        raise


async def _settle(rows: RowWriter, leftover: Leftover) -> list[UsageRecord]:
    try:
        records, num_damaged = leftover.records()
    except ValueError as error:
        aside = leftover.set_aside()
        _log.error("%s is kept as %s and not settled: %s", leftover.path, aside.name, error)
        return []
    for start in range(0, len(records), _BATCH):
        await rows.insert(records[start : start + _BATCH])
    if records:
        _log.warning("settled %d requests of a gateway that ended without warning", len(records))
    if num_damaged:
        aside = leftover.set_aside()
        _log.error("%s is kept as %s: %d requests in it cannot be read", leftover.path, aside.name, num_damaged)
    else:
        leftover.remove()
    return records
