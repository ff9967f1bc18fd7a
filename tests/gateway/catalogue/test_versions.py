"""Versions of an adapter: addressed, changed, rolled back; what other gateways and a start make of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine
from support.gateway import BASE, settings_in, write_adapter
from support.shelf import ACME, Shelf, once_ready

from loraplex.auth.store.changes import CATALOGUE, ChangeWatch
from loraplex.auth.store.tables import adapter_versions, adapters
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import (
    AdapterInUse,
    AdapterNotFound,
)
from loraplex.gateway.adapter_records import Target
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import (
    AdapterFailed,
    AdapterNameTaken,
    AdapterNotReady,
    MalformedRequest,
    ModelNotFound,
)


async def test_version_is_addressed_by_number_and_by_hash(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    source = str(write_adapter(tmp_path / "a"))
    first, second = "a1" * 32, "a1a1b2b2" * 8
    shelf.version = first
    await catalogue.register("one", source)
    shelf.version = second
    await catalogue.update(("", "one"), source)
    for model, content in (
        ("one", second),
        ("one@1", first),
        ("one@2", second),
        (f"one@{first}", first),
        ("one@a1a1a1a1", first),
        ("one@a1a1b2b2", second),
    ):
        adapter = (await catalogue.route(model, ACME)).adapter
        assert adapter is not None
        assert (model, adapter.id) == (model, content)
    for model in ("one@", "one@0", "one@3", "one@a1a1a1a", "one@ffffffff", "one@1@1", "one@latest", f"{BASE}@1"):
        with pytest.raises(ModelNotFound):
            await catalogue.route(model, ACME)


async def test_rollback_is_one_call_and_goes_both_ways(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    source, key = str(write_adapter(tmp_path / "a")), ("", "one")
    await catalogue.register("one", source)
    for version in ("v2", "v3"):
        shelf.version = version
        await catalogue.update(key, source)

    async def served() -> str:
        adapter = (await catalogue.route("one", ACME)).adapter
        return adapter.id if adapter else ""

    assert await served() == "v3"
    await catalogue.roll_back(key)
    assert await served() == "v2"
    await catalogue.roll_back(key)
    assert await served() == "v1"
    with pytest.raises(MalformedRequest):
        await catalogue.roll_back(key)
    await catalogue.roll_back(key, "3")
    assert await served() == "v3"


async def test_update_that_fails_changes_nothing(catalogue: Catalogue, tmp_path: Path) -> None:
    await catalogue.register("one", str(write_adapter(tmp_path / "a")))
    before = catalogue.get("", "one")
    with pytest.raises(AdapterNotFound):
        await catalogue.update(("", "one"), str(tmp_path / "nothing"))
    assert catalogue.get("", "one") == before


async def test_update_that_arrives_late_does_not_overtake_a_later_one(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path
) -> None:
    source, key = str(write_adapter(tmp_path / "a")), ("", "one")
    await catalogue.register("one", source)
    shelf.gate.clear()
    shelf.version = "v2"
    await catalogue.update(key, source, waits=False)
    late, shelf.gate = shelf.gate, asyncio.Event()
    shelf.gate.set()
    await asyncio.sleep(0)
    shelf.version = "v3"
    await catalogue.update(key, source)
    shelf.version = "v2"
    late.set()
    async with asyncio.timeout(10):
        while (version := catalogue.get(*key).version(2)) is None or version.state != "ready":
            await asyncio.sleep(0.01)
    assert catalogue.get(*key).current_version == 3


@pytest.mark.parametrize("first_is_good", [True, False])
async def test_arrival_for_a_name_registered_anew_meanwhile_changes_nothing(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path, first_is_good: bool
) -> None:
    """Both are version 1 of the name."""
    first, second = tmp_path / "a", write_adapter(tmp_path / "b")
    if first_is_good:
        write_adapter(first)
    late = shelf.gate = asyncio.Event()
    await catalogue.register("one", str(first), waits=False)
    while not shelf.num_fetches:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    await catalogue.remove("", "one", drains=True)
    shelf.gate = asyncio.Event()
    shelf.gate.set()
    before = await catalogue.register("one", str(second))
    late.set()
    await asyncio.sleep(0.2)
    await catalogue.reload()
    assert catalogue.get("", "one") == before
    assert before.source == str(second)
    assert (await catalogue.route("one", ACME)).adapter is not None


async def test_registration_that_waits_for_nothing_tells_its_state(
    catalogue: Catalogue, shelf: Shelf, tmp_path: Path
) -> None:
    shelf.gate.clear()
    await catalogue.register("one", str(write_adapter(tmp_path / "a")), waits=False)
    with pytest.raises(AdapterNotReady):
        await catalogue.route("one", ACME)
    assert catalogue.visible(ACME) == []
    shelf.gate.set()
    assert (await once_ready(catalogue, "one")).adapter is not None


async def test_failure_explains_itself_and_can_be_retried(catalogue: Catalogue, tmp_path: Path) -> None:
    await catalogue.register("one", str(tmp_path / "a"), waits=False)
    with pytest.raises(AdapterFailed, match="there is no such directory"):
        await once_ready(catalogue, "one")
    assert (entry := catalogue.get("", "one")).shown.state == "failed"
    assert entry.shown.reason == "there is no such directory"
    write_adapter(tmp_path / "a")
    await catalogue.retry(("", "one"))
    assert (await once_ready(catalogue, "one")).adapter is not None
    with pytest.raises(MalformedRequest):
        await catalogue.retry(("", "one"))


async def test_start_takes_up_what_a_stopped_process_left(
    catalogue: Catalogue, shelf: Shelf, database: AsyncEngine, tmp_path: Path
) -> None:
    shelf.gate.clear()
    await catalogue.register("one", str(write_adapter(tmp_path / "a")), waits=False)
    while not shelf.num_fetches:
        await asyncio.sleep(0.01)
    await catalogue.__aexit__()
    shelf.gate.set()
    async with Catalogue(database, shelf, EchoEngine(settings_in(tmp_path)), BASE) as later:
        assert (await once_ready(later, "one")).adapter is not None


async def test_change_by_another_gateway_is_seen(
    catalogue: Catalogue, shelf: Shelf, database: AsyncEngine, tmp_path: Path
) -> None:
    other = Catalogue(database, shelf, EchoEngine(settings_in(tmp_path)), BASE)
    async with other, ChangeWatch(database) as watch:
        watch.on(CATALOGUE, other.reload)
        await catalogue.register("one", str(write_adapter(tmp_path / "a")))
        await watch.look()
        assert [entry.name for entry in other.visible(ACME)] == ["one"]
        await catalogue.remove("", "one")
        await watch.look()
        assert other.visible(ACME) == []


async def test_route_shares_users_by_weight_and_keeps_each(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shelf.version = name
        await catalogue.register(name, str(write_adapter(tmp_path / name)))
    await catalogue.add_route("ab", (Target("a", 90), Target("b@1", 10)))
    users = [f"user-{number}" for number in range(1000)]

    async def shares(weights: tuple[float, float]) -> list[str]:
        await catalogue.change_route(("", "ab"), (Target("a", weights[0]), Target("b@1", weights[1])))
        routes = [await catalogue.route("ab", ACME, user=user) for user in users]
        return [route.adapter.name for route in routes if route.adapter]

    first = await shares((90, 10))
    assert await shares((90, 10)) == first
    assert 60 < first.count("b") < 140  # of 1000; the standard deviation is 9.5
    more = await shares((50, 50))
    assert all(after == "b" for before, after in zip(first, more, strict=True) if before == "b")
    anonymous = [(await catalogue.route("ab", ACME)).adapter for _ in range(200)]
    assert {adapter.name for adapter in anonymous if adapter} == {"a", "b"}


async def test_route_is_a_name_like_others(catalogue: Catalogue, shelf: Shelf, tmp_path: Path) -> None:
    await catalogue.register("a", str(write_adapter(tmp_path / "a")))
    shelf.version = "v2"
    await catalogue.register("private", str(write_adapter(tmp_path / "b")), "t2")
    await catalogue.add_route("to-a", (Target("a", 1),))
    assert [entry.name for entry in catalogue.visible(ACME)] == ["a", "to-a"]
    with pytest.raises(AdapterNameTaken):
        await catalogue.register("to-a", str(tmp_path / "a"))
    for target, reason in (
        ("private", "no adapter"),
        ("nothing", "no adapter"),
        ("a@9", "no adapter"),
        ("to-a", "route"),
    ):
        with pytest.raises(MalformedRequest, match=reason):
            await catalogue.add_route("another", (Target("a", 1), Target(target, 1)), "t1")
    with pytest.raises(AdapterInUse, match="to-a"):
        await catalogue.remove("", "a")
    with pytest.raises(ModelNotFound):
        await catalogue.route("to-a@1", ACME)
    await catalogue.remove("", "to-a")
    await catalogue.remove("", "a")


async def test_preload_warms_what_is_there_at_the_start_and_tells_of_what_is_not(
    database: AsyncEngine,
    shelf: Shelf,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex.gateway.upkeep._ROUND_SECONDS", 0.02)
    source = str(write_adapter(tmp_path / "a"))
    await Catalogue(database, shelf, EchoEngine(settings_in(tmp_path)), BASE).register("warm", source)
    shelf.version = "v2"
    shelf.gate.clear()
    engine = EchoEngine(settings_in(tmp_path))
    names = ("warm", "late", "absent")
    async with Catalogue(database, shelf, engine, BASE, preload=names) as catalogue:
        await catalogue.register("late", str(write_adapter(tmp_path / "b")), waits=False)
        await engine.start(lambda progress: None)
        async with asyncio.timeout(30):
            while "absent" not in caplog.text:
                await asyncio.sleep(0.02)
        assert [one.name for one in await engine.residency()] == ["warm"]
        shelf.gate.set()
        async with asyncio.timeout(30):
            while [one.name for one in await engine.residency()] != ["warm", "late"]:
                await asyncio.sleep(0.02)
    assert "adapters.preload: absent: There is no adapter 'absent'." in caplog.text


async def test_long_table_is_read_in_turns_with_other_tasks(database: AsyncEngine, catalogue: Catalogue) -> None:
    row = {"tenant_id": "", "wanted_version": 1}
    rows = [{**row, "name": f"a{number}", "created_at": float(number)} for number in range(500)]
    async with database.begin() as connection:
        await connection.execute(insert(adapters), rows)
        one = {"number": 1, "source": "s", "state": "registered", "created_at": 0.0, "tenant_id": ""}
        await connection.execute(insert(adapter_versions), [{**one, "name": row["name"]} for row in rows])
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    converted: list[int] = []
    convert = msgspec.convert

    def noted(*given: Any) -> Any:
        converted.append(turns)
        return convert(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msgspec, "convert", noted)
        task = asyncio.create_task(neighbour())
        await catalogue.reload()
        task.cancel()
    assert len(catalogue.everything()) == 500
    assert max(converted.count(turn) for turn in set(converted)) <= 200, "the loop stood still for as many rows"
