"""What one gateway changes, the others on its database learn of."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.errors import InvalidApiKey, KeysUnavailable
from loraplex.auth.limits.policy import Limits
from loraplex.auth.store.changes import ACCESS, CATALOGUE, ChangeWatch, announce
from loraplex.auth.tenants import Tenants


async def test_watch_calls_back_once_for_each_look_that_finds_a_change(database: AsyncEngine) -> None:
    calls = 0

    async def count() -> None:
        nonlocal calls
        calls += 1

    watch = ChangeWatch(database, poll_seconds=3600)
    watch.on(ACCESS, count)
    await watch.__aenter__()
    await watch.look()
    assert calls == 0
    for _ in range(3):
        async with database.begin() as connection:
            await announce(connection, ACCESS)
    await watch.look()
    await watch.look()
    assert calls == 1
    await watch.__aexit__()


async def test_topic_that_rests_is_called_back_later_and_not_forgotten(database: AsyncEngine) -> None:
    calls = 0

    async def slow() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.3)  # the second look comes within four times as long

    watch = ChangeWatch(database, poll_seconds=3600)
    watch.on(CATALOGUE, slow, rests=True)
    await watch.__aenter__()
    for _ in range(2):
        async with database.begin() as connection:
            await announce(connection, CATALOGUE)
        await watch.look()
    assert calls == 1
    async with asyncio.timeout(30):
        while calls == 1:
            await watch.look()
            await asyncio.sleep(0.05)
    await watch.look()
    assert calls == 2
    await watch.__aexit__()


async def test_watch_change_rolled_back_is_none(database: AsyncEngine) -> None:
    watch = ChangeWatch(database, poll_seconds=3600)
    await watch.__aenter__()
    before = dict(watch._known)
    async with database.begin() as connection:
        await announce(connection, ACCESS)
        await connection.rollback()
    await watch.look()
    assert watch._known == before
    await watch.__aexit__()


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT", None, OSError("postgresql://u:hush@h")), KeysUnavailable()]
)
async def test_watch_database_away_is_told_once_and_looked_for_again(
    database: AsyncEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    watch = ChangeWatch(database, poll_seconds=0.001)
    looks, back = 0, asyncio.Event()

    async def fail() -> None:
        nonlocal looks
        looks += 1
        if looks <= 5:
            raise error
        back.set()

    monkeypatch.setattr(watch, "look", fail)
    await watch.__aenter__()
    await asyncio.wait_for(back.wait(), 20)
    await watch.__aexit__()
    assert len(caplog.records) == 1
    assert "hush" not in caplog.text


@pytest.mark.parametrize("how", ["revoke", "rotate", "delete tenant", "expire tenant"])
async def test_key_that_ends_in_one_process_is_refused_in_the_other_after_one_look(
    database: AsyncEngine, how: str
) -> None:
    """The other remembers the key's look-up; the clock stands still, so that nothing it remembers lapses."""
    here, there = (Tenants(database, b"pepper", lambda: 1000.0) for _ in range(2))
    watch = ChangeWatch(database, poll_seconds=3600)
    watch.on(ACCESS, there.forget)
    await watch.__aenter__()
    tenant = await here.create_tenant("acme")
    key = await here.create_key(tenant.id, "one")
    await watch.look()
    await there.authenticate(key.key)
    if how == "revoke":
        await here.revoke_key(tenant.id, key.id)
    elif how == "rotate":
        await here.rotate_key(tenant.id, key.id, overlap_seconds=0)
    elif how == "delete tenant":
        await here.delete_tenant(tenant.id)
    else:
        await here.set_tenant_limits(tenant.id, Limits(expires_at=999.0))
    await there.authenticate(key.key)  # it cannot know yet
    await watch.look()
    with pytest.raises(InvalidApiKey):
        await there.authenticate(key.key)
    await watch.__aexit__()


async def test_limits_changed_in_one_process_hold_in_the_other_after_one_look(database: AsyncEngine) -> None:
    here, there = (Tenants(database, b"pepper", lambda: 1000.0) for _ in range(2))
    watch = ChangeWatch(database, poll_seconds=3600)
    watch.on(ACCESS, there.forget)
    await watch.__aenter__()
    tenant = await here.create_tenant("acme")
    key = await here.create_key(tenant.id, "one")
    await there.authenticate(key.key)
    await here.set_tenant_limits(tenant.id, Limits(requests_per_minute=7))
    await here.set_key_limits(tenant.id, key.id, Limits(max_tokens=3))
    await watch.look()
    policy = (await there.authenticate(key.key)).policy
    assert (policy.tenant.requests_per_minute, policy.key.max_tokens) == (7, 3)
    await watch.__aexit__()
