"""Tenants and keys on their database, SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from support.clock import Clock

from loraplex.auth.authentication import REMEMBERED_SECONDS
from loraplex.auth.errors import InvalidApiKey, KeyNotFound, NameTaken, TenantNotFound
from loraplex.auth.keys import new_key
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.store.database import downgrade, open_database, upgrade
from loraplex.auth.store.tables import metadata
from loraplex.auth.tenants import Tenants


@pytest.fixture
def tenants(database: AsyncEngine, clock: Clock) -> Tenants:
    return Tenants(database, b"pepper", clock)


async def test_key_authenticates_its_tenant(tenants: Tenants) -> None:
    tenant = await tenants.create_tenant("acme")
    key = await tenants.create_key(tenant.id, "one")
    caller = await tenants.authenticate(key.key)
    assert (caller.tenant_id, caller.tenant_name, caller.key_id, caller.role) == (
        tenant.id,
        "acme",
        key.id,
        "inference",
    )
    assert [(listed.id, listed.key) for listed in await tenants.list_keys(tenant.id)] == [(key.id, None)]
    assert [listed.name for listed in await tenants.list_tenants()] == ["acme"]


async def test_key_under_another_pepper_is_refused(database: AsyncEngine, tenants: Tenants, clock: Clock) -> None:
    key = await tenants.create_key((await tenants.create_tenant("acme")).id, "one")
    with pytest.raises(InvalidApiKey):
        await Tenants(database, b"other", clock).authenticate(key.key)


async def test_key_expired_is_refused(tenants: Tenants, clock: Clock) -> None:
    key = await tenants.create_key((await tenants.create_tenant("acme")).id, "one", expires_at=1010.0)
    await tenants.authenticate(key.key)
    clock.now = 1010.0
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key.key)


async def test_remembered_keys_are_bounded(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.auth.authentication._MAX_REMEMBERED", 8)
    key = await tenants.create_key((await tenants.create_tenant("acme")).id, "one")
    for _ in range(20):
        with pytest.raises(InvalidApiKey):
            await tenants.authenticate(new_key("inference"))
        assert len(tenants._authenticator._remembered) <= 8
    assert (await tenants.authenticate(key.key)).key_id == key.id


async def test_key_mistyped_costs_no_look_up(tenants: Tenants) -> None:
    key = new_key("inference")
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key[:-1] + ("x" if key[-1] != "x" else "y"))
    assert tenants._authenticator._remembered == {}


async def test_key_revoked_while_it_is_looked_up_is_not_remembered(
    database: AsyncEngine, tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up reads its row, then waits; the revocation comes in between."""
    tenant = await tenants.create_tenant("acme")
    key = await tenants.create_key(tenant.id, "one")
    read, revoked = asyncio.Event(), asyncio.Event()
    execute = AsyncConnection.execute

    async def slow_execute(self: AsyncConnection, *arguments: Any) -> Any:
        result = await execute(self, *arguments)
        if "digest" in str(arguments[0]) and not read.is_set():
            read.set()
            await revoked.wait()
        return result

    monkeypatch.setattr(AsyncConnection, "execute", slow_execute)
    looking = asyncio.create_task(tenants.authenticate(key.key))
    await read.wait()
    revoking = asyncio.create_task(tenants.revoke_key(tenant.id, key.id))
    await revoking
    revoked.set()
    await looking  # it came first
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key.key)


async def test_create_key_for_a_tenant_deleted_meanwhile_raises(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await tenants.create_tenant("acme")

    async def say_it_is_there(tenant_id: str) -> Any:
        await tenants.delete_tenant(tenant_id)
        return tenant

    monkeypatch.setattr(tenants, "get_tenant", say_it_is_there)
    with pytest.raises(TenantNotFound):
        await tenants.create_key(tenant.id, "late")


async def test_key_revoked_is_refused_here_at_once_and_elsewhere_soon(
    database: AsyncEngine, tenants: Tenants, clock: Clock
) -> None:
    elsewhere = Tenants(database, b"pepper", clock)
    tenant = await tenants.create_tenant("acme")
    key = await tenants.create_key(tenant.id, "one")
    await tenants.authenticate(key.key)
    await elsewhere.authenticate(key.key)
    await tenants.revoke_key(tenant.id, key.id)
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key.key)
    clock.now += REMEMBERED_SECONDS
    with pytest.raises(InvalidApiKey):
        await elsewhere.authenticate(key.key)
    assert (await tenants.list_keys(tenant.id))[0].revoked_at == 1000.0


