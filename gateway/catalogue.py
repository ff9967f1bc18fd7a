"""Model name -> Route(base, adapter): the only place that knows names.

The table is in the database; requests read a snapshot in memory, replaced as a whole on every change, so that a
request sees either the old catalogue or the new one.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.auth.store.tables import adapters as table
from loraplex.auth.tenants import require_tenant
from loraplex.engines.errors import EngineError
from loraplex.engines.protocol import Adapter, AdapterCard, Engine, WeightedAdapter
from loraplex.gateway.errors import (
    AdapterNameTaken,
    AdapterNotRegistered,
    MalformedRequest,
    ModelNotAllowed,
    ModelNotFound,
)

SHARED = ""  # the tenant of adapters that everyone may use
_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9_:-][A-Za-z0-9._:-]*)*")


class Stored(Protocol):
    """What a store says of an adapter it fetched."""

    @property
    def adapter(self) -> Adapter: ...
    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


class Store(Protocol):
    """Brings an adapter's files to this machine. Raises AdapterError."""

    async def address(self, uri: str) -> str:
        """The normal form of an address, fit to be shown."""
        ...

    async def fetch(self, uri: str, name: str, *, token: str | None = None) -> Stored: ...


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model name leads: a base model and perhaps an adapter, or several that are added up."""

    base: str
    adapter: Adapter | None
    composition: tuple[WeightedAdapter, ...] = ()


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of the catalogue. `tenant_id` is "" for one that every tenant may use."""

    name: str
    tenant_id: str
    adapter_id: str
    path: str
    source: str
    revision: str
    num_bytes: int
    card: AdapterCard
    created_at: float

    def adapter(self) -> Adapter:
        return Adapter(id=self.adapter_id, name=self.name, path=self.path)


