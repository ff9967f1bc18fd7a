"""What the catalogue does on its own goes on when a part of it fails."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from support.gateway import BASE, settings_in, write_adapter

from loraplex.auth.caller import Caller
from loraplex.auth.store.database import open_database
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import DiskCacheFull
from loraplex.engines.protocol import Adapter
from loraplex.gateway.adapter_records import AdapterRecords, Key
from loraplex.gateway.catalogue import Catalogue

ACME = Caller(tenant_id="t1", tenant_name="acme", key_id="k", role="inference")
KEY = "", "one"


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = await open_database(settings_in(tmp_path).database.url)
    yield engine
    await engine.dispose()


@pytest_asyncio.fixture
async def catalogue(database: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Catalogue]:
    """With the adapter `one`; it is not entered so far."""
    monkeypatch.setattr("loraplex.gateway.upkeep._ROUND_SECONDS", 0.02)
    settings = settings_in(tmp_path)
    store = AdapterStore(settings.adapters)
    catalogue = Catalogue(database, store, EchoEngine(settings), BASE)
    await catalogue.register("one", str(write_adapter(tmp_path / "local" / "one")))
    yield catalogue
    await store.close()


async def last_use(database: AsyncEngine) -> float | None:
    """What the database says."""
    entry = await AdapterRecords(database).one(KEY)
    assert entry is not None
    return entry.last_used_at


async def written(database: AsyncEngine) -> float:
    async with asyncio.timeout(5):
        while (found := await last_use(database)) is None:
            await asyncio.sleep(0.01)
    return found


async def test_use_that_could_not_be_written_is_written_by_a_later_round(
    catalogue: Catalogue, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, num_failures = catalogue._records.used, 0

    async def fail_once(times: Mapping[Key, float]) -> None:
        nonlocal num_failures
        if not num_failures:
            num_failures += 1
            raise OperationalError("UPDATE", {}, Exception("deadlock detected"))
        await used(times)

    monkeypatch.setattr(catalogue._records, "used", fail_once)
    async with catalogue:
        await catalogue.route("one", ACME)
        assert await written(database) == catalogue.last_used_at(catalogue.get(*KEY))
    assert num_failures == 1


async def test_use_whose_writing_the_end_cuts_off_is_written_then(
    catalogue: Catalogue, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, is_writing = catalogue._records.used, asyncio.Event()

    async def hang_once(times: Mapping[Key, float]) -> None:
        if not is_writing.is_set():
            is_writing.set()
            await asyncio.sleep(60)
        await used(times)

    monkeypatch.setattr(catalogue._records, "used", hang_once)
    async with catalogue:
        await catalogue.route("one", ACME)
        await is_writing.wait()
    assert await last_use(database) is not None


async def test_end_says_what_could_not_be_written_and_goes_on(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(times: Mapping[Key, float]) -> None:
        raise OperationalError("UPDATE", {}, Exception("no answer"))

    monkeypatch.setattr(catalogue._records, "used", fail)
    async with catalogue:
        await catalogue.route("one", ACME)
    assert "last used could not be written: OperationalError" in caplog.text


async def test_rounds_go_on_where_uploads_cannot_be_removed(
    catalogue: Catalogue, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    was_tried = asyncio.Event()

    async def fail(kept: Collection[str], *, older_than_seconds: float = 0.0) -> None:
        was_tried.set()
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(catalogue.store, "drop_uploads", fail)
    async with catalogue:
        await was_tried.wait()
        await catalogue.route("one", ACME)
        await written(database)
    assert "uploads that no version names could not be removed" in caplog.text


@pytest.mark.parametrize(
    "error", [DiskCacheFull("in use"), OperationalError("SELECT", {}, Exception("no answer"))], ids=["disk", "database"]
)
async def test_preload_that_failed_for_a_moment_is_tried_again(
    catalogue: Catalogue, database: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = EchoEngine(settings_in(tmp_path))
    load, num_failures = engine.load, 0

    async def fail_once(adapter: Adapter) -> None:
        nonlocal num_failures
        if not num_failures:
            num_failures += 1
            raise error
        await load(adapter)

    monkeypatch.setattr(engine, "load", fail_once)
    await engine.start(lambda progress: None)
    async with Catalogue(database, catalogue.store, engine, BASE, preload=("one",)), asyncio.timeout(10):
        while not await engine.residency():
            await asyncio.sleep(0.02)
    assert num_failures == 1
