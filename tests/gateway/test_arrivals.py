"""Versions on their way, with an engine that is not to be had, another gateway at the same one, or a broken secret."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine
from support.gateway import BASE, settings_in, write_adapter

from loraplex.auth.errors import SecretUnreadable
from loraplex.auth.store.database import open_database
from loraplex.engines.adapters.store import AdapterStore, StoredAdapter
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import AdapterError, EngineUnavailable
from loraplex.engines.protocol import Adapter, AdapterCard, HealthState
from loraplex.gateway.adapter_records import AdapterRecords, Version
from loraplex.gateway.arrivals import Arrivals, NoTokens, OtherBase
from loraplex.gateway.catalogue import Catalogue

KEY = "", "one"


class AbsentEngine(EchoEngine):
    """An engine that is not to be had, in whichever state."""

    def __init__(self, home: Path, state: HealthState) -> None:
        super().__init__(settings_in(home))
        self._state = state
        self.num_inspections = 0

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        self.num_inspections += 1
        raise EngineUnavailable(f"the engine is {self._state}")


class HeldStore(AdapterStore):
    """Of a gateway with a disk of its own; `gate` holds its fetches up."""

    def __init__(self, home: Path, disk: str) -> None:
        super().__init__(msgspec.structs.replace(settings_in(home).adapters, cache_dir=str(home / disk)))
        self.num_fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, *arguments: Any, **options: Any) -> StoredAdapter:
        self.num_fetches += 1
        await self.gate.wait()
        return await super().fetch(*arguments, **options)


@dataclass
class Site:
    """One database with one version that a gateway is about to bring, and the disks of the gateways on it."""

    home: Path
    database: AsyncEngine
    stores: list[HeldStore] = field(default_factory=list)

    @property
    def source(self) -> Path:
        return self.home / "local" / "one"

    def store(self) -> HeldStore:
        self.stores.append(HeldStore(self.home, f"cache-{len(self.stores)}"))
        return self.stores[-1]

    def catalogue(self, engine: EchoEngine) -> Catalogue:
        return Catalogue(self.database, self.store(), engine, BASE)

    @asynccontextmanager
    async def arrivals(self, store: HeldStore) -> AsyncIterator[Arrivals]:
        async def ignore(key: object) -> None: ...

        engine, base = EchoEngine(settings_in(self.home)), OtherBase(frozenset())
        arrivals = Arrivals(AdapterRecords(self.database), store, engine, ignore, NoTokens(), base)
        yield arrivals
        await arrivals.close()

    async def added(self) -> Version:
        await AdapterRecords(self.database).add(KEY, source=str(self.source))
        return await self.version()

    async def version(self) -> Version:
        entry = await AdapterRecords(self.database).one(KEY)
        assert entry is not None
        return entry.shown


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    database = await open_database(settings_in(tmp_path).database.url)
    site = Site(tmp_path, database)
    write_adapter(site.source)
    yield site
    for store in site.stores:
        await store.close()
    await database.dispose()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("state", ["draining", "failed"])
async def test_arrival_while_the_engine_stops_or_failed_is_taken_up_by_the_next_start(
    site: Site, state: HealthState
) -> None:
    absent = AbsentEngine(site.home, state)

    async def has_tried_twice() -> bool:
        return absent.num_inspections == 2 or (await site.version()).state == "failed"

    async with site.catalogue(absent) as stopping:
        await stopping.register("one", str(site.source), waits=False)
        await until(has_tried_twice)
    assert ((await site.version()).state, (await site.version()).reason) == ("fetching", "")

    async def is_ready() -> bool:
        return (await site.version()).state == "ready"

    async with site.catalogue(EchoEngine(settings_in(site.home))):
        await until(is_ready)


async def test_registration_that_waits_is_told_that_the_engine_stops(site: Site) -> None:
    async with site.catalogue(AbsentEngine(site.home, "draining")) as stopping:
        with pytest.raises(EngineUnavailable):
            await stopping.register("one", str(site.source))
        assert stopping.everything() == []


async def test_version_that_another_gateway_brought_is_not_fetched_by_one_that_takes_it_up(site: Site) -> None:
    seen = await site.added()
    first, late = site.store(), site.store()
    async with site.arrivals(first) as bringing, site.arrivals(late) as taking_up:
        await bringing.bring(KEY, seen)
        ready = await site.version()
        await taking_up.bring(KEY, seen)
    assert (late.num_fetches, await site.version()) == (0, ready)


@pytest.mark.parametrize("is_gone", [True, False], ids=["source-gone", "source-changed"])
async def test_version_that_another_gateway_brought_meanwhile_stays_as_it_is(site: Site, is_gone: bool) -> None:
    seen = await site.added()
    first, late = site.store(), site.store()
    late.gate.clear()

    async def is_fetching() -> bool:
        return late.num_fetches == 1

    async with site.arrivals(first) as bringing, site.arrivals(late) as taking_up:
        taking_up.begin(KEY, seen)
        await until(is_fetching)
        await bringing.bring(KEY, seen)
        ready = await site.version()
        shutil.rmtree(site.source)
        if not is_gone:
            write_adapter(site.source, rank=8)
        late.gate.set()
        await asyncio.gather(*taking_up._tasks)
    assert (ready.state, await site.version()) == ("ready", ready)


async def test_registration_that_fails_does_not_take_back_what_another_gateway_made_ready(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = site.store()
    async with site.catalogue(EchoEngine(settings_in(site.home))) as catalogue, site.arrivals(other) as taking_up:

        async def fail_late(*arguments: Any, **options: Any) -> StoredAdapter:
            await taking_up.bring(KEY, await site.version())
            raise AdapterError("this gateway cannot reach it")

        monkeypatch.setattr(site.stores[-1], "fetch", fail_late)
        with pytest.raises(AdapterError):
            await catalogue.register("one", str(site.source))
        assert catalogue.get(*KEY).current_version == 1
    assert (await site.version()).state == "ready"


async def test_registration_that_fails_for_a_reason_of_the_servers_own_leaves_the_name_free(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(tenant_id: str, address: str) -> str | None:
        raise SecretUnreadable("the secret cannot be decrypted")

    async with site.catalogue(EchoEngine(settings_in(site.home))) as catalogue:
        with monkeypatch.context() as broken:
            broken.setattr(catalogue._tokens, "token_for", unreadable)
            with pytest.raises(SecretUnreadable):
                await catalogue.register("one", str(site.source))
        assert catalogue.everything() == []
        registered = await catalogue.register("one", str(site.source))
        with monkeypatch.context() as broken:
            broken.setattr(catalogue._tokens, "token_for", unreadable)
            with pytest.raises(SecretUnreadable):
                await catalogue.update(KEY)
        assert catalogue.get(*KEY) == registered
