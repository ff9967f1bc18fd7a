"""Usage records in the database: inserted once, whoever tries again, and summed up by day as they are inserted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.metering import UsageRecord
from loraplex.auth.store.tables import usage_days, usage_records

SUMS = ("num_requests", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def day_of(seconds: float) -> str:
    """The UTC date, as in `usage_days`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


async def insert_records(database: AsyncEngine, records: Sequence[UsageRecord]) -> None:
    """All of them, or none where it raises SQLAlchemyError or OSError. One that is there already changes nothing."""
    if not records:
        return
    rows = [msgspec.structs.asdict(record) for record in records]
    statement = _insert(database, usage_records).on_conflict_do_nothing().returning(usage_records.c.request_id)
    async with database.begin() as connection:
        inserted = {row.request_id for row in await connection.execute(statement, rows)}
        await _add_to_days(database, connection, [record for record in records if record.request_id in inserted])


async def tokens_since(database: AsyncEngine, tenant_id: str, key_id: str | None, day: str) -> int:
    """Tokens of prompts and answers of requests that began on this day or later."""
    query = select(
        func.coalesce(func.sum(usage_days.c.num_prompt_tokens + usage_days.c.num_completion_tokens), 0)
    ).where(usage_days.c.tenant_id == tenant_id, usage_days.c.day >= day)
    if key_id is not None:
        query = query.where(usage_days.c.key_id == key_id)
    async with database.connect() as connection:
        return int((await connection.execute(query)).scalar_one())


async def _add_to_days(database: AsyncEngine, connection: AsyncConnection, records: Sequence[UsageRecord]) -> None:
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for record in records:
        place = (day_of(record.began_at), record.tenant_id, record.key_id, record.model)
        amounts = (1, record.num_prompt_tokens, record.num_cached_tokens, record.num_completion_tokens)
        sums[place] = [sum(pair) for pair in zip(sums.get(place, (0, 0, 0, 0)), amounts, strict=True)]
    if not sums:
        return
    # in order, so that two gateways that write at once wait for each other and not in a circle
    rows = [dict(zip((*_PLACE, *SUMS), (*place, *amounts), strict=True)) for place, amounts in sorted(sums.items())]
    statement = _insert(database, usage_days)
    added: dict[str, ColumnElement[Any]] = {name: usage_days.c[name] + statement.excluded[name] for name in SUMS}
    await connection.execute(statement.on_conflict_do_update(index_elements=_PLACE, set_=added), rows)


_PLACE = ("day", "tenant_id", "key_id", "model")


def _insert(database: AsyncEngine, table: Table) -> Any:
    """The dialect's own, which knows conflicts."""
    return _INSERT[database.dialect.name](table)
