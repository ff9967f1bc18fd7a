"""Keys of operators: made, used, revoked, and never the last of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock

from loraplex.auth.errors import InvalidApiKey, KeyNotFound, LastAdminKey
from loraplex.auth.store.database import downgrade, upgrade
from loraplex.auth.tenants import Tenants


@pytest.fixture
def tenants(database: AsyncEngine, clock: Clock) -> Tenants:
    return Tenants(database, b"pepper", clock)


async def test_admin_key_made_by_an_admin_works_until_it_is_revoked(tenants: Tenants, clock: Clock) -> None:
    first = await tenants.bootstrap_admin(None)
    clock.now += 1
    made = await tenants.admins.create("second")
    caller = await tenants.authenticate(made.key)
    assert (caller.key_id, caller.role, caller.tenant_id) == (made.id, "admin", "")
    shown = await tenants.admins.list()
    assert [(key.name, key.key) for key in shown] == [("first", None), ("second", None)]
    assert made.key is not None
    assert made.key.split("-")[3][-4:] == shown[1].last_four
    await tenants.admins.revoke(made.id)
    await tenants.admins.revoke(made.id)
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(made.key)
    assert (await tenants.authenticate(first)).role == "admin"
    assert (await tenants.admins.list())[1].revoked_at == 1001.0


@pytest.mark.parametrize("key_id", ["admin", "admin_0000000000000000", "\0", "key_0000000000000000", ""])
async def test_admin_key_unknown_is_not_found(tenants: Tenants, key_id: str) -> None:
    await tenants.bootstrap_admin(None)
    with pytest.raises(KeyNotFound):
        await tenants.admins.revoke(key_id)


async def test_last_admin_key_stays_unless_the_environment_brings_one(tenants: Tenants) -> None:
    first = await tenants.bootstrap_admin(None)
    only = (await tenants.admins.list())[0]
    with pytest.raises(LastAdminKey):
        await tenants.admins.revoke(only.id)
    assert (await tenants.authenticate(first)).key_id == only.id
    await tenants.bootstrap_admin("from the environment")
    await tenants.admins.revoke(only.id)
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(first)


async def test_two_revocations_at_once_leave_one_key(tenants: Tenants) -> None:
    await tenants.bootstrap_admin(None)
    await tenants.admins.create("second")
    ids = [key.id for key in await tenants.admins.list()]
    ends = await asyncio.gather(*(tenants.admins.revoke(key_id) for key_id in ids), return_exceptions=True)
    assert [type(end) for end in ends if end is not None] == [LastAdminKey]
    assert len([key for key in await tenants.admins.list() if key.revoked_at is None]) == 1


async def test_gateways_that_start_together_make_one_first_key(database: AsyncEngine, clock: Clock) -> None:
    gateways = [Tenants(database, b"pepper", clock) for _ in range(4)]
    made = await asyncio.gather(*(gateway.bootstrap_admin(None) for gateway in gateways))
    assert len([key for key in made if key is not None]) == 1
    assert len(await gateways[0].admins.list()) == 1


async def test_migration_keeps_admin_keys_of_the_revision_before(database: AsyncEngine, clock: Clock) -> None:
    tenants = Tenants(database, b"pepper", clock)
    key = await tenants.bootstrap_admin(None)
    revoked = await tenants.admins.create("gone")
    await tenants.admins.revoke(revoked.id)

    async def columns() -> set[str]:
        async with database.connect() as connection:
            return set((await connection.execute(text("SELECT * FROM admin_keys"))).keys())

    async def migrate(step: Any) -> None:
        async with database.begin() as connection:
            await connection.run_sync(step)

    await migrate(lambda sync: downgrade(sync, "0003"))
    assert await columns() == {"digest", "last_four", "created_at"}
    await migrate(upgrade)
    again = Tenants(database, b"pepper", clock)
    assert (await again.authenticate(key)).role == "admin"
    with pytest.raises(InvalidApiKey):
        await again.authenticate(revoked.key)


async def test_living_tells_the_dead_from_the_living(tenants: Tenants) -> None:
    await tenants.bootstrap_admin(None)
    admin = (await tenants.admins.list())[0].id
    tenant, gone = await tenants.create_tenant("acme"), await tenants.create_tenant("gone")
    living = await tenants.create_key(tenant.id, "living")
    revoked = await tenants.create_key(tenant.id, "revoked")
    orphan = await tenants.create_key(gone.id, "orphan")
    await tenants.revoke_key(tenant.id, revoked.id)
    await tenants.delete_tenant(gone.id)
    asked = {living.id, revoked.id, orphan.id, admin, "admin", *(f"key_{number:016x}" for number in range(1200))}
    assert await tenants.living_keys(asked) == {living.id, admin, "admin"}
