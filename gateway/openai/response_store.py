"""Responses that outlive their request: in the database, each for its tenant alone, until they expire."""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, Select, delete, insert, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.errors import TenantNotFound
from loraplex.auth.store.tables import responses as table
from loraplex.gateway.errors import PreviousResponseNotFound, ResponseNotFound
from loraplex.gateway.openai.responses_items import InputItem

_LONGEST_CHAIN = 1000  # of responses that go on from one another
_FEW_TURNS = 16  # are read in a millisecond; more, in a thread
_PRUNE_SECONDS = 60.0


class _Output(msgspec.Struct):
    """The part of a stored response that a later one goes on from."""

    output: list[InputItem]


class StoredResponse(msgspec.Struct, frozen=True):
    """`response` is the object as JSON; `items` are what its request said, each with an id."""

    response: bytes
    items: list[dict[str, Any]]


class ResponseStore:
    """`retention_seconds` after a response began it is gone."""

    def __init__(self, database: AsyncEngine, retention_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._retention = retention_seconds
        self._clock = clock
        self._pruned_at = 0.0

    async def save(self, caller: Caller, response_id: str, stored: StoredResponse, previous_id: str | None) -> None:
        """Durable when it returns. Raises TenantNotFound where the tenant was deleted meanwhile."""
        now = self._clock()
        values = {
            "id": response_id,
            "tenant_id": caller.tenant_id or None,
            "previous_id": previous_id,
            "created_at": now,
            "expires_at": now + self._retention,
            "response": stored.response.decode(),
            "items": stored.items,
        }
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(table).values(**values))
                if now - self._pruned_at > _PRUNE_SECONDS:
                    self._pruned_at = now
                    await connection.execute(delete(table).where(table.c.expires_at <= now))
        except IntegrityError as error:
            raise TenantNotFound(f"There is no tenant {caller.tenant_id!r}.") from error

    async def get(self, caller: Caller, response_id: str) -> StoredResponse:
        """Raises ResponseNotFound, also for another tenant's and for one that expired."""
        async with self._database.connect() as connection:
            row = (await connection.execute(select(table).where(self._mine(caller, response_id)))).first()
        if row is None:
            raise _no_such_response(response_id)
        return StoredResponse(row.response.encode(), row.items)

    async def delete(self, caller: Caller, response_id: str) -> None:
        """Raises ResponseNotFound. Those that go on from it cannot be gone on from any more."""
        async with self._database.begin() as connection:
            result = await connection.execute(delete(table).where(self._mine(caller, response_id)))
        if not result.rowcount:
            raise _no_such_response(response_id)

    async def conversation(self, caller: Caller, response_id: str | None) -> list[InputItem]:
        """What was said up to and in this response, oldest first. Raises PreviousResponseNotFound."""
        if response_id is None:
            return []
        async with self._database.connect() as connection:
            rows = (await connection.execute(self._chain(caller, response_id))).all()
        missing = response_id if not rows else rows[-1].previous_id
        if missing is not None:  # deleted, expired, another tenant's, or beyond the longest chain
            raise PreviousResponseNotFound(f"Previous response with id {missing!r} not found.", "previous_response_id")
        said = partial(_said, rows)
        return await asyncio.to_thread(said) if len(rows) > _FEW_TURNS else said()

    def _chain(self, caller: Caller, response_id: str) -> Select[Any]:
        """A response and those it goes on from, the newest first."""
        columns = (table.c.id, table.c.previous_id)
        newest = select(*columns, literal(1).label("place")).where(self._mine(caller, response_id))
        chain = newest.cte("chain", recursive=True)
        mine = self._callers(caller)
        earlier = select(*columns, chain.c.place + 1).join(chain, table.c.id == chain.c.previous_id)
        chain = chain.union_all(earlier.where(mine, chain.c.place < _LONGEST_CHAIN))
        said = select(table.c.previous_id, table.c.response, table.c["items"])
        return said.join(chain, table.c.id == chain.c.id).order_by(chain.c.place)

    def _mine(self, caller: Caller, response_id: str) -> ColumnElement[bool]:
        # PostgreSQL refuses texts with a zero character
        return (table.c.id == response_id.replace("\0", "")) & self._callers(caller)

    def _callers(self, caller: Caller) -> ColumnElement[bool]:
        return (table.c.tenant_id == (caller.tenant_id or None)) & (table.c.expires_at > self._clock())


def _said(newest_first: Sequence[Row[Any]]) -> list[InputItem]:
    items: list[InputItem] = []
    for row in reversed(newest_first):
        items += msgspec.convert(row.items, list[InputItem])
        items += msgspec.json.decode(row.response, type=_Output).output
    return items


def _no_such_response(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id {response_id!r} not found.", "response_id")
