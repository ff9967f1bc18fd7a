"""The catalogue's tables: names, the versions that each has had, and what a name leads to. No other module writes them.

Every change is one transaction, so that a process that is killed leaves the catalogue as it was or as it was to be.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.store.changes import CATALOGUE, announce
from loraplex.auth.store.tables import adapter_versions as versions
from loraplex.auth.store.tables import adapters as names
from loraplex.auth.tenants import require_tenant
from loraplex.engines.protocol import AdapterCard
from loraplex.gateway.errors import AdapterNameTaken

_Kind = TypeVar("_Kind", bound=msgspec.Struct)
_ROWS_A_TURN = 50  # about two milliseconds
SHARED = ""  # the tenant of adapters that everyone may use
Key = tuple[str, str]  # (tenant id, name)
State = Literal["registered", "fetching", "ready", "failed"]
_IS_UNREADY: ColumnElement[bool] = versions.c.state != "ready"


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter: where it comes from and, once it was fetched, what it is, for ever.

    `adapter_id` is the hash of its content, "" until that is known. `reason` says why it failed, `notes` what an
    operator should know of one that did not.
    """

    number: int
    source: str
    state: State = "registered"
    reason: str = ""
    adapter_id: str = ""
    revision: str = ""
    num_bytes: int = 0
    card: AdapterCard | None = None
    notes: tuple[str, ...] = ()
    created_at: float


class Target(msgspec.Struct, frozen=True):
    """One way a route may take, in proportion to its weight; `model` may say `name@version`."""

    model: str
    weight: float


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """One name of the catalogue. `tenant_id` is "" for one that every tenant may use.

    Requests are served by `current_version`, None until one is ready. `versions` are in the order of their numbers. A
    route has `targets` and no versions.
    """

    name: str
    tenant_id: str
    current_version: int | None
    wanted_version: int
    pinned: bool
    targets: tuple[Target, ...] | None
    last_used_at: float | None
    created_at: float
    versions: tuple[Version, ...] = ()

    @property
    def key(self) -> Key:
        return self.tenant_id, self.name

    @property
    def is_servable(self) -> bool:
        return self.current_version is not None or self.targets is not None

    def version(self, number: int | None) -> Version | None:
        return next((version for version in self.versions if version.number == number), None)

    @property
    def shown(self) -> Version:
        """The version that serves requests, or else the one that is to."""
        return self.version(self.current_version) or self.version(self.wanted_version) or self.versions[-1]

    @property
    def source(self) -> str:
        return self.shown.source if self.versions else ""


