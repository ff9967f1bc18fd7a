"""Which peppers a database's keys and secrets are under."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock

from loraplex.auth.peppers import Peppers, fingerprints_in
from loraplex.auth.secrets import TenantSecrets
from loraplex.auth.store.tables import api_keys
from loraplex.auth.tenants import Tenants

OLD, NEW = Peppers(b"old").fingerprint, Peppers(b"new").fingerprint


def test_fingerprints_are_those_of_every_version() -> None:
    assert Peppers(b"old\nnew").fingerprints == {OLD, NEW}
    assert Peppers(b"old\nnew").fingerprint == NEW


async def test_fingerprints_in_tells_of_living_keys_and_of_secrets(database: AsyncEngine, clock: Clock) -> None:
    assert await fingerprints_in(database, clock.now) == set()
    tenants = Tenants(database, b"old", clock)
    tenant = (await tenants.create_tenant("acme")).id
    assert await fingerprints_in(database, clock.now) == set()
    key = await tenants.create_key(tenant, "one")
    assert await fingerprints_in(database, clock.now) == {OLD}
    await Tenants(database, b"old\nnew", clock).create_key(tenant, "two")
    assert await fingerprints_in(database, clock.now) == {OLD, NEW}
    await tenants.revoke_key(tenant, key.id)
    assert await fingerprints_in(database, clock.now) == {NEW}
    await TenantSecrets(database, b"old", clock).put(tenant, "hub_token", "x")
    assert await fingerprints_in(database, clock.now) == {OLD, NEW}


async def test_fingerprints_in_leaves_out_what_is_over_or_older_than_versions(
    database: AsyncEngine, clock: Clock
) -> None:
    tenants = Tenants(database, b"old", clock)
    tenant = (await tenants.create_tenant("acme")).id
    key = await tenants.create_key(tenant, "one")
    async with database.begin() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(expires_at=clock.now + 5))
    assert await fingerprints_in(database, clock.now) == {OLD}
    assert await fingerprints_in(database, clock.now + 5) == set()
    async with database.begin() as connection:
        await connection.execute(update(api_keys).values(expires_at=None, pepper=""))
    assert await fingerprints_in(database, clock.now) == set()
