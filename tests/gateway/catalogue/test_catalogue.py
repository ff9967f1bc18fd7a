"""The catalogue on its own: concurrent changes, files that come back different, names that hide others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from support.gateway import write_adapter
from support.shelf import ACME, ADMIN, OTHER, Fetched, Shelf, once_ready

from loraplex.auth.store.tables import adapters, tenants
from loraplex.engines.errors import (
    AdapterChanged,
    AdapterError,
    AdapterNotFound,
    AdapterSourceUnavailable,
    AdapterTooLarge,
    DiskCacheFull,
)
from loraplex.engines.protocol import Adapter
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import (
    AdapterFailed,
    AdapterNameTaken,
    AdapterNotRegistered,
    ModelNotFound,
)


async def test_reload_that_read_first_never_replaces_one_that_read_later(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reading of the table is held until a registration after it is complete, or as good as."""
    source = str(write_adapter(tmp_path / "a"))
    read, go_on = asyncio.Event(), asyncio.Event()
    stream = AsyncConnection.stream

    async def slow_stream(self: AsyncConnection, *arguments: Any) -> Any:
        result = await stream(self, *arguments)
        if not read.is_set():
            read.set()
            await go_on.wait()
        return result

    monkeypatch.setattr(AsyncConnection, "stream", slow_stream)
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


async def test_own_adapter_hides_the_shared_one_of_its_name(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    shared, own = str(write_adapter(tmp_path / "a")), str(write_adapter(tmp_path / "b"))
    await catalogue.register("same", shared)
    shelf.version = "v2"
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


async def test_files_that_come_back_different_make_the_version_failed(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "a")
    await catalogue.register("one", str(source))
    shelf.places.clear()
    shelf.version = "v2"
    with pytest.raises(AdapterChanged):
        await catalogue.route("one", ACME)
    with pytest.raises(AdapterFailed, match="other files by now"):
        await catalogue.route("one", ACME)
    shelf.version = "v1"
    await catalogue.retry(("", "one"))
    adapter = (await once_ready(catalogue, "one")).adapter
    assert adapter == Adapter(id="v1", name="one", path=str(source))


@pytest.mark.parametrize(
    "kind", [AdapterSourceUnavailable, AdapterNotFound, AdapterTooLarge, DiskCacheFull], ids=lambda kind: kind.__name__
)
async def test_files_that_are_away_for_a_moment_change_nothing(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[AdapterError]
) -> None:
    """Whatever keeps one gateway from them: a source's silence, a token of yesterday, a full disk or another's."""
    await catalogue.register("one", str(write_adapter(tmp_path / "a")))
    shelf.places.clear()
    fetch = shelf.fetch

    async def fetch_nothing(*arguments: Any, **options: Any) -> Fetched:
        raise kind("not now")

    monkeypatch.setattr(shelf, "fetch", fetch_nothing)
    with pytest.raises(kind):
        await catalogue.route("one", ACME)
    monkeypatch.setattr(shelf, "fetch", fetch)
    assert (await catalogue.route("one", ACME)).adapter is not None


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


async def test_tenant_deleted_during_the_fetch_gets_no_adapter(
    catalogue: Catalogue, database: AsyncEngine, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = shelf.fetch

    async def fetch_meanwhile(uri: str, name: str, **options: str | None) -> Fetched:
        async with database.begin() as connection:
            await connection.execute(delete(tenants).where(tenants.c.id == "t1"))
            await connection.execute(delete(adapters).where(adapters.c.tenant_id == "t1"))  # as delete_tenant does
        return await fetch(uri, name)

    monkeypatch.setattr(shelf, "fetch", fetch_meanwhile)
    with pytest.raises(AdapterNotRegistered):
        await catalogue.register("late", str(write_adapter(tmp_path / "a")), "t1")
    await catalogue.reload()
    assert catalogue.everything() == []
