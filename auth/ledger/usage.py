"""What was used, as it is asked about: sums by tenant, key, model and day, sums over time, and the single requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Select, Table, and_, cast, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.ledger.rows import SUMS
from loraplex.auth.metering import UsageRecord
from loraplex.auth.store.tables import usage_days, usage_records

Dimension = Literal["day", "tenant_id", "key_id", "model"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
_PAGE = 1000


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Whose usage, and of which models; None leaves a dimension open."""

    tenant_ids: tuple[str, ...] | None = None
    key_ids: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None

    def conditions(self, table: Table) -> list[ColumnElement[bool]]:
        """On `usage_days` or `usage_records`."""
        asked = ((table.c.tenant_id, self.tenant_ids), (table.c.key_id, self.key_ids), (table.c.model, self.models))
        return [column.in_(values) for column, values in asked if values is not None]


class Sums(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What some requests used together. Only the dimensions that were asked for are set.

    `since` is the begin of a stretch of time in seconds since 1970, `day` a UTC date.
    """

    since: int | None = None
    day: str | None = None
    tenant_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


class Usage:
    """Reads the books of one database; `write_down` brings them up to date first, as far as this process goes."""

    def __init__(self, database: AsyncEngine, write_down: Callable[[], Awaitable[None]]) -> None:
        self._database = database
        self._write_down = write_down

    async def by_day(self, scope: Scope, first: str | None, last: str | None, by: Sequence[Dimension]) -> list[Sums]:
        """Of the UTC dates from `first` to `last`, both included; in the order of what it is summed by.

        Whole days are known as long as the books exist, whatever was pruned.
        """
        conditions = scope.conditions(usage_days)
        if first is not None:
            conditions.append(usage_days.c.day >= first)
        if last is not None:
            conditions.append(usage_days.c.day <= last)
        columns = [usage_days.c[name] for name in by]
        sums = [func.coalesce(func.sum(usage_days.c[name]), 0).label(name) for name in SUMS]
        query = select(*columns, *sums).where(*conditions).group_by(*columns).order_by(*columns)
        return await self._sums(query)

    async def by_time(self, scope: Scope, since: int, until: int, seconds: int, by: Sequence[Dimension]) -> list[Sums]:
        """Of requests that began in [since, until), for each stretch of so many seconds since 1970 that has any.

        Only of requests that are not pruned.
        """
        table = usage_records
        number = table.c.began_at / seconds
        # SQLite's cast cuts off, PostgreSQL's rounds
        whole = func.floor(number) if self._database.dialect.name == "postgresql" else number
        begin = (cast(whole, BigInteger) * seconds).label("since")
        columns = [begin, *(table.c[name] for name in by)]
        sums = [func.count().label("num_requests"), *(func.sum(table.c[name]).label(name) for name in SUMS[1:])]
        conditions = [*scope.conditions(table), table.c.began_at >= since, table.c.began_at < until]
        return await self._sums(select(*columns, *sums).where(*conditions).group_by(*columns).order_by(*columns))

    async def requests(self, scope: Scope, since: float, until: float) -> AsyncIterator[list[UsageRecord]]:
        """Pages of the requests that began in [since, until), oldest first. Holds no connection between them."""
        table = usage_records
        conditions = [*scope.conditions(table), table.c.began_at < until]
        after: ColumnElement[bool] = table.c.began_at >= since
        await self._write_down()
        while True:
            query = select(table).where(*conditions, after).order_by(table.c.began_at, table.c.request_id).limit(_PAGE)
            async with self._database.connect() as connection:
                page = [UsageRecord(**row) for row in (await connection.execute(query)).mappings()]
            yield page
            if len(page) < _PAGE:
                return
            last = page[-1]
            later_name = and_(table.c.began_at == last.began_at, table.c.request_id > last.request_id)
            after = or_(table.c.began_at > last.began_at, later_name)

    async def _sums(self, query: Select[Any]) -> list[Sums]:
        await self._write_down()
        async with self._database.connect() as connection:
            rows = (await connection.execute(query)).mappings()
            return [msgspec.convert({str(name): _plain(value) for name, value in row.items()}, Sums) for row in rows]


def _plain(value: Any) -> Any:
    """PostgreSQL sums bigints to numerics."""
    return value if isinstance(value, str) else int(value)