async def test_tenant_deleted_takes_its_keys_along(tenants: Tenants) -> None:
    tenant = await tenants.create_tenant("acme")
    key = await tenants.create_key(tenant.id, "one")
    await tenants.authenticate(key.key)
    await tenants.delete_tenant(tenant.id)
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key.key)


async def test_names_and_ids_that_do_not_fit_raise(tenants: Tenants) -> None:
    tenant = await tenants.create_tenant("acme")
    with pytest.raises(NameTaken):
        await tenants.create_tenant("acme")
    for call in (tenants.get_tenant, tenants.delete_tenant, tenants.list_keys):
        with pytest.raises(TenantNotFound):
            await call("tenant_none")
    with pytest.raises(TenantNotFound):
        await tenants.create_key("tenant_none", "x")
    other = await tenants.create_tenant("other")
    key = await tenants.create_key(tenant.id, "one")
    with pytest.raises(KeyNotFound):
        await tenants.revoke_key(other.id, key.id)
    await tenants.authenticate(key.key)


async def test_admin_key_is_made_once_and_remembered(database: AsyncEngine, tenants: Tenants, clock: Clock) -> None:
    made = await tenants.bootstrap_admin(None)
    assert (await tenants.authenticate(made)).role == "admin"
    again = Tenants(database, b"pepper", clock)
    assert await again.bootstrap_admin(None) is None
    assert (await again.authenticate(made)).role == "admin"
    given = Tenants(database, b"pepper", clock)
    assert await given.bootstrap_admin("chosen") is None
    assert (await given.authenticate("chosen")).role == "admin"
    assert (await given.authenticate(made)).role == "admin"  # until it is revoked
    with pytest.raises(InvalidApiKey):
        await again.authenticate("chosen")


async def test_migrations_make_what_the_tables_say_and_can_be_undone(database: AsyncEngine) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.begin() as connection:
        assert await connection.run_sync(differences) == []
        await connection.run_sync(lambda sync: downgrade(sync, "base"))
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["alembic_version"]
        await connection.run_sync(upgrade)
        assert await connection.run_sync(differences) == []


async def test_processes_that_start_together_all_open_the_database(url: str) -> None:
    code = (
        "import asyncio, sys\n"
        "from loraplex.auth.store.database import open_database\n"
        "async def main():\n"
        "    await (await open_database(sys.argv[1])).dispose()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", code, url, stderr=asyncio.subprocess.PIPE)
        for _ in range(4)
    ]
    ends = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends


async def test_open_database_again_keeps_what_is_there(url: str) -> None:
    for expected in ([], ["acme"]):
        engine = await open_database(url)
        tenants = Tenants(engine, b"pepper")
        assert [tenant.name for tenant in await tenants.list_tenants()] == expected
        if not expected:
            await tenants.create_tenant("acme")
        await engine.dispose()


async def test_open_database_makes_the_directory_of_its_file(tmp_path: Path) -> None:
    engine = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'deep' / 'down' / 'test.db'}")
    await engine.dispose()
    assert (tmp_path / "deep" / "down" / "test.db").is_file()


async def test_limits_reach_the_caller_at_once_and_inherit(database: AsyncEngine, clock: Clock) -> None:
    tenants = Tenants(database, b"pepper", clock, Limits(requests_per_minute=60, max_tokens=9))
    tenant = await tenants.create_tenant("acme", Limits(requests_per_minute=5))
    key = await tenants.create_key(tenant.id, "one", limits=Limits(max_tokens=3))
    caller = await tenants.authenticate(key.key)
    assert caller.policy.tenant == Limits(requests_per_minute=5, max_tokens=9)
    assert caller.policy.max_tokens == 3
    await tenants.set_tenant_limits(tenant.id, Limits(allowed_models=("a*",)))
    await tenants.set_key_limits(tenant.id, key.id, Limits(priority=2))
    changed = (await tenants.authenticate(key.key)).policy
    assert changed.tenant == Limits(requests_per_minute=60, max_tokens=9, allowed_models=("a*",))
    assert (changed.key, (await tenants.get_key(tenant.id, key.id)).limits) == (Limits(priority=2), Limits(priority=2))


