"""The catalogue on its own: concurrent changes, files that come back different, names that hide others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy import delete, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from support.gateway import BASE, settings_in, write_adapter

from loraplex.auth.caller import Caller
from loraplex.auth.errors import TenantNotFound
from loraplex.auth.store.database import open_database
from loraplex.auth.store.tables import adapters, tenants
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import AdapterInvalid, AdapterNotFound
from loraplex.engines.protocol import Adapter
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import AdapterNameTaken, ModelNotFound

ADMIN = Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")
ACME = Caller(tenant_id="t1", tenant_name="acme", key_id="k", role="inference")
OTHER = Caller(tenant_id="t2", tenant_name="other", key_id="k", role="inference")


class Fetched(msgspec.Struct, frozen=True):
    adapter: Adapter
    source: str
    revision: str = "1"
    num_bytes: int = 10


class Shelf:
    """A store whose source is a directory and whose identity of it is what `version` says."""

    def __init__(self, version: str = "v1") -> None:
        self.version = version
        self.num_fetches = 0

    async def address(self, uri: str) -> str:
        return uri

    async def fetch(self, uri: str, name: str, *, token: str | None = None) -> Fetched:
        self.num_fetches += 1
        await asyncio.sleep(0)
        if not Path(uri).is_dir():  # noqa: ASYNC240  a stat of a local disk
            raise AdapterNotFound("there is no such directory")
        return Fetched(Adapter(id=self.version, name=name, path=uri), uri, revision=self.version)


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    async with engine.begin() as connection:
        for id, name in (("t1", "acme"), ("t2", "other")):
            await connection.execute(insert(tenants).values(id=id, name=name, created_at=0.0))
    yield engine
    await engine.dispose()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def catalogue(database: AsyncEngine, shelf: Shelf, tmp_path: Path) -> Catalogue:
    return Catalogue(database, shelf, EchoEngine(settings_in(tmp_path)), BASE)


async def test_reload_that_read_first_never_replaces_one_that_read_later(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reading of the table is held until a registration after it is complete, or as good as."""
    source = str(write_adapter(tmp_path / "a"))
    read, go_on = asyncio.Event(), asyncio.Event()
    execute = AsyncConnection.execute

    async def slow_execute(self: AsyncConnection, *arguments: Any) -> Any:
        result = await execute(self, *arguments)
        if str(arguments[0]).startswith("SELECT") and not read.is_set():
            read.set()
            await go_on.wait()
        return result

    monkeypatch.setattr(AsyncConnection, "execute", slow_execute)
    early = asyncio.create_task(catalogue.reload())
    await read.wait()
    registering = asyncio.create_task(catalogue.register("late", source))
    await asyncio.wait({registering}, timeout=0.3)
    go_on.set()
    await asyncio.gather(early, registering)
    assert (await catalogue.route("late", ACME)).adapter is not None


async def test_registrations_of_one_name_at_once_let_one_win(catalogue: Catalogue, tmp_path: Path) -> None:
    source = str(write_adapter(tmp_path / "a"))
    results = await asyncio.gather(*(catalogue.register("one", source) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, AdapterNameTaken) for result in results) == 4
    assert [entry.name for entry in catalogue.visible(ADMIN)] == ["one"]


async def test_own_adapter_hides_the_shared_one_of_its_name(catalogue: Catalogue, tmp_path: Path) -> None:
    shared, own = str(write_adapter(tmp_path / "a")), str(write_adapter(tmp_path / "b"))
    await catalogue.register("same", shared)
    await catalogue.register("same", own, "t1")
    for caller, source in ((ACME, own), (OTHER, shared)):
        adapter = (await catalogue.route("same", caller)).adapter
        assert adapter is not None
        assert adapter.path == source
        assert [entry.source for entry in catalogue.visible(caller)] == [source]
    assert [entry.source for entry in catalogue.visible(ADMIN)] == [shared]
    assert [entry.source for entry in catalogue.everything()] == [shared, own]


async def test_adapter_of_a_tenant_is_another_tenants_unknown_model(catalogue: Catalogue, tmp_path: Path) -> None:
    await catalogue.register("private", str(write_adapter(tmp_path / "a")), "t1")
    with pytest.raises(ModelNotFound) as foreign:
        await catalogue.route("private", OTHER)
    with pytest.raises(ModelNotFound) as unknown:
        await catalogue.route("nothing!", OTHER)
    assert str(foreign.value) == str(unknown.value).replace("nothing!", "private")


async def test_files_that_come_back_different_are_inspected_anew(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "a", rank=4)
    assert (await catalogue.register("one", str(source))).card.rank == 4
    source.rename(tmp_path / "away")
    with pytest.raises(AdapterNotFound):
        await catalogue.route("one", ACME)
    await _points_to(catalogue, tmp_path / "gone")
    write_adapter(source, rank=9)
    shelf.version = "v2"
    adapter = (await catalogue.route("one", ACME)).adapter
    assert adapter == Adapter(id="v2", name="one", path=str(source))
    entry = catalogue.get("", "one")
    assert (entry.card.rank, entry.card.adapter_id, entry.revision) == (9, "v2", "v2")


async def test_files_that_come_back_broken_change_nothing(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    entry = await catalogue.register("one", str(source))
    await _points_to(catalogue, tmp_path / "gone")
    (source / "adapter_config.json").write_text("{}")
    shelf.version = "v2"
    with pytest.raises(AdapterInvalid):
        await catalogue.route("one", ACME)
    assert catalogue.get("", "one").adapter_id == entry.adapter_id


async def test_files_that_are_there_are_not_fetched_again(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    await catalogue.register("one", str(write_adapter(tmp_path / "a")))
    await catalogue.route("one", ACME)
    assert shelf.num_fetches == 1


async def test_remove_keeps_an_adapter_loaded_while_another_name_leads_to_it(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloaded: list[str] = []

    async def unload(adapter_id: str) -> None:
        unloaded.append(adapter_id)

    monkeypatch.setattr(catalogue._engine, "unload", unload)
    source = str(write_adapter(tmp_path / "a"))
    for name in ("one", "two"):
        await catalogue.register(name, source)
    await catalogue.remove("", "one")
    assert unloaded == []
    await catalogue.remove("", "two")
    assert unloaded == ["v1"]


async def _points_to(catalogue: Catalogue, path: Path) -> None:
    """As if the cache had held the files at `path`."""
    async with catalogue._database.begin() as connection:
        await connection.execute(update(adapters).values(path=str(path)))
    await catalogue.reload()


async def test_tenant_deleted_during_the_fetch_gets_no_adapter(
    catalogue: Catalogue, database: AsyncEngine, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = shelf.fetch

    async def fetch_meanwhile(uri: str, name: str, *, token: str | None = None) -> Fetched:
        async with database.begin() as connection:
            await connection.execute(delete(tenants).where(tenants.c.id == "t1"))
        return await fetch(uri, name)

    monkeypatch.setattr(shelf, "fetch", fetch_meanwhile)
    with pytest.raises(TenantNotFound):
        await catalogue.register("late", str(write_adapter(tmp_path / "a")), "t1")
    await catalogue.reload()
    assert catalogue.everything() == []
