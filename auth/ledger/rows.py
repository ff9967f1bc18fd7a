"""Usage records in the database: inserted once, whoever tries again, and summed up by day as they are inserted."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.metering import UsageRecord
from loraplex.auth.store.tables import usage_days, usage_records

SUMS = ("num_requests", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")
_PLACE = ("day", "tenant_id", "key_id", "model")
_DAY = (*_PLACE, *SUMS)


def _sqlite_insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) ON CONFLICT DO "


_SQLITE_ADD = _sqlite_insert("usage_records", UsageRecord.__struct_fields__) + "NOTHING"
_SQLITE_ADD_TO_DAYS = _sqlite_insert("usage_days", _DAY).replace("CONFLICT", f"CONFLICT ({', '.join(_PLACE)})") + (
    "UPDATE SET " + ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)
)


def day_of(seconds: float) -> str:
    """The UTC date, as in `usage_days`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


class RowWriter(Protocol):
    """Writes usage records."""

    async def insert(self, records: Sequence[UsageRecord]) -> None:
        """All of them, or none where it raises. One that is there already changes nothing."""
        ...

    async def close(self) -> None: ...


def row_writer(database: AsyncEngine) -> RowWriter:
    """The one for the kind of database."""
    name = database.url.database or ""
    if database.dialect.name == "sqlite" and name and not name.startswith((":memory:", "file:")):
        return SqliteWriter(name)
    return StatementWriter(database)


class StatementWriter:
    """Implements `RowWriter` through SQLAlchemy, for any database it knows conflicts of."""

    def __init__(self, database: AsyncEngine) -> None:
        self._database = database
        insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[database.dialect.name]
        self._add = insert(usage_records).on_conflict_do_nothing().returning(usage_records.c.request_id)
        into_days = insert(usage_days)
        added: dict[str, Any] = {name: usage_days.c[name] + into_days.excluded[name] for name in SUMS}
        self._add_to_days = into_days.on_conflict_do_update(index_elements=_PLACE, set_=added)

    async def insert(self, records: Sequence[UsageRecord]) -> None:
        if not records:
            return
        # In order: PostgreSQL's writers wait for each other's rows as they meet them, in a circle otherwise.
        rows = [msgspec.structs.asdict(record) for record in sorted(records, key=lambda record: record.request_id)]
        async with self._database.begin() as connection:
            inserted = {row.request_id for row in await connection.execute(self._add, rows)}
            days = _days([record for record in records if record.request_id in inserted])
            if days:
                await connection.execute(self._add_to_days, [dict(zip(_DAY, day, strict=True)) for day in days])

    async def close(self) -> None: ...


class SqliteWriter:
    """Implements `RowWriter` in a thread, on a connection of its own: several times cheaper for the event loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._connection: sqlite3.Connection | None = None

    async def insert(self, records: Sequence[UsageRecord]) -> None:
        if records:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._insert, records)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _insert(self, records: Sequence[UsageRecord]) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, isolation_level=None)
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            inserted = [
                record for record in records if cursor.execute(_SQLITE_ADD, msgspec.structs.astuple(record)).rowcount
            ]
            cursor.executemany(_SQLITE_ADD_TO_DAYS, _days(inserted))
            cursor.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise
        finally:
            cursor.close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


async def tokens_since(database: AsyncEngine, tenant_id: str, key_id: str | None, day: str) -> int:
    """Tokens of prompts and answers of requests that began on this day or later."""
    query = select(
        func.coalesce(func.sum(usage_days.c.num_prompt_tokens + usage_days.c.num_completion_tokens), 0)
    ).where(usage_days.c.tenant_id == tenant_id, usage_days.c.day >= day)
    if key_id is not None:
        query = query.where(usage_days.c.key_id == key_id)
    async with database.connect() as connection:
        return int((await connection.execute(query)).scalar_one())


def _days(records: Sequence[UsageRecord]) -> list[tuple[Any, ...]]:
    """What to add to `usage_days`, in order, so that two that write at once wait for each other and not in a circle."""
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for record in records:
        place = (day_of(record.began_at), record.tenant_id, record.key_id, record.model)
        amounts = (1, record.num_prompt_tokens, record.num_cached_tokens, record.num_completion_tokens)
        sums[place] = [sum(pair) for pair in zip(sums.get(place, (0, 0, 0, 0)), amounts, strict=True)]
    return [(*place, *amounts) for place, amounts in sorted(sums.items())]