async def test_tenant_expired_takes_its_keys_along(tenants: Tenants, clock: Clock) -> None:
    tenant = await tenants.create_tenant("acme", Limits(expires_at=1000.5))
    key = await tenants.create_key(tenant.id, "one")
    await tenants.authenticate(key.key)
    clock.now = 1000.6  # sooner than a look-up is forgotten
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(key.key)


async def test_key_rotated_has_two_secrets_for_a_while(tenants: Tenants, clock: Clock) -> None:
    tenant = await tenants.create_tenant("acme")
    first = await tenants.create_key(tenant.id, "one", role="tenant-admin")
    second = await tenants.rotate_key(tenant.id, first.id, overlap_seconds=0.5)
    assert second.id == first.id
    for secret in (first.key, second.key):
        caller = await tenants.authenticate(secret)
        assert (caller.key_id, caller.role) == (first.id, "tenant-admin")
    clock.now += 0.5
    await tenants.authenticate(second.key)
    with pytest.raises(InvalidApiKey):
        await tenants.authenticate(first.key)
    third = await tenants.rotate_key(tenant.id, first.id, overlap_seconds=100)
    await tenants.revoke_key(tenant.id, first.id)
    for secret in (second.key, third.key):
        with pytest.raises(InvalidApiKey):
            await tenants.authenticate(secret)
    with pytest.raises(KeyNotFound):
        await tenants.rotate_key(tenant.id, first.id, overlap_seconds=1)


async def test_key_moves_to_the_newest_pepper_when_it_is_used(database: AsyncEngine, clock: Clock) -> None:
    old = Tenants(database, b"old", clock)
    tenant = await old.create_tenant("acme")
    used, unused = [await old.create_key(tenant.id, name) for name in ("used", "unused")]
    both = Tenants(database, b"old\nnew", clock)
    assert (await both.authenticate(used.key)).key_id == used.id
    assert (await both.authenticate(used.key)).key_id == used.id
    new = Tenants(database, b"new", clock)
    assert (await new.authenticate(used.key)).key_id == used.id
    with pytest.raises(InvalidApiKey):
        await new.authenticate(unused.key)


async def test_admin_key_moves_to_the_newest_pepper_when_it_is_used(database: AsyncEngine, clock: Clock) -> None:
    old = Tenants(database, b"old", clock)
    used = await old.bootstrap_admin(None)
    unused, revoked = [await old.admins.create(name) for name in ("unused", "revoked")]
    await old.admins.revoke(revoked.id)
    both = Tenants(database, b"old\nnew", clock)
    assert (await both.authenticate(used)).role == "admin"
    with pytest.raises(InvalidApiKey):
        await both.authenticate(revoked.key)
    new = Tenants(database, b"new", clock)
    assert (await new.authenticate(used)).role == "admin"
    for key in (unused.key, revoked.key):
        with pytest.raises(InvalidApiKey):
            await new.authenticate(key)


async def test_keys_under_an_older_pepper_are_good_while_the_database_takes_no_writes(
    database: AsyncEngine, url: str, clock: Clock
) -> None:
    old = Tenants(database, b"old", clock)
    admin = await old.bootstrap_admin(None)
    key = await old.create_key((await old.create_tenant("acme")).id, "one")
    if database.dialect.name == "sqlite":
        reading = create_async_engine(url.replace(":///", ":///file:") + "?mode=ro&uri=true")
    else:
        settings = {"server_settings": {"default_transaction_read_only": "on"}}
        reading = create_async_engine(url, connect_args=settings)
    both = Tenants(reading, b"old\nnew", clock)
    assert (await both.authenticate(admin)).role == "admin"
    assert (await both.authenticate(key.key)).key_id == key.id
    await reading.dispose()
    assert (await old.authenticate(admin)).role == "admin"  # nothing has moved


async def test_migration_keeps_tenants_and_keys_of_the_revision_before(database: AsyncEngine, clock: Clock) -> None:
    tenants = Tenants(database, b"pepper", clock)
    tenant = await tenants.create_tenant("acme", Limits(max_tokens=1))
    key = await tenants.create_key(tenant.id, "one")
    async with database.begin() as connection:
        await connection.run_sync(lambda sync: downgrade(sync, "0001"))
        await connection.run_sync(upgrade)
    again = Tenants(database, b"pepper", clock)
    caller = await again.authenticate(key.key)
    assert (caller.key_id, caller.role, caller.policy) == (key.id, "inference", Policy())
