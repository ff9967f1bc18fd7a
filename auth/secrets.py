"""What tenants entrust to the server to use for them, such as hub tokens: written, used, never shown again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.errors import SecretNotFound, TenantNotFound
from loraplex.auth.peppers import Peppers
from loraplex.auth.store.tables import tenant_secrets
from loraplex.auth.vault import Vault


class SecretCard(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of a secret."""

    name: str
    created_at: float
    updated_at: float


class TenantSecrets:
    """The secrets of one database, encrypted under the current pepper."""

    def __init__(self, database: AsyncEngine, pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._vault = Vault(pepper)
        self._fingerprint = Peppers(pepper).fingerprint
        self._clock = clock

    async def put(self, tenant_id: str, name: str, value: str) -> SecretCard:
        """Set or replace. Raises TenantNotFound."""
        now = self._clock()
        values = {"encrypted": self._vault.encrypt(value), "pepper": self._fingerprint, "updated_at": now}
        mine = _one(tenant_id, name)
        try:
            async with self._database.begin() as connection:
                found = await connection.execute(update(tenant_secrets).where(mine).values(**values))
                if not found.rowcount:
                    whole = {**values, "tenant_id": tenant_id, "name": name, "created_at": now}
                    await connection.execute(insert(tenant_secrets).values(**whole))
        except IntegrityError as error:
            if await self._read(tenant_id, name) is not None:  # another set it in the same moment
                return await self.put(tenant_id, name, value)
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.") from error
        return next(card for card in await self.list(tenant_id) if card.name == name)

    async def list(self, tenant_id: str) -> list[SecretCard]:
        """By name."""
        query = select(tenant_secrets).where(tenant_secrets.c.tenant_id == tenant_id).order_by(tenant_secrets.c.name)
        async with self._database.connect() as connection:
            rows = await connection.execute(query)
            return [SecretCard(name=row.name, created_at=row.created_at, updated_at=row.updated_at) for row in rows]

    async def remove(self, tenant_id: str, name: str) -> None:
        """Raises SecretNotFound."""
        async with self._database.begin() as connection:
            result = await connection.execute(delete(tenant_secrets).where(_one(tenant_id, name)))
        if not result.rowcount:
            raise SecretNotFound(f"There is no secret {name!r} in tenant {tenant_id!r}.")

    async def reveal(self, tenant_id: str, name: str) -> str | None:
        """The value, to be used and told to nobody; None where there is none. Raises SecretUnreadable."""
        row = await self._read(tenant_id, name)
        if row is None:
            return None
        value = self._vault.decrypt(row.encrypted)
        if row.pepper != self._fingerprint:  # an older pepper may go once nothing is under it any more
            values = {"encrypted": self._vault.renew(row.encrypted), "pepper": self._fingerprint}
            is_as_read = tenant_secrets.c.encrypted == row.encrypted
            async with self._database.begin() as connection:
                renewal = update(tenant_secrets).where(_one(tenant_id, name) & is_as_read).values(**values)
                await connection.execute(renewal)
        return value

    async def _read(self, tenant_id: str, name: str) -> Any:
        async with self._database.connect() as connection:
            return (await connection.execute(select(tenant_secrets).where(_one(tenant_id, name)))).first()


def _one(tenant_id: str, name: str) -> ColumnElement[bool]:
    return (tenant_secrets.c.tenant_id == tenant_id) & (tenant_secrets.c.name == name)
