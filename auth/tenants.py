"""Tenants and their API keys: made, listed, revoked, and looked up on every request."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Set
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.admin_keys import FROM_ENVIRONMENT, AdminKeys
from loraplex.auth.authentication import Authenticator
from loraplex.auth.caller import Caller, KeyRole
from loraplex.auth.errors import InvalidApiKey, KeyNotFound, KeysUnavailable, NameTaken, TenantNotFound
from loraplex.auth.keys import last_four, new_key
from loraplex.auth.limits.policy import NO_LIMITS, Limits
from loraplex.auth.peppers import Peppers
from loraplex.auth.store.changes import ACCESS, CATALOGUE, announce
from loraplex.auth.store.tables import adapters, api_keys, batches, files, tenants

_ID = re.compile(r"(tenant|key)_[0-9a-f]{16}")  # other text is not asked for: PostgreSQL refuses some of it


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: float
    limits: Limits = NO_LIMITS


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it may be shown at any time. `key` itself is set only in the answer to its creation or rotation.

    After a rotation the secret before it is good until `previous_until`.
    """

    id: str
    tenant_id: str
    name: str
    role: KeyRole
    last_four: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    limits: Limits = NO_LIMITS
    previous_until: float | None = None
    key: str | None = None


class Tenants:
    """The tenants of one database. Admin keys open the admin API and belong to no tenant."""

    def __init__(
        self,
        database: AsyncEngine,
        pepper: bytes,
        clock: Callable[[], float] = time.time,
        defaults: Limits = NO_LIMITS,
    ) -> None:
        self._database = database
        self._peppers = Peppers(pepper)
        self._clock = clock
        self._defaults = defaults
        self._on_change: list[Callable[[], Awaitable[None]]] = []
        self._authenticator = Authenticator(database, self._peppers, defaults, clock)
        self.admins = AdminKeys(database, self._peppers, clock, self.forget)

    def on_change(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Called after each change of who may do what, here at once; `ChangeWatch` calls `forget` for others'."""
        self._on_change.append(callback)

    @property
    def num_changes(self) -> int:
        """Of who may do what, that this process knows of."""
        return self._authenticator.num_changes

    async def forget(self) -> None:
        """Remember no look-up: something about a key or a tenant has changed."""
        self._authenticator.forget()
        for callback in self._on_change:
            await callback()

    async def living_keys(self, key_ids: Set[str]) -> set[str]:
        """Those of these keys that are not revoked, and whose tenant is there. Raises KeysUnavailable."""
        try:
            return await self._authenticator.living(key_ids) | ({FROM_ENVIRONMENT} & key_ids)
        except (SQLAlchemyError, OSError) as error:
            raise _cannot_be_checked() from error

    async def bootstrap_admin(self, given: str | None) -> str | None:
        """Let in the `given` admin key as well; where there is none at all, make and return one."""
        return await self.admins.bootstrap(given)

    async def authenticate(self, key: str | None) -> Caller:
        """Who holds this key. Raises InvalidApiKey, the same for every kind of bad key, or KeysUnavailable."""
        if not key:
            raise InvalidApiKey("No API key was given: send it as `Authorization: Bearer KEY`.")
        if self.admins.is_given(key):
            as_of = self.num_changes
            return Caller(tenant_id="", tenant_name="", key_id=FROM_ENVIRONMENT, role="admin", as_of=as_of)
        try:
            caller = await self._authenticator.look_up(key)
        except (SQLAlchemyError, OSError) as error:
            raise _cannot_be_checked() from error
        if caller is None:
            raise InvalidApiKey("The API key is not valid.")
        return caller

    async def holder(self, tenant_id: str, key_id: str) -> Caller:
        """The caller that a key stands for now, for work that goes on without it.

        Raises InvalidApiKey or KeysUnavailable.
        """
        as_of = self.num_changes
        try:
            caller = await self._authenticator.look_up_id(key_id) if tenant_id else None
        except (SQLAlchemyError, OSError) as error:
            raise _cannot_be_checked() from error
        if not tenant_id and key_id in await self.living_keys({key_id}):
            caller = Caller(tenant_id="", tenant_name="", key_id=key_id, role="admin", as_of=as_of)
        if caller is None or caller.tenant_id != tenant_id:
            raise InvalidApiKey("The API key that this work was begun with is no longer valid.")
        return caller

    def effective(self, tenant: Tenant) -> Limits:
        """The tenant's limits, and the server's defaults where it has none."""
        return tenant.limits.over(self._defaults)

    async def create_tenant(self, name: str, limits: Limits = NO_LIMITS) -> Tenant:
        """Raises NameTaken."""
        tenant = Tenant(id=f"tenant_{secrets.token_hex(8)}", name=name, created_at=self._clock(), limits=limits)
        try:
            async with self._database.begin() as connection:
                await connection.execute(
                    insert(tenants).values(**{**msgspec.to_builtins(tenant), "limits": _stored(limits)})
                )
        except IntegrityError as error:
            raise NameTaken(f"There is a tenant named {name!r} already.") from error
        return tenant

    async def list_tenants(self) -> list[Tenant]:
        """In order of creation."""
        async with self._database.connect() as connection:
            rows = await connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.id))
            return [_tenant(row._mapping) for row in rows]

    async def get_tenant(self, tenant_id: str) -> Tenant:
        """Raises TenantNotFound."""
        _require_tenant_id(tenant_id)
        async with self._database.connect() as connection:
            row = (await connection.execute(select(tenants).where(tenants.c.id == tenant_id))).first()
        if row is None:
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.")
        return _tenant(row._mapping)

    async def delete_tenant(self, tenant_id: str) -> None:
        """Its keys stop working at once, and its adapters, files and batches are gone. Raises TenantNotFound."""
        _require_tenant_id(tenant_id)
        async with self._database.begin() as connection:
            result = await connection.execute(delete(tenants).where(tenants.c.id == tenant_id))
            # after the tenant: whoever enters an adapter for it has locked its row until then
            for owned in (adapters, batches, files):
                await connection.execute(delete(owned).where(owned.c.tenant_id == tenant_id))
            await announce(connection, ACCESS)
            await announce(connection, CATALOGUE)
        if not result.rowcount:
            raise TenantNotFound(f"There is no tenant {tenant_id!r}.")
        await self.forget()

    async def set_tenant_limits(self, tenant_id: str, limits: Limits) -> Tenant:
        """In force at once here, and in other processes after `POLL_SECONDS`. Raises TenantNotFound."""
        return await self._change_tenant(tenant_id, limits=_stored(limits))

    async def _change_tenant(self, tenant_id: str, **values: Any) -> Tenant:
        _require_tenant_id(tenant_id)
        async with self._database.begin() as connection:
            await connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(**values))
            await announce(connection, ACCESS)
        await self.forget()
        return await self.get_tenant(tenant_id)

    async def create_key(
        self,
        tenant_id: str,
        name: str,
        expires_at: float | None = None,
        role: KeyRole = "inference",
        limits: Limits = NO_LIMITS,
    ) -> ApiKey:
        """A new key, shown in this answer alone. Raises TenantNotFound."""
        await self.get_tenant(tenant_id)
        secret = new_key(role)
        key = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            tenant_id=tenant_id,
            name=name,
            role=role,
            last_four=last_four(secret),
            created_at=self._clock(),
            expires_at=expires_at,
            revoked_at=None,
            limits=limits,
            key=secret,
        )
        values = {
            **msgspec.to_builtins(key),
            "limits": _stored(limits),
            "digest": self._peppers.digest(secret),
            "pepper": self._peppers.fingerprint,
        }
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

    async def get_key(self, tenant_id: str, key_id: str) -> ApiKey:
        """Raises KeyNotFound, also for another tenant's key."""
        query = select(api_keys).where(_one_key(tenant_id, key_id))
        async with self._database.connect() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            raise _no_such_key(tenant_id, key_id)
        return _api_key(row._mapping)

    async def set_key_limits(self, tenant_id: str, key_id: str, limits: Limits) -> ApiKey:
        """In force at once here, and in other processes after `POLL_SECONDS`. Raises KeyNotFound."""
        await self._change_key(tenant_id, key_id, limits=_stored(limits))
        return await self.get_key(tenant_id, key_id)

    async def rotate_key(self, tenant_id: str, key_id: str, overlap_seconds: float) -> ApiKey:
        """A new secret for the key, shown in this answer alone; the one before it is good for a while longer.

        A secret still earlier ends now. Raises KeyNotFound, also for a key that was revoked.
        """
        key = await self.get_key(tenant_id, key_id)
        secret = new_key(key.role)
        values = {
            "digest": self._peppers.digest(secret),
            "pepper": self._peppers.fingerprint,
            "last_four": last_four(secret),
            "previous_digest": api_keys.c.digest,
            "previous_until": self._clock() + overlap_seconds,
        }
        await self._change_key(tenant_id, key_id, must_live=True, **values)
        return msgspec.structs.replace(await self.get_key(tenant_id, key_id), key=secret)

    async def revoke_key(self, tenant_id: str, key_id: str) -> None:
        """From now on the key is refused, under both secrets. Raises KeyNotFound; revoking twice is no error."""
        when = func.coalesce(api_keys.c.revoked_at, self._clock())
        await self._change_key(tenant_id, key_id, revoked_at=when)

    async def _change_key(self, tenant_id: str, key_id: str, must_live: bool = False, **values: Any) -> None:
        mine = _one_key(tenant_id, key_id)
        if must_live:
            mine &= api_keys.c.revoked_at.is_(None)
        async with self._database.begin() as connection:
            result = await connection.execute(update(api_keys).where(mine).values(**values))
            await announce(connection, ACCESS)
        if not result.rowcount:
            raise _no_such_key(tenant_id, key_id)
        await self.forget()


