"""A bad key costs the same work whatever is wrong with it, so that time tells nothing of what is there."""

from __future__ import annotations

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
