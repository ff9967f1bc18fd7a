"""The audit log: a row for every admin action, begun before it happens and ended with its outcome.

An action that cannot be written down does not happen, and one that was cut off by a crash stays `begun`. Rows are
never changed after their end, hold no secret, and outlive the tenants and keys they speak of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.store.tables import audit_log

BEGUN = "begun"
OK = "ok"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what to which object, when, from where, and how it ended. Times are seconds since 1970.

    `key_id` and `role` say who; `tenant_id` is the tenant acted on, "" for none. `outcome` is BEGUN, OK, or the code
    of the error the caller was told; `status` is HTTP's.
    """

    id: int = 0
    at: float = 0.0
    key_id: str
    role: str
    action: str
    object: str
    tenant_id: str
    details: dict[str, Any] = {}
    address: str
    request_id: str
    outcome: str = BEGUN
    status: int | None = None
    ended_at: float | None = None


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    """None lets everything pass; `since` and `until` bound when an action began, as [since, until)."""

    key_id: str | None = None
    action: str | None = None
    tenant_id: str | None = None
    outcome: str | None = None
    since: float | None = None
    until: float | None = None


class AuditLog:
    """The log in one database."""

    def __init__(self, database: AsyncEngine, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def begin(self, entry: AuditEntry) -> int:
        """The row's number. Raises SQLAlchemyError where it cannot be written."""
        values = {**msgspec.to_builtins(entry), "at": self._clock()}
        del values["id"]
        values["object"] = values["object"][:512]
        async with self._database.begin() as connection:
            result = await connection.execute(insert(audit_log).values(**values).returning(audit_log.c.id))
            return int(result.scalar_one())

    async def end(
        self,
        number: int,
        status: int,
        outcome: str,
        object: str | None = None,
        tenant_id: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """How it ended; the others where they are known only now."""
        values: dict[str, Any] = {"status": status, "outcome": outcome, "ended_at": self._clock()}
        if object is not None:
            values["object"] = object[:512]
        if tenant_id is not None:
            values["tenant_id"] = tenant_id
        if details is not None:
            values["details"] = msgspec.to_builtins(details)
        async with self._database.begin() as connection:
            await connection.execute(update(audit_log).where(audit_log.c.id == number).values(**values))

    async def find(self, wanted: AuditFilter, limit: int, after: int | None = None) -> list[AuditEntry]:
        """The newest first; those older than number `after` where one is given."""
        query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
        for column in ("key_id", "action", "tenant_id", "outcome"):
            if (value := getattr(wanted, column)) is not None:
                query = query.where(audit_log.c[column] == value)
        if wanted.since is not None:
            query = query.where(audit_log.c.at >= wanted.since)
        if wanted.until is not None:
            query = query.where(audit_log.c.at < wanted.until)
        if after is not None:
            query = query.where(audit_log.c.id < after)
        async with self._database.connect() as connection:
            rows = (await connection.execute(query)).mappings()
            return [AuditEntry(**{name: row[name] for name in AuditEntry.__struct_fields__}) for row in rows]
