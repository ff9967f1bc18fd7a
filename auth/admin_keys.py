"""Keys of operators. The first is made at the first start, unless the environment brings one; admins make others."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.errors import KeyNotFound, LastAdminKey
from loraplex.auth.keys import last_four, new_key
from loraplex.auth.peppers import Peppers
from loraplex.auth.store.changes import ACCESS, announce
from loraplex.auth.store.tables import admin_keys

FROM_ENVIRONMENT = "admin"  # the id of the key that the environment brings; it is in no table
_ID = re.compile(r"admin_[0-9a-f]{16}")


class AdminKey(msgspec.Struct, frozen=True, kw_only=True):
    """An admin key as it may be shown at any time. `key` itself is set only in the answer to its creation."""

    id: str
    name: str
    last_four: str
    created_at: float
    revoked_at: float | None
    key: str | None = None


class AdminKeys:
    """The admin keys of one database, and the environment's. `on_change` is called after each change."""

    def __init__(
        self,
        database: AsyncEngine,
        peppers: Peppers,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._database = database
        self._peppers = peppers
        self._clock = clock
        self._on_change = on_change
        self._given: str | None = None  # the digest of the environment's

    async def bootstrap(self, given: str | None) -> str | None:
        """Let in the `given` key as well; where there is neither that nor one in the table, make and return one."""
        if given is not None:
            self._given = self._peppers.digest(given)
            return None
        async with self._database.begin() as connection:
            await announce(connection, ACCESS)  # first: of gateways that start together one makes it
            if await _num_living(connection):
                return None
            return (await self._insert(connection, "first")).key

    def is_given(self, key: str) -> bool:
        """Whether it is the environment's."""
        return self._given is not None and hmac.compare_digest(self._peppers.digest(key), self._given)

    async def create(self, name: str) -> AdminKey:
        """A new key, shown in this answer alone."""
        async with self._database.begin() as connection:
            return await self._insert(connection, name)

    async def list(self) -> list[AdminKey]:
        """In order of creation, revoked ones included; the environment's is not among them."""
        query = select(admin_keys).order_by(admin_keys.c.created_at, admin_keys.c.id)
        async with self._database.connect() as connection:
            found = await connection.execute(query)
            return [
                AdminKey(**{name: row._mapping[name] for name in AdminKey.__struct_fields__ if name != "key"})
                for row in found
            ]

    async def revoke(self, key_id: str) -> None:
        """Raises KeyNotFound, or LastAdminKey; revoking twice is no error."""
        if _ID.fullmatch(key_id) is None:
            raise _no_such_key(key_id)
        when = func.coalesce(admin_keys.c.revoked_at, self._clock())
        async with self._database.begin() as connection:
            # first, so that two revocations at once do not each take the other's key for the one that is left
            await announce(connection, ACCESS)
            result = await connection.execute(
                update(admin_keys).where(admin_keys.c.id == key_id).values(revoked_at=when)
            )
            if not result.rowcount:
                raise _no_such_key(key_id)
            if self._given is None and not await _num_living(connection):
                raise LastAdminKey("This is the last admin key; make another one first.")
        if self._on_change is not None:
            await self._on_change()

    async def _insert(self, connection: AsyncConnection, name: str) -> AdminKey:
        secret = new_key("admin")
        key = AdminKey(
            id=f"admin_{secrets.token_hex(8)}",
            name=name,
            last_four=last_four(secret),
            created_at=self._clock(),
            revoked_at=None,
            key=secret,
        )
        values = {**msgspec.to_builtins(key), "digest": self._peppers.digest(secret)}
        del values["key"]
        await connection.execute(insert(admin_keys).values(**values))
        return key


async def _num_living(connection: AsyncConnection) -> int:
    living = select(func.count()).select_from(admin_keys).where(admin_keys.c.revoked_at.is_(None))
    return int((await connection.execute(living)).scalar_one())


def _no_such_key(key_id: str) -> KeyNotFound:
    return KeyNotFound(f"There is no admin key {key_id!r}.")