class Catalogue:
    """The models of one server: its base, and the adapters registered for it."""

    def __init__(self, database: AsyncEngine, store: Store, engine: Engine, base: str) -> None:
        self._database = database
        self.store = store
        self._engine = engine
        self.base = base
        self._snapshot: Mapping[tuple[str, str], Registered] = {}
        self._reloading = asyncio.Lock()  # or an older reading of the table could replace a newer one

    async def reload(self) -> None:
        """Read the table anew."""
        async with self._reloading:
            async with self._database.connect() as connection:
                rows = await connection.execute(select(table).order_by(table.c.created_at, table.c.name))
                found = [_registered(row._mapping) for row in rows]
            self._snapshot = {(entry.tenant_id, entry.name): entry for entry in found}

    async def route(self, model: str, caller: Caller, *, user: str | None = None) -> Route:
        """Raises ModelNotFound, also for another tenant's adapter, ModelNotAllowed where the caller's limits leave it
        out, or AdapterError if its files are gone for good."""
        entry = self._find(model, caller)
        if entry is None and model != self.base:
            raise ModelNotFound(f"The model {model!r} does not exist or you do not have access to it.", "model")
        if not caller.policy.may_use(model):
            raise ModelNotAllowed(f"This key may not use the model {model!r}.", "model")
        if entry is None:
            return Route(base=self.base, adapter=None)
        if not Path(entry.path).is_dir():  # noqa: ASYNC240  a stat of a local disk
            entry = await self._restore(entry)
        return Route(base=self.base, adapter=entry.adapter())

    def composed(self, parts: tuple[WeightedAdapter, ...]) -> Route:
        """The base with the weighted sum of what these adapters add."""
        return Route(base=self.base, adapter=None, composition=parts)

    def source_of(self, model: str, caller: Caller) -> str | None:
        """The source of an adapter this caller may know of; "" for the base; None where there is no such model."""
        entry = self._find(model, caller)
        return entry.source if entry is not None else "" if model == self.base else None

    def visible(self, caller: Caller) -> list[Registered]:
        """The adapters this caller may use, oldest first."""
        mine = [entry for entry in self._snapshot.values() if self._find(entry.name, caller) is entry]
        return [entry for entry in mine if caller.policy.may_use(entry.name)]

    def everything(self) -> list[Registered]:
        """The adapters of all tenants and those shared, oldest first."""
        return list(self._snapshot.values())

    def get(self, tenant_id: str, name: str) -> Registered:
        """Raises AdapterNotRegistered."""
        entry = self._snapshot.get((tenant_id, name))
        if entry is None:
            raise AdapterNotRegistered(f"There is no adapter {name!r}.", "name")
        return entry

    async def register(self, name: str, source: str, tenant_id: str = SHARED) -> Registered:
        """Fetch, validate against the base, and only then enter.

        Raises MalformedRequest, AdapterNameTaken, TenantNotFound or AdapterError; the catalogue is then as it was.
        """
        self._check_name(name, tenant_id)
        stored = await self.store.fetch(source, name)
        card = await self._engine.inspect(stored.adapter)
        entry = Registered(
            name=name,
            tenant_id=tenant_id,
            adapter_id=stored.adapter.id,
            path=stored.adapter.path,
            source=stored.source,
            revision=stored.revision,
            num_bytes=stored.num_bytes,
            card=card,
            created_at=time.time(),
        )
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(table).values(**msgspec.to_builtins(entry)))
                if tenant_id != SHARED:  # it may have been deleted during the fetch
                    await require_tenant(connection, tenant_id)
        except IntegrityError as error:
            raise AdapterNameTaken(f"There is a model named {name!r} already.", "name") from error
        await self.reload()
        return entry

    async def remove(self, tenant_id: str, name: str) -> None:
        """Raises AdapterNotRegistered, or AdapterInUse while requests name it."""
        entry = self.get(tenant_id, name)
        others = [e for e in self._snapshot.values() if e.adapter_id == entry.adapter_id and e is not entry]
        if not others:
            await self._engine.unload(entry.adapter_id)
        async with self._database.begin() as connection:
            await connection.execute(delete(table).where(table.c.tenant_id == tenant_id, table.c.name == name))
        await self.reload()

    async def let_go(self, tenant_id: str) -> None:
        """Forget the adapters of a deleted tenant; what is in use ends its requests and leaves the device later."""
        gone = {entry.adapter_id for entry in self._snapshot.values() if entry.tenant_id == tenant_id}
        await self.reload()
        for adapter_id in gone - {entry.adapter_id for entry in self._snapshot.values()}:
            with contextlib.suppress(EngineError):
                await self._engine.unload(adapter_id)

    def _find(self, model: str, caller: Caller) -> Registered | None:
        own = self._snapshot.get((caller.tenant_id, model))
        return own or self._snapshot.get((SHARED, model))

    def _check_name(self, name: str, tenant_id: str) -> None:
        if _NAME.fullmatch(name) is None:
            raise MalformedRequest(
                f"{name!r} is not a model name: 1 to 128 letters, digits and any of . _ / : - are, "
                "where no part between slashes is empty or begins with a dot.",
                "name",
            )
        if name == self.base or (tenant_id, name) in self._snapshot:
            raise AdapterNameTaken(f"There is a model named {name!r} already.", "name")

    async def _restore(self, entry: Registered) -> Registered:
        """Fetch the files of a registered adapter again, because the cache lost them."""
        stored = await self.store.fetch(entry.source, entry.name)
        mine = (table.c.tenant_id == entry.tenant_id) & (table.c.name == entry.name)
        card = entry.card
        if stored.adapter.id != entry.adapter_id:  # the source has other files by now
            card = await self._engine.inspect(stored.adapter)
        changes = {
            "adapter_id": stored.adapter.id,
            "path": stored.adapter.path,
            "revision": stored.revision,
            "num_bytes": stored.num_bytes,
            "card": msgspec.to_builtins(card),
        }
        async with self._database.begin() as connection:
            await connection.execute(update(table).where(mine).values(**changes))
        await self.reload()
        return self.get(entry.tenant_id, entry.name)


def _registered(row: Any) -> Registered:
    return msgspec.convert({str(column): value for column, value in row.items()}, Registered)
