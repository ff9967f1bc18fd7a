"""Secrets of tenants: encrypted where they lie, used by name, gone with their tenant."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock

from loraplex.auth.errors import SecretNotFound, SecretUnreadable, TenantNotFound
from loraplex.auth.secrets import SecretCard, TenantSecrets
from loraplex.auth.store.tables import tenant_secrets
from loraplex.auth.tenants import Tenants


async def stored(database: AsyncEngine) -> list[str]:
    async with database.connect() as connection:
        return list((await connection.execute(select(tenant_secrets.c.encrypted))).scalars())


async def test_secret_is_set_replaced_used_and_removed(database: AsyncEngine, clock: Clock) -> None:
    tenant = await Tenants(database, b"pepper", clock).create_tenant("acme")
    other = await Tenants(database, b"pepper", clock).create_tenant("other")
    secrets = TenantSecrets(database, b"pepper", clock)
    assert await secrets.reveal(tenant.id, "hub_token") is None
    await secrets.put(tenant.id, "hub_token", "hf_öne")
    clock.now += 5
    card = await secrets.put(tenant.id, "hub_token", "hf_two")
    assert card == SecretCard(name="hub_token", created_at=1000.0, updated_at=1005.0)
    assert await secrets.reveal(tenant.id, "hub_token") == "hf_two"
    assert await secrets.reveal(other.id, "hub_token") is None
    assert await secrets.list(tenant.id) == [card]
    assert await secrets.list(other.id) == []
    with pytest.raises(SecretNotFound):
        await secrets.remove(other.id, "hub_token")
    await secrets.remove(tenant.id, "hub_token")
    assert await secrets.reveal(tenant.id, "hub_token") is None


async def test_secret_is_encrypted_at_rest(database: AsyncEngine) -> None:
    tenant = await Tenants(database, b"pepper").create_tenant("acme")
    secrets = TenantSecrets(database, b"pepper")
    await secrets.put(tenant.id, "hub_token", "hf_very-secret")
    assert "very-secret" not in (await stored(database))[0]
    with pytest.raises(SecretUnreadable):
        await TenantSecrets(database, b"another").reveal(tenant.id, "hub_token")


async def test_secret_moves_to_the_newest_pepper_when_it_is_used(database: AsyncEngine) -> None:
    tenant = await Tenants(database, b"old").create_tenant("acme")
    await TenantSecrets(database, b"old").put(tenant.id, "hub_token", "hf_x")
    assert await TenantSecrets(database, b"old\nnew").reveal(tenant.id, "hub_token") == "hf_x"
    assert await TenantSecrets(database, b"new").reveal(tenant.id, "hub_token") == "hf_x"


async def test_secret_of_no_tenant_is_refused_and_a_deleted_ones_go_along(database: AsyncEngine) -> None:
    tenants, secrets = Tenants(database, b"pepper"), TenantSecrets(database, b"pepper")
    with pytest.raises(TenantNotFound):
        await secrets.put("tenant_0000000000000000", "hub_token", "x")
    tenant = await tenants.create_tenant("acme")
    await secrets.put(tenant.id, "hub_token", "x")
    await tenants.delete_tenant(tenant.id)
    assert await stored(database) == []


async def test_secret_set_by_many_at_once_is_one_of_theirs(database: AsyncEngine) -> None:
    tenant = await Tenants(database, b"pepper").create_tenant("acme")
    secrets = TenantSecrets(database, b"pepper")
    await asyncio.gather(*(secrets.put(tenant.id, "hub_token", f"v{number}") for number in range(8)))
    assert await secrets.reveal(tenant.id, "hub_token") in {f"v{number}" for number in range(8)}
    assert len(await secrets.list(tenant.id)) == 1
