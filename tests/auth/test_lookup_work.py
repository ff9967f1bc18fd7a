"""A bad key costs the same work whatever is wrong with it, so that time tells nothing of what is there."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock

from loraplex.auth.errors import InvalidApiKey
from loraplex.auth.keys import new_key
from loraplex.auth.tenants import Tenants


class Work:
    """What one look-up did: statements, HMACs, and what was compared with what."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.num_hmacs = 0
        self.compared: list[tuple[Any, Any]] = []


@pytest.fixture
def work(database: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work()
    new, compare = hmac.new, hmac.compare_digest

    def count_hmac(*arguments: Any) -> Any:
        found.num_hmacs += 1
        return new(*arguments)

    def see_comparison(one: Any, other: Any) -> bool:
        found.compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "new", count_hmac)
    monkeypatch.setattr(hmac, "compare_digest", see_comparison)
    event.listen(
        database.sync_engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: found.statements.append(statement),
    )
    return found


async def test_bad_keys_of_every_kind_cost_the_same(database: AsyncEngine, clock: Clock, work: Work) -> None:
    tenants = Tenants(database, b"pepper", clock)
    tenant = await tenants.create_tenant("acme")
    revoked = await tenants.create_key(tenant.id, "revoked")
    await tenants.revoke_key(tenant.id, revoked.id)
    expired = await tenants.create_key(tenant.id, "expired", expires_at=clock.now - 1)
    costs = set()
    for bad in (new_key("inference"), revoked.key, expired.key):
        work.statements.clear()
        work.num_hmacs = 0
        with pytest.raises(InvalidApiKey) as refused:
            await tenants.authenticate(bad)
        costs.add((tuple(work.statements), work.num_hmacs, str(refused.value)))
    assert len(costs) == 1


async def test_nothing_but_digests_and_checksums_is_compared_and_always_in_constant_time(
    database: AsyncEngine, clock: Clock, work: Work
) -> None:
    """No part of a stored key can be approached: what is stored is an HMAC, and it is looked up as a whole."""
    tenants = Tenants(database, b"pepper", clock)
    await tenants.bootstrap_admin("from the environment")
    key = await tenants.create_key((await tenants.create_tenant("acme")).id, "one")
    assert key.key is not None
    work.compared.clear()
    work.statements.clear()
    await tenants.authenticate(key.key)
    assert {len(one) for pair in work.compared for one in pair} == {6, 64}
    assert all(key.key[20:40] not in str(pair) for pair in work.compared)
    assert all("digest IN" in statement and "LIKE" not in statement for statement in work.statements)


async def test_many_who_come_together_with_one_key_are_looked_up_once(
    database: AsyncEngine, clock: Clock, work: Work
) -> None:
    tenants = Tenants(database, b"pepper", clock)
    key = (await tenants.create_key((await tenants.create_tenant("acme")).id, "one")).key
    work.statements.clear()
    callers = await asyncio.gather(*(tenants.authenticate(key) for _ in range(20)))
    assert len(work.statements) == 1
    assert len({caller.key_id for caller in callers}) == 1


async def test_one_of_them_leaves_and_the_others_are_looked_up_all_the_same(
    database: AsyncEngine, clock: Clock, work: Work
) -> None:
    tenants = Tenants(database, b"pepper", clock)
    key = (await tenants.create_key((await tenants.create_tenant("acme")).id, "one")).key
    first, second = (asyncio.create_task(tenants.authenticate(key)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).tenant_name == "acme"


async def test_key_revoked_while_it_is_looked_up_lets_no_later_request_in(
    database: AsyncEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up that read the row before is not shared by who comes after."""
    tenants = Tenants(database, b"pepper", clock)
    tenant = await tenants.create_tenant("acme")
    key = await tenants.create_key(tenant.id, "one")
    find, has_read, may_end = tenants._authenticator._find, asyncio.Event(), asyncio.Event()

    async def find_slowly(*arguments: Any) -> Any:
        found = await find(*arguments)
        has_read.set()
        await may_end.wait()
        return found

    monkeypatch.setattr(tenants._authenticator, "_find", find_slowly)
    early = asyncio.create_task(tenants.authenticate(key.key))
    await has_read.wait()
    await tenants.revoke_key(tenant.id, key.id)
    late = asyncio.create_task(tenants.authenticate(key.key))
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(InvalidApiKey):
        await late
    assert (await early).as_of < tenants.num_changes  # whoever opens a meter for it looks again