class AdapterRecords:
    """The rows of one database."""

    def __init__(self, database: AsyncEngine) -> None:
        self._database = database

    async def all(self) -> list[Registered]:
        """Oldest first."""
        async with self._database.connect() as connection:
            return await _read(connection)

    async def one(self, key: Key) -> Registered | None:
        async with self._database.connect() as connection:
            found = await _read(connection, key)
        return found[0] if found else None

    async def add(self, key: Key, *, source: str = "", targets: tuple[Target, ...] | None = None) -> None:
        """A new name with its first version, or a route. Raises AdapterNameTaken, TenantNotFound."""
        now = time.time()
        row = {"tenant_id": key[0], "name": key[1], "created_at": now}
        row["targets"] = None if targets is None else msgspec.to_builtins(targets)
        try:
            async with self._database.begin() as connection:
                await connection.execute(insert(names).values(**row))
                if targets is None:
                    await connection.execute(insert(versions).values(**_new_version(key, 1, source, now)))
                if key[0] != SHARED:
                    await require_tenant(connection, key[0])
                await announce(connection, CATALOGUE)
        except IntegrityError as error:
            raise AdapterNameTaken(f"There is a model named {key[1]!r} already.", "name") from error

    async def add_version(self, key: Key, source: str) -> int | None:
        """The number of a further version, the wanted one from now on; None where the name is gone."""
        newest = select(func.coalesce(func.max(versions.c.number), 0)).where(_of(versions, key)).scalar_subquery()
        now = time.time()
        async with self._database.begin() as connection:
            # the write comes first, so that of two at once one waits here for the other
            change = update(names).where(_of(names, key)).values(wanted_version=newest + 1)
            if not (await connection.execute(change)).rowcount:
                return None
            number = int((await connection.execute(select(names.c.wanted_version).where(_of(names, key)))).scalar_one())
            await connection.execute(insert(versions).values(**_new_version(key, number, source, now)))
            await announce(connection, CATALOGUE)
        return number

    async def drop_version(self, key: Key, version: Version) -> None:
        """Take a version back, and the name with it, if it has no other; one that is ready stays."""
        async with self._database.begin() as connection:
            await _lock(connection, key)
            dropped = await connection.execute(delete(versions).where(_this(key, version), _IS_UNREADY))
            left = select(func.max(versions.c.number)).where(_of(versions, key)).scalar_subquery()
            back = func.coalesce(names.c.current_version, left, 0)
            if not dropped.rowcount:
                return
            change = update(names).where(_of(names, key), names.c.wanted_version == version.number)
            await connection.execute(change.values(wanted_version=back))
            empty = _of(names, key) & names.c.targets.is_(None) & left.is_(None)
            await connection.execute(delete(names).where(empty))
            await announce(connection, CATALOGUE)

    async def set_state(self, key: Key, version: Version, state: State, reason: str = "") -> None:
        await self._change_version(key, version, {"state": state, "reason": reason[:4096]})

    async def advance(self, key: Key, version: Version, state: State, reason: str = "") -> bool:
        """`set_state` of a version on its way; False where it is ready, for another gateway brought it, or gone."""
        return await self._change_version(key, version, {"state": state, "reason": reason[:4096]}, _IS_UNREADY)

    async def complete(self, key: Key, version: Version, found: Mapping[str, Any]) -> bool:
        """A version is ready, and serves requests if it is the wanted one; False where it was already, or is gone."""
        async with self._database.begin() as connection:
            await _lock(connection, key)
            done = update(versions).where(_this(key, version), _IS_UNREADY)
            if not (await connection.execute(done.values(state="ready", reason="", **found))).rowcount:
                return False
            wanted = _of(names, key) & (names.c.wanted_version == version.number)
            await connection.execute(update(names).where(wanted).values(current_version=version.number))
            await announce(connection, CATALOGUE)
        return True

    async def point(self, key: Key, number: int) -> None:
        """Requests go to this version from now on, whatever was wanted before."""
        await self.change(key, current_version=number, wanted_version=number)

    async def change(self, key: Key, **values: Any) -> None:
        """Set columns of a name."""
        async with self._database.begin() as connection:
            await connection.execute(update(names).where(_of(names, key)).values(**values))
            await announce(connection, CATALOGUE)

    async def remove(self, key: Key) -> None:
        async with self._database.begin() as connection:
            await connection.execute(delete(names).where(_of(names, key)))
            await announce(connection, CATALOGUE)

    async def used(self, times: Mapping[Key, float]) -> None:
        """Note when names were last used, in seconds since 1970, unless a later time is there."""
        async with self._database.begin() as connection:
            for key, when in sorted(times.items()):  # or two gateways could wait for each other's rows
                is_later = names.c.last_used_at.is_(None) | (names.c.last_used_at < when)
                await connection.execute(update(names).where(_of(names, key), is_later).values(last_used_at=when))

    async def _change_version(
        self, key: Key, version: Version, values: Mapping[str, Any], *conditions: ColumnElement[bool]
    ) -> bool:
        """False where there is no such version, or a condition does not hold."""
        async with self._database.begin() as connection:
            await _lock(connection, key)
            change = update(versions).where(_this(key, version), *conditions).values(**values)
            if not (await connection.execute(change)).rowcount:
                return False
            await announce(connection, CATALOGUE)
        return True


def _of(table: Any, key: Key) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = (table.c.tenant_id == key[0]) & (table.c.name == key[1])
    return condition


def _this(key: Key, version: Version) -> ColumnElement[bool]:
    """This very version: a name that was deleted and registered again counts from 1 once more."""
    is_number, is_time = versions.c.number == version.number, versions.c.created_at == version.created_at
    return _of(versions, key) & is_number & is_time


async def _lock(connection: AsyncConnection, key: Key) -> None:
    """Lock the name; every change of its versions begins with this, so that no two wait for each other."""
    await connection.execute(select(names.c.name).where(_of(names, key)).with_for_update())


def _new_version(key: Key, number: int, source: str, now: float) -> dict[str, Any]:
    row = {"tenant_id": key[0], "name": key[1], "number": number, "source": source}
    return {**row, "state": "registered", "created_at": now}


async def _read(connection: AsyncConnection, key: Key | None = None) -> list[Registered]:
    entries = select(names).order_by(names.c.created_at, names.c.name)
    numbered = select(versions).order_by(versions.c.number)
    if key is not None:
        entries, numbered = entries.where(_of(names, key)), numbered.where(_of(versions, key))
    # names first: a version that is added between the two readings is of a name that is read as well, or of none
    found = await _converted(connection, entries, Registered)
    by_key: dict[Key, list[Version]] = {}
    for key_of_version, version in await _converted(connection, numbered, Version):
        by_key.setdefault(key_of_version, []).append(version)
    read = [msgspec.structs.replace(entry, versions=tuple(by_key.get(key_of, ()))) for key_of, entry in found]
    return [entry for entry in read if entry.versions or entry.targets is not None]  # others are leaving just now


async def _converted(connection: AsyncConnection, query: Select[Any], kind: type[_Kind]) -> list[tuple[Key, _Kind]]:
    """A query's rows, some at a time: there may be thousands, and the loop's other tasks have their turns meanwhile."""
    result = await connection.stream(query)
    found = []
    try:
        told = set(result.keys())
        columns = [name for name in kind.__struct_fields__ if name in told]
        async for rows in result.mappings().partitions(_ROWS_A_TURN):
            for row in rows:
                fields = {name: row[name] for name in columns}
                found.append(((row["tenant_id"], row["name"]), msgspec.convert(fields, kind)))
            await asyncio.sleep(0)
    finally:
        await result.close()
    return found
