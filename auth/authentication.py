"""From an API key to its Caller, on every request.

Look-ups are remembered, the good ones apart from the bad, so that nobody can push a tenant's key out by guessing.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Table, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.keys import ADMIN_PREFIX, has_key_form
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.peppers import Peppers
from loraplex.auth.store.tables import admin_keys, api_keys, tenants

_log = logging.getLogger("loraplex.auth")

# How long, in seconds, a key's look-up may be remembered where nobody says that something has changed. Changes made by
# other processes are noticed sooner (`store/changes.py`); this bounds what a database that cannot be asked can hide.
REMEMBERED_SECONDS = 1.0
_MAX_REMEMBERED = 10_000


class Authenticator:
    """Looks keys up by digest: an index on it gives an attacker no timing to climb, for digests cannot be steered."""

    def __init__(
        self, database: AsyncEngine, peppers: Peppers, defaults: Limits, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._peppers = peppers
        self._defaults = defaults
        self._clock = clock
        self._remembered: dict[str, tuple[float, Caller]] = {}  # by digest: until when, and who
        self._refused: dict[str, float] = {}  # by digest: until when
        self._under_way: dict[str, asyncio.Task[Caller | None]] = {}  # look-ups by digest
        self.num_changes = 0

    def forget(self) -> None:
        """Something about a key or a tenant has changed."""
        self._remembered.clear()
        self._refused.clear()
        self._under_way.clear()  # whoever comes from now on does not share them
        self.num_changes += 1

    async def look_up(self, key: str) -> Caller | None:
        """None for a key that is mistyped, unknown, revoked or expired."""
        hashed = self._peppers.digest(key)
        now = self._clock()
        known = self._remembered.get(hashed)
        if known is not None and now < known[0]:
            return known[1]
        if not has_key_form(key):
            return None
        if now < self._refused.get(hashed, 0.0):
            return None
        if (looking := self._under_way.get(hashed)) is None:
            looking = self._under_way[hashed] = asyncio.create_task(self._look(key, hashed, now))
            looking.add_done_callback(partial(self._looked, hashed))
        return await asyncio.shield(looking)  # others may wait for it too

    async def _look(self, key: str, hashed: str, now: float) -> Caller | None:
        """Ask the database, once for all who come with this key meanwhile."""
        changes = self.num_changes
        until, caller = await self._find(key, hashed, now)
        if caller is not None:
            caller = msgspec.structs.replace(caller, as_of=changes)
        if changes == self.num_changes:  # else the row may have been read before a key was revoked
            self._remember(hashed, until, caller)
        return caller

    def _looked(self, hashed: str, looking: asyncio.Task[Caller | None]) -> None:
        if not looking.cancelled():
            looking.exception()  # looked at: all who waited may have left
        if self._under_way.get(hashed) is looking:
            del self._under_way[hashed]

    async def living(self, key_ids: Set[str]) -> set[str]:
        """Those of these keys, admins' among them, that are not revoked and whose tenant is there."""
        wanted = list(key_ids)
        found: set[str] = set()
        async with self._database.connect() as connection:
            for start in range(0, len(wanted), 500):  # SQLite bounds the parameters of a statement
                some = wanted[start : start + 500]
                for table in (api_keys, admin_keys):
                    query = select(table.c.id).where(table.c.id.in_(some) & table.c.revoked_at.is_(None))
                    found.update((await connection.execute(query)).scalars())
        return found

    def _remember(self, hashed: str, until: float, caller: Caller | None) -> None:
        remembered: dict[str, Any] = self._refused if caller is None else self._remembered
        if len(remembered) >= _MAX_REMEMBERED:
            remembered.clear()
        remembered[hashed] = until if caller is None else (until, caller)

    async def _find(self, key: str, hashed: str, now: float) -> tuple[float, Caller | None]:
        """Until when this may be remembered, and who it is."""
        digests = self._peppers.digests(key)
        if key.startswith(ADMIN_PREFIX):
            return now + REMEMBERED_SECONDS, await self._find_admin(digests)
        row = await self._read(digests)
        until, caller = self._judge(row, now)
        if caller is not None and row.digest != hashed and row.digest in digests:
            await self._renew(api_keys, row.digest, {"digest": hashed, "pepper": self._peppers.fingerprint})
        return until, caller

    async def _find_admin(self, digests: list[str]) -> Caller | None:
        query = select(admin_keys).where(admin_keys.c.digest.in_(digests))
        async with self._database.connect() as connection:
            row = (await connection.execute(query)).first()
        if row is None or row.revoked_at is not None:
            return None
        if not any(hmac.compare_digest(row.digest, each) for each in digests):
            return None
        if row.digest != digests[0]:
            await self._renew(admin_keys, row.digest, {"digest": digests[0]})
        return Caller(tenant_id="", tenant_name="", key_id=row.id, role="admin")

    async def look_up_id(self, key_id: str) -> Caller | None:
        """The same by the key's id, for work that goes on when the request that began it is over."""
        changes = self.num_changes
        _, caller = self._judge(await self._row(api_keys.c.id == key_id), self._clock())
        return None if caller is None else msgspec.structs.replace(caller, as_of=changes)

    async def _read(self, digests: list[str]) -> Any:
        """The key's row with its tenant's, or None."""
        row = await self._row(or_(api_keys.c.digest.in_(digests), api_keys.c.previous_digest.in_(digests)))
        if row is None:
            return None
        is_current = any(hmac.compare_digest(row.digest, each) for each in digests)
        is_over = not is_current and (row.previous_until or 0.0) <= self._clock()
        return None if is_over else row

    async def _row(self, is_it: ColumnElement[bool]) -> Any:
        query = (
            select(
                api_keys,
                tenants.c.name.label("tenant_name"),
                tenants.c.limits.label("tenant_limits"),
            )
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(is_it)
        )
        async with self._database.connect() as connection:
            return (await connection.execute(query)).first()

    def _judge(self, row: Any, now: float) -> tuple[float, Caller | None]:
        """Until when this may be remembered, and who it is."""
        until = now + REMEMBERED_SECONDS
        if row is None or row.revoked_at is not None:
            return until, None
        policy = Policy(
            tenant=msgspec.convert(row.tenant_limits, Limits).over(self._defaults),
            key=msgspec.convert(row.limits, Limits),
        )
        ends = [at for at in (row.expires_at, policy.expires_at) if at is not None]
        if any(at <= now for at in ends):
            return until, None
        ends += [row.previous_until] if row.previous_until is not None and row.previous_until > now else []
        caller = Caller(
            tenant_id=row.tenant_id,
            tenant_name=row.tenant_name,
            key_id=row.id,
            role=row.role,
            policy=policy,
        )
        return min([until, *ends]), caller

    async def _renew(self, table: Table, old: str, values: dict[str, str]) -> None:
        """A key that was stored under an older pepper moves to the current one when it is used.

        It is good in any case: where the database takes no writes it moves another time.
        """
        living = (table.c.digest == old) & table.c.revoked_at.is_(None)
        try:
            async with self._database.begin() as connection:
                await connection.execute(update(table).where(living).values(**values))
        except (SQLAlchemyError, OSError) as error:
            _log.warning("a key stays under an older pepper for now: %s", getattr(error, "orig", None) or error)
