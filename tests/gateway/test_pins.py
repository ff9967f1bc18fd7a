"""What pins may take of the device, all together and those of one tenant; an engine in which rank r takes r bytes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy import insert
from support.gateway import BASE, running, settings_in, write_adapter
from support.problems import assert_problem

from loraplex.auth.store.changes import CATALOGUE, ChangeWatch
from loraplex.auth.store.database import open_database
from loraplex.auth.store.tables import tenants
from loraplex.engines.adapters.store import AdapterStore, StoredAdapter
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import AdapterInUse, AdapterSourceUnavailable, NoRoomBesidePins
from loraplex.engines.protocol import Adapter, AdapterCard
from loraplex.engines.stats import EngineStats, TierStats
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import PinsFull
from loraplex.gateway.pins import PinShares

ROOM = 100


class SmallDevice(EchoEngine):
    """An echo with room for adapters on its device, which reads their files to bring them there."""

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        card = await super().inspect(adapter)
        return msgspec.structs.replace(card, num_bytes=card.rank)

    async def load(self, adapter: Adapter) -> None:
        await self.inspect(adapter)
        await super().load(adapter)

    async def stats(self) -> EngineStats:
        tier = TierStats(tier="device", num_adapters=0, num_bytes=0, capacity_bytes=ROOM)
        return msgspec.structs.replace(await super().stats(), tiers=(tier,))


@dataclass
class Site:
    """One database, and gateways on it."""

    home: Path
    database: Any
    store: AdapterStore

    def gateway(self) -> tuple[Catalogue, SmallDevice]:
        engine = SmallDevice(settings_in(self.home))
        shares = PinShares(all=0.5, tenant=0.25)
        return Catalogue(self.database, self.store, engine, BASE, pin_shares=shares), engine

    def source(self, rank: int) -> str:
        directory = self.home / "local" / str(rank)
        return str(directory if directory.exists() else write_adapter(directory, rank))


async def pinned(engine: EchoEngine) -> list[str]:
    """Their names."""
    return sorted(found.name for found in await engine.residency() if found.pinned)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    settings = settings_in(tmp_path)
    database = await open_database(settings.database.url)
    async with database.begin() as connection:
        for id in ("t1", "t2", "t3"):
            await connection.execute(insert(tenants).values(id=id, name=id, created_at=0.0))
    store = AdapterStore(settings.adapters)
    yield Site(tmp_path, database, store)
    await store.close()
    await database.dispose()


async def test_pins_of_a_tenant_end_at_its_share_and_those_of_all_at_theirs(site: Site) -> None:
    catalogue, engine = site.gateway()
    for tenant, ranks in (("t1", (20, 5, 6)), ("t2", (21, 4)), ("", (1, 3))):
        for rank in ranks:
            await catalogue.register(f"r{rank}", site.source(rank), tenant)
    await catalogue.pin(("t1", "r20"), pinned=True)
    await catalogue.pin(("t1", "r5"), pinned=True)
    await catalogue.pin(("t1", "r5"), pinned=True)  # once more takes nothing more
    with pytest.raises(PinsFull, match=r"6 bytes more would exceed the 25 .* of one tenant .*tenant_pinned_share"):
        await catalogue.pin(("t1", "r6"), pinned=True)
    await catalogue.pin(("t2", "r21"), pinned=True)
    await catalogue.pin(("t2", "r4"), pinned=True)
    with pytest.raises(PinsFull, match=r"1 bytes more would exceed the 50 that pinned .*adapters.pinned_share"):
        await catalogue.pin(("", "r1"), pinned=True)
    assert not catalogue.get("", "r1").pinned
    assert await pinned(engine) == ["r20", "r21", "r4", "r5"]
    await catalogue.pin(("t2", "r4"), pinned=False)
    await catalogue.pin(("", "r1"), pinned=True)
    await catalogue.pin(("", "r3"), pinned=True)
    assert await pinned(engine) == ["r1", "r20", "r21", "r3", "r5"]


async def test_content_that_several_pin_counts_once(site: Site) -> None:
    catalogue, engine = site.gateway()
    for tenant in ("t1", "t2", "t3"):
        for name in ("a", "b"):
            await catalogue.register(name, site.source(25), tenant)
            await catalogue.pin((tenant, name), pinned=True)
    assert len(await pinned(engine)) == 1


async def test_pins_made_at_once_by_two_gateways_do_not_exceed_the_share_together(site: Site) -> None:
    gateways = [site.gateway()[0] for _ in range(2)]
    for rank in (13, 14):
        await gateways[0].register(f"r{rank}", site.source(rank), "t1")
    await gateways[1].reload()
    pins = [one.pin(("t1", name), pinned=True) for one, name in zip(gateways, ("r13", "r14"), strict=True)]
    ends = await asyncio.gather(*pins, return_exceptions=True)
    assert any(isinstance(end, PinsFull) for end in ends)
    await gateways[0].reload()
    assert sum(gateways[0].get("t1", name).pinned for name in ("r13", "r14")) <= 1


async def test_new_version_beyond_the_share_is_served_and_not_kept(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue, engine = site.gateway()
    await catalogue.register("grown", site.source(5), "t1")
    await catalogue.pin(("t1", "grown"), pinned=True)
    grown = await catalogue.update(("t1", "grown"), site.source(60))
    assert (grown.current_version, await pinned(engine)) == (2, [])
    assert "the adapter grown is not kept on the device: 60 bytes more would exceed" in caplog.text
    await catalogue.roll_back(("t1", "grown"))
    assert await pinned(engine) == ["grown"]


async def test_pin_that_the_engine_refuses_leaves_no_trace(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, engine = site.gateway()
    await catalogue.register("unfit", site.source(5), "t1")

    async def refuse(adapter: Adapter, *, pinned: bool) -> None:
        raise NoRoomBesidePins("no room")

    monkeypatch.setattr(engine, "pin", refuse)
    with pytest.raises(NoRoomBesidePins):
        await catalogue.pin(("t1", "unfit"), pinned=True)
    await catalogue.reload()
    assert not catalogue.get("t1", "unfit").pinned


async def test_every_gateway_pins_and_unpins_what_one_is_told(site: Site) -> None:
    (told, _), (other, engine) = site.gateway(), site.gateway()
    await told.register("kept", site.source(5), "t1")
    await engine.start(lambda progress: None)
    async with other, ChangeWatch(site.database) as watch, asyncio.timeout(20):
        watch.on(CATALOGUE, other.reload)
        await told.pin(("t1", "kept"), pinned=True)
        while await pinned(engine) != ["kept"]:
            await asyncio.sleep(0.05)
        await told.remove("t1", "kept")
        while await pinned(engine):
            await asyncio.sleep(0.05)


async def pinned_elsewhere(site: Site, *names: str) -> None:
    """By another gateway; their files are in no cache any more."""
    other = site.gateway()[0]
    for rank, name in enumerate(names, start=5):
        await other.register(name, site.source(rank))
        pinned = await other.pin(("", name), pinned=True)
        shutil.rmtree(site.store.place(pinned.shown.adapter_id))


async def test_start_pins_what_the_disk_has_lost(site: Site) -> None:
    await pinned_elsewhere(site, "kept")
    catalogue, engine = site.gateway()
    await engine.start(lambda progress: None)
    async with catalogue, asyncio.timeout(5):
        while await pinned(engine) != ["kept"]:
            await asyncio.sleep(0.02)


async def test_pin_whose_source_is_away_is_tried_again_and_holds_up_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loraplex.gateway.upkeep._ROUND_SECONDS", 0.02)
    monkeypatch.setattr("loraplex.gateway.upkeep._REPIN_SECONDS", 0.05)
    await pinned_elsewhere(site, "away", "hanging", "here")
    fetch, is_away, released = site.store.fetch, True, asyncio.Event()

    async def fetch_if_there(uri: str, name: str, **options: Any) -> StoredAdapter:
        if is_away and name == "away":
            raise AdapterSourceUnavailable("no answer")
        if name == "hanging":
            await released.wait()
        return await fetch(uri, name, **options)

    monkeypatch.setattr(site.store, "fetch", fetch_if_there)
    catalogue, engine = site.gateway()
    await engine.start(lambda progress: None)
    async with catalogue, asyncio.timeout(5):
        while await pinned(engine) != ["here"] or caplog.text.count("adapter away could not be brought") < 2:
            await asyncio.sleep(0.02)
        is_away = False
        await catalogue.update(("", "here"), site.source(9))  # whoever changes one waits for no other
        while await pinned(engine) != ["away", "here"]:
            await asyncio.sleep(0.02)
        await catalogue.pin(("", "away"), pinned=False)
        released.set()
        while await pinned(engine) != ["hanging", "here"]:
            await asyncio.sleep(0.02)


async def test_pin_that_arrives_when_nothing_pins_it_any_more_is_let_go(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.gateway.upkeep._ROUND_SECONDS", 0.02)
    await pinned_elsewhere(site, "late")
    (catalogue, engine), (told, _) = site.gateway(), site.gateway()
    pin, is_under_way, released = engine.pin, asyncio.Event(), asyncio.Event()

    async def pin_late(adapter: Adapter, *, pinned: bool) -> None:
        if pinned:
            is_under_way.set()
            await released.wait()
        await pin(adapter, pinned=pinned)

    monkeypatch.setattr(engine, "pin", pin_late)
    await engine.start(lambda progress: None)
    async with catalogue, asyncio.timeout(5):
        await is_under_way.wait()
        await told.reload()
        await told.pin(("", "late"), pinned=False)
        await catalogue.reload()
        await asyncio.sleep(0.05)
        released.set()
        while "late" not in [found.name for found in await engine.residency()] or await pinned(engine):
            await asyncio.sleep(0.02)


def test_refusals_are_told_with_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    monkeypatch.setattr("loraplex.gateway.services.build_engine", SmallDevice)
    source = str(write_adapter(tmp_path / "local" / "large", 51))
    with running(settings_in(tmp_path), "k") as gateway, gateway.admin() as admin:
        body = {"name": "large", "source": source}
        assert_problem(admin.post("/admin/v1/adapters", json={**body, "pinned": True}), 409, "pins_full", "pinned")
        assert admin.get("/admin/v1/adapters").json()["data"] == []
        assert_problem(
            admin.post("/admin/v1/adapters", json={**body, "pinned": True, "wait": False}),
            400,
            "invalid_request",
            "pinned",
        )
        assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        assert_problem(admin.post("/admin/v1/adapters/large/pin"), 409, "pins_full", "pinned")
        assert_problem(admin.patch("/admin/v1/adapters/large", json={"pinned": True}), 409, "pins_full", "pinned")
        assert admin.get("/admin/v1/adapters/large").json()["pinned"] is False


async def test_content_that_another_name_has_by_now_stays_when_the_last_request_of_a_deleted_one_ends(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue, engine = site.gateway()
    await catalogue.register("drained", site.source(5), "t1")
    is_in_use = True
    unload = engine.unload

    async def held(adapter_id: str) -> None:
        if is_in_use:
            raise AdapterInUse("a request uses it")
        await unload(adapter_id)

    monkeypatch.setattr(engine, "unload", held)
    await catalogue.remove("t1", "drained", drains=True)
    await asyncio.sleep(0.05)
    await catalogue.register("kept", site.source(5), "t2")
    await catalogue.pin(("t2", "kept"), pinned=True)
    is_in_use = False
    await asyncio.sleep(0.6)
    assert await pinned(engine) == ["kept"]
