"""Batches in the database: what was asked, who works on it, and every answer there is so far.

An answer is written once, under the number of its line, in the same transaction that counts it. A gateway that dies
leaves a lease that runs out; whoever takes the batch up then answers the lines that have no answer.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, and_, case, delete, false, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.store.tables import batch_answers as answers
from loraplex.auth.store.tables import batches as table
from loraplex.auth.tenants import require_tenant
from loraplex.gateway.errors import BatchNotCancellable, BatchNotFound
from loraplex.gateway.files.store import UNFINISHED, FileStore, StoredFile, behind, ordering

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
WINDOW_SECONDS = 86400.0  # the 24 hours of the only completion window there is
_ID = re.compile(r"batch_[0-9a-f]{24}")
_PAGE = 500
_COUNTED = frozenset({"num_completed", "num_failed", "num_prompt_tokens", "num_cached_tokens",
                      "num_completion_tokens", "num_reasoning_tokens", "num_deaths"})  # fmt: skip


class BatchProblem(msgspec.Struct, frozen=True):
    """Why a line of the input, or all of it, cannot be worked on. Lines count from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. `moments` says when it entered each state, in seconds since 1970; `details` is the client's own."""

    id: str
    tenant_id: str
    key_id: str
    endpoint: Endpoint
    input_file_id: str
    status: Status
    created_at: float
    expires_at: float
    moments: dict[str, float]
    details: dict[str, str] | None = None
    errors: list[BatchProblem] | None = None
    output_seconds: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_reasoning_tokens: int = 0
    owner: str | None = None
    leased_until: float | None = None
    num_deaths: int = 0  # of gateways that worked on it, since its last answer


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One line's answer: `text` is a line of the output file, or of the error file."""

    line: int
    text: str
    is_error: bool
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_reasoning_tokens: int = 0


class LeaseLost(Exception):
    """Another gateway works on the batch, or it is gone."""


