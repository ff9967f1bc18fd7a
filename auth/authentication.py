"""From an API key to its Caller, on every request."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.keys import has_key_form
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.peppers import Peppers
from loraplex.auth.store.tables import api_keys, tenants

# How long, in seconds, a key's look-up may be remembered; what changes in another process shows after this at most.
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
        self._remembered: dict[str, tuple[float, Caller | None]] = {}  # by digest: until when, and who
        self._num_changes = 0

    def forget(self) -> None:
        """Something about a key or a tenant has changed."""
        self._remembered.clear()
        self._num_changes += 1

    async def look_up(self, key: str) -> Caller | None:
        """None for a key that is mistyped, unknown, revoked or expired."""
        if not has_key_form(key):
            return None
        hashed = self._peppers.digest(key)
        now = self._clock()
        known = self._remembered.get(hashed)
        if known is not None and now < known[0]:
            return known[1]
        changes = self._num_changes
        row = await self._read(self._peppers.digests(key))
        until, caller = self._judge(row, now)
        if caller is not None and row.digest != hashed and row.digest in self._peppers.digests(key):
            await self._renew(row.digest, hashed)
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        if changes == self._num_changes:  # else the row may have been read before a key was revoked
            self._remembered[hashed] = (until, caller)
        return caller

    async def _read(self, digests: list[str]) -> Any:
        """The key's row with its tenant's, or None."""
        query = (
            select(api_keys, tenants.c.name.label("tenant_name"), tenants.c.limits.label("tenant_limits"))
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(or_(api_keys.c.digest.in_(digests), api_keys.c.previous_digest.in_(digests)))
        )
        async with self._database.connect() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            return None
        is_current = any(hmac.compare_digest(row.digest, each) for each in digests)
        is_over = not is_current and (row.previous_until or 0.0) <= self._clock()
        return None if is_over else row

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
            tenant_id=row.tenant_id, tenant_name=row.tenant_name, key_id=row.id, role=row.role, policy=policy
        )
        return min([until, *ends]), caller

    async def _renew(self, old: str, new: str) -> None:
        """A key that was stored under an older pepper moves to the current one when it is used."""
        values = {"digest": new, "pepper": self._peppers.fingerprint}
        async with self._database.begin() as connection:
            await connection.execute(update(api_keys).where(api_keys.c.digest == old).values(**values))