async def require_tenant(connection: AsyncConnection, tenant_id: str, *, is_alone: bool = False) -> None:
    """Keep a tenant from being deleted until the transaction ends. Raises TenantNotFound.

    Of those that want to be alone with it PostgreSQL lets one go on at a time; SQLite has one writer in any case.
    """
    query = select(tenants.c.id).where(tenants.c.id == tenant_id)
    query = query.with_for_update(read=not is_alone, key_share=is_alone)  # FOR SHARE, or FOR NO KEY UPDATE
    if (await connection.execute(query)).first() is None:
        raise TenantNotFound(f"There is no tenant {tenant_id!r}.")


def _require_tenant_id(text: str) -> None:
    if _ID.fullmatch(text) is None:
        raise TenantNotFound(f"There is no tenant {text!r}.")


def _one_key(tenant_id: str, key_id: str) -> ColumnElement[bool]:
    """The condition on `api_keys`. Raises KeyNotFound for what cannot be ids."""
    if not (_ID.fullmatch(tenant_id) and _ID.fullmatch(key_id)):
        raise _no_such_key(tenant_id, key_id)
    return (api_keys.c.id == key_id) & (api_keys.c.tenant_id == tenant_id)


def _no_such_key(tenant_id: str, key_id: str) -> KeyNotFound:
    return KeyNotFound(f"There is no key {key_id!r} in tenant {tenant_id!r}.")


def _cannot_be_checked() -> KeysUnavailable:
    return KeysUnavailable("API keys cannot be checked at the moment; try again shortly.")


def _stored(limits: Limits) -> dict[str, Any]:
    """Only what is set, so that a later version may know other limits."""
    return {name: value for name, value in msgspec.to_builtins(limits).items() if value is not None}


def _tenant(row: Any) -> Tenant:
    return msgspec.convert({field: row[field] for field in Tenant.__struct_fields__}, Tenant)


def _api_key(row: Any) -> ApiKey:
    return msgspec.convert({field: row[field] for field in ApiKey.__struct_fields__ if field != "key"}, ApiKey)