class BatchRecords:
    """The batches of all tenants; what clients ask names the tenant, and another's batches are not found."""

    def __init__(self, database: AsyncEngine, files: FileStore) -> None:
        self._database = database
        self._files = files
        self._recording = asyncio.Lock()  # SQLite lets one write at a time, and lets the others try again and again
        self.owner = f"gateway_{secrets.token_hex(8)}"

    async def create(
        self,
        caller: Caller,
        endpoint: Endpoint,
        input_file_id: str,
        details: dict[str, str] | None,
        output_seconds: int | None,
    ) -> Batch:
        """A new batch, which any gateway may take up. Raises FileNotFound."""
        file = await self._files.get(caller.tenant_id, input_file_id)
        now = time.time()
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            endpoint=endpoint,
            input_file_id=file.id,
            status="validating",
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            moments={},
            details=details,
            output_seconds=output_seconds,
        )
        async with self._database.begin() as connection:
            if caller.tenant_id:
                await require_tenant(connection, caller.tenant_id)
            await connection.execute(insert(table).values(**msgspec.to_builtins(batch)))
        return batch

    async def get(self, tenant_id: str, batch_id: str) -> Batch:
        """Raises BatchNotFound, also for another tenant's."""
        async with self._database.connect() as connection:
            return await self._find(connection, tenant_id, batch_id)

    async def page(self, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """(batches, newest first, whether more follow). Raises BatchNotFound for a cursor that is none."""
        mine = table.c.tenant_id == tenant_id
        async with self._database.connect() as connection:
            if after is not None:
                mine &= behind(table, await self._find(connection, tenant_id, after), "desc")
            query = select(table).where(mine).order_by(*ordering(table, "desc")).limit(limit + 1)
            found = [_batch(row) for row in await connection.execute(query)]
        return found[:limit], len(found) > limit

    async def cancel(self, tenant_id: str, batch_id: str) -> Batch:
        """Whoever works on it stops soon. Raises BatchNotFound, or BatchNotCancellable for one that is over."""
        async with self._database.begin() as connection:
            await _lock(connection, table.c.id == batch_id if _ID.fullmatch(batch_id) else false())
            batch = await self._find(connection, tenant_id, batch_id)
            if batch.status not in ("validating", "in_progress", "cancelling"):
                raise BatchNotCancellable(f"A batch that is {batch.status} cannot be cancelled.", "batch_id")
            if batch.status != "cancelling":
                batch = _moved(batch, "cancelling")
                await self._change(connection, batch)
        return batch

    async def claim(self, most: int, lease_seconds: float) -> list[Batch]:
        """Up to so many batches that nobody works on, oldest first, one of each tenant before a second of any."""
        now, claimed = time.time(), []
        free = or_(table.c.leased_until.is_(None), table.c.leased_until < now)
        num_deaths = table.c.num_deaths + case((table.c.owner != self.owner, 1), else_=0)  # NULL where it was let go
        turn = func.row_number().over(partition_by=table.c.tenant_id, order_by=table.c.created_at)
        query = select(table.c.id, turn.label("turn"), table.c.created_at).where(table.c.status.in_(UNFINISHED), free)
        ranked = query.subquery()
        order = select(ranked.c.id).order_by(ranked.c.turn, ranked.c.created_at).limit(most)
        async with self._database.begin() as connection:
            for (batch_id,) in (await connection.execute(order)).all():
                mine = {"owner": self.owner, "leased_until": now + lease_seconds, "num_deaths": num_deaths}
                taken = await connection.execute(update(table).where(table.c.id == batch_id, free).values(**mine))
                if taken.rowcount:
                    row = (await connection.execute(select(table).where(table.c.id == batch_id))).one()
                    claimed.append(_batch(row))
        return claimed

    async def renew(self, batch_id: str, lease_seconds: float) -> Batch:
        """Say that this gateway still works on it. Raises LeaseLost."""
        async with self._database.begin() as connection:
            lease = update(table).where(self._is_mine(batch_id)).values(leased_until=time.time() + lease_seconds)
            if not (await connection.execute(lease)).rowcount:
                raise LeaseLost(batch_id)
            return _batch((await connection.execute(select(table).where(table.c.id == batch_id))).one())

    async def release(self, batch_id: str) -> None:
        """Let any gateway go on with it at once."""
        async with self._database.begin() as connection:
            await connection.execute(update(table).where(self._is_mine(batch_id)).values(owner=None, leased_until=None))

    async def move(self, batch: Batch, status: Status, **changes: Any) -> Batch:
        """The batch enters a state, unless it was cancelled meanwhile: then it stays so. Raises LeaseLost."""
        async with self._database.begin() as connection:
            await self._hold(connection, batch.id)
            row = (await connection.execute(select(table).where(table.c.id == batch.id))).one()
            batch = msgspec.structs.replace(_batch(row), **changes)
            if batch.status != "cancelling":
                batch = _moved(batch, status)
            await self._change(connection, batch)
        return batch

    async def answered(self, batch_id: str) -> set[int]:
        """The lines that have an answer."""
        async with self._database.connect() as connection:
            return set(await connection.scalars(select(answers.c.line).where(answers.c.batch_id == batch_id)))

    async def record(self, batch_id: str, answer: Answer) -> None:
        """Keep and count an answer; one more for the same line, or for a batch that is gone, is dropped."""
        counted = {
            table.c.num_failed if answer.is_error else table.c.num_completed: 1,
            table.c.num_prompt_tokens: answer.num_prompt_tokens,
            table.c.num_cached_tokens: answer.num_cached_tokens,
            table.c.num_completion_tokens: answer.num_completion_tokens,
            table.c.num_reasoning_tokens: answer.num_reasoning_tokens,
        }
        row = {"batch_id": batch_id, "line": answer.line, "is_error": answer.is_error, "answer": answer.text}
        try:
            async with self._recording, self._database.begin() as connection:
                await connection.execute(insert(answers).values(**row))
                more = {column.name: column + number for column, number in counted.items()}
                await connection.execute(update(table).where(table.c.id == batch_id).values(**more, num_deaths=0))
        except IntegrityError:
            return

    async def texts(self, batch_id: str, *, is_error: bool) -> AsyncIterator[tuple[int, str]]:
        """(line, answer) in the order of lines."""
        last = -1
        mine = and_(answers.c.batch_id == batch_id, answers.c.is_error == is_error)
        while True:
            query = select(answers.c.line, answers.c.answer).where(mine, answers.c.line > last)
            async with self._database.connect() as connection:
                rows = (await connection.execute(query.order_by(answers.c.line).limit(_PAGE))).all()
            for line, text in rows:
                yield line, text
                last = line
            if len(rows) < _PAGE:
                return

    async def finish(self, batch: Batch, status: Status, output: StoredFile | None, errors: StoredFile | None) -> None:
        """The batch is over: its files and its last state appear together. Raises LeaseLost."""
        over = msgspec.structs.replace(
            _moved(batch, status),
            output_file_id=output and output.id,
            error_file_id=errors and errors.id,
            owner=None,
            leased_until=None,
        )
        async with self._database.begin() as connection:
            await self._hold(connection, batch.id)
            for file in (output, errors):
                if file is not None:
                    await self._files.enter(connection, file)
            await self._change(connection, over)
            await connection.execute(delete(answers).where(answers.c.batch_id == batch.id))

    def _is_mine(self, batch_id: str) -> ColumnElement[bool]:
        return and_(table.c.id == batch_id, table.c.owner == self.owner)

    async def _hold(self, connection: AsyncConnection, batch_id: str) -> None:
        """Raises LeaseLost unless the batch is this gateway's until the transaction ends."""
        if not await _lock(connection, self._is_mine(batch_id)):
            raise LeaseLost(batch_id)

    async def _find(self, connection: AsyncConnection, tenant_id: str, batch_id: str) -> Batch:
        row = None
        if _ID.fullmatch(batch_id):
            query = select(table).where(table.c.tenant_id == tenant_id, table.c.id == batch_id)
            row = (await connection.execute(query)).first()
        if row is None:
            raise BatchNotFound(f"There is no batch {batch_id!r}.", "batch_id")
        return _batch(row)

    async def _change(self, connection: AsyncConnection, batch: Batch) -> None:
        """Write a batch as it is now; counts are only ever counted up."""
        values = {name: value for name, value in msgspec.to_builtins(batch).items() if name not in _COUNTED}
        await connection.execute(update(table).where(table.c.id == batch.id).values(**values))


async def _lock(connection: AsyncConnection, which: ColumnElement[bool]) -> bool:
    """Keep everyone else from changing a batch until the transaction ends; whether there is one.

    A write that changes nothing: the one way to lock a row that SQLite and PostgreSQL share.
    """
    result = await connection.execute(update(table).where(which).values(status=table.c.status))
    return bool(result.rowcount)


def _moved(batch: Batch, status: Status) -> Batch:
    moments = {**batch.moments, status: time.time()}
    return msgspec.structs.replace(batch, status=status, moments=moments)


def _batch(row: Any) -> Batch:
    return msgspec.convert({str(column): value for column, value in row._mapping.items()}, Batch)
