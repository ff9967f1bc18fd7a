"""Tenants and their API keys: made, listed, revoked, and looked up on every request."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.errors import InvalidApiKey, KeyNotFound, NameTaken, TenantNotFound
from loraplex.auth.keys import digest, has_key_form, last_four, new_key
from loraplex.auth.store.tables import adapters, admin_keys, api_keys, tenants

# How long, in seconds, a key's look-up may be remembered; a revocation in another process shows after this at most.
REMEMBERED_SECONDS = 1.0
_MAX_REMEMBERED = 10_000
_ID = re.compile(r"(tenant|key)_[0-9a-f]{16}")  # other text is not asked for: PostgreSQL refuses some of it


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: float


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it may be shown at any time. `key` itself is set only in the answer to its creation."""

    id: str
    tenant_id: str
    name: str
    last_four: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    key: str | None = None


class Tenants:
    """The tenants of one database. Admin keys open the admin API and belong to no tenant."""

    def __init__(self, database: AsyncEngine, pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._pepper = pepper
        self._clock = clock
        self._admin_digests: frozenset[str] = frozenset()
        self._remembered: dict[str, tuple[float, Caller | None]] = {}
        self._num_revocations = 0

    async def bootstrap_admin(self, given: str | None) -> str | None:
        """Let in the `given` admin key, or the one of an earlier start; where there is none, make and return one."""
        if given is not None:
            self._admin_digests = frozenset({digest(self._pepper, given)})
            return None
        async with self._database.begin() as connection:
            known = [row.digest for row in await connection.execute(select(admin_keys.c.digest))]
            made = None if known else new_key("admin")
            if made is not None:
                known = [digest(self._pepper, made)]
                values = {"digest": known[0], "last_four": last_four(made), "created_at": self._clock()}
                await connection.execute(insert(admin_keys).values(**values))
        self._admin_digests = frozenset(known)
        return made

    async def authenticate(self, key: str | None) -> Caller:
        """Who holds this key. Raises InvalidApiKey, the same for every kind of bad key."""
        if not key:
            raise InvalidApiKey("No API key was given: send it as `Authorization: Bearer KEY`.")
        hashed = digest(self._pepper, key)
        if any(hmac.compare_digest(hashed, known) for known in self._admin_digests):
            return Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")
        caller = await self._look_up(hashed) if has_key_form(key) else None
        if caller is None:
            raise InvalidApiKey("The API key is not valid.")
        return caller

    async def create_tenant(self, name: str) -> Tenant:
        """Raises NameTaken."""
        tenant = Tenant(id=f"tenant_{secrets.token_hex(8)}", name=name, created_at=self._clock())
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(tenants).values(**msgspec.structs.asdict(tenant)))
        except IntegrityError as error:
            raise NameTaken(f"There is a tenant named {name!r} already.") from error
        return tenant

    async def list_tenants(self) -> list[Tenant]:
        """In order of creation."""
        async with self._database.connect() as connection:
            rows = await connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.id))
            return [Tenant(**row._mapping) for row in rows]

    async def get_tenant(self, tenant_id: str) -> Tenant:
        """Raises TenantNotFound."""
        _require_tenant_id(tenant_id)
        async with self._database.connect() as connection:
            row = (await connection.execute(select(tenants).where(tenants.c.id == tenant_id))).first()
        if row is None:
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.")
        return Tenant(**row._mapping)

    async def delete_tenant(self, tenant_id: str) -> None:
        """Its keys stop working at once, and its adapters leave the catalogue. Raises TenantNotFound."""
        _require_tenant_id(tenant_id)
        async with self._database.begin() as connection:
            result = await connection.execute(delete(tenants).where(tenants.c.id == tenant_id))
            # after the tenant: whoever enters an adapter for it has locked its row until then
            await connection.execute(delete(adapters).where(adapters.c.tenant_id == tenant_id))
        if not result.rowcount:
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.")
        self._forget()

    async def create_key(self, tenant_id: str, name: str, expires_at: float | None = None) -> ApiKey:
        """A new inference key, shown in this answer alone. Raises TenantNotFound."""
        await self.get_tenant(tenant_id)
        secret = new_key("inference")
        key = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            tenant_id=tenant_id,
            name=name,
            last_four=last_four(secret),
            created_at=self._clock(),
            expires_at=expires_at,
            revoked_at=None,
            key=secret,
        )
        values = {**msgspec.structs.asdict(key), "digest": digest(self._pepper, secret)}
        del values["key"]
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(api_keys).values(**values))
        except IntegrityError as error:  # deleted since it was looked up
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.") from error
        return key

    async def list_keys(self, tenant_id: str) -> list[ApiKey]:
        """In order of creation, revoked ones included. Raises TenantNotFound."""
        await self.get_tenant(tenant_id)
        query = select(api_keys).where(api_keys.c.tenant_id == tenant_id).order_by(api_keys.c.created_at)
        async with self._database.connect() as connection:
            return [_api_key(row._mapping) for row in await connection.execute(query)]

    async def revoke_key(self, tenant_id: str, key_id: str) -> None:
        """From now on the key is refused. Raises KeyNotFound; revoking twice is no error."""
        if not (_ID.fullmatch(tenant_id) and _ID.fullmatch(key_id)):
            raise KeyNotFound(f"There is no key {key_id!r} in tenant {tenant_id!r}.")
        mine = (api_keys.c.id == key_id) & (api_keys.c.tenant_id == tenant_id)
        async with self._database.begin() as connection:
            known = (await connection.execute(select(api_keys.c.revoked_at).where(mine))).first()
            if known is None:
                raise KeyNotFound(f"There is no key {key_id!r} in tenant {tenant_id!r}.")
            if known.revoked_at is None:
                await connection.execute(update(api_keys).where(mine).values(revoked_at=self._clock()))
        self._forget()

    def _forget(self) -> None:
        self._remembered.clear()
        self._num_revocations += 1

    async def _look_up(self, hashed: str) -> Caller | None:
        """By digest: an index on it gives an attacker no timing to climb, for digests cannot be steered."""
        now = self._clock()
        known = self._remembered.get(hashed)
        if known is not None and now - known[0] < REMEMBERED_SECONDS:
            return known[1]
        revocations = self._num_revocations
        query = (
            select(api_keys, tenants.c.name.label("tenant_name"))
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(api_keys.c.digest == hashed)
        )
        async with self._database.connect() as connection:
            row = (await connection.execute(query)).first()
        caller = None
        if row is not None and row.revoked_at is None and (row.expires_at is None or row.expires_at > now):
            caller = Caller(tenant_id=row.tenant_id, tenant_name=row.tenant_name, key_id=row.id, role="inference")
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        if revocations == self._num_revocations:  # else the row may have been read before a key was revoked
            self._remembered[hashed] = (now, caller)
        return caller


async def require_tenant(connection: AsyncConnection, tenant_id: str) -> None:
    """Keep a tenant from being deleted until the transaction ends. Raises TenantNotFound."""
    query = select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(read=True)
    if (await connection.execute(query)).first() is None:
        raise TenantNotFound(f"There is no tenant {tenant_id!r}.")


def _require_tenant_id(text: str) -> None:
    if _ID.fullmatch(text) is None:
        raise TenantNotFound(f"There is no tenant {text!r}.")


def _api_key(row: Any) -> ApiKey:
    return ApiKey(**{field: row[field] for field in ApiKey.__struct_fields__ if field != "key"})
