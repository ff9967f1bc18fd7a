"""The catalogue's tables, as several gateways write them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import insert
from support.gateway import settings_in
from support.services import own_postgres_database

from loraplex.auth.store.database import open_database
from loraplex.auth.store.tables import adapters
from loraplex.gateway.adapter_records import AdapterRecords, Key, Target


async def test_gateways_on_postgresql_that_note_the_same_uses_do_not_wait_for_each_other_in_a_circle() -> None:
    keys = [("", f"a{number}") for number in range(200)]
    async with own_postgres_database() as url:
        databases = [await open_database(url) for _ in range(2)]
        async with databases[0].begin() as connection:
            rows = [{"tenant_id": tenant, "name": name, "created_at": 0.0} for tenant, name in keys]
            await connection.execute(insert(adapters), rows)
        try:
            first, second = (AdapterRecords(database) for database in databases)
            for when in range(3):
                forth: dict[Key, float] = dict.fromkeys(keys, 2.0 * when)
                back: dict[Key, float] = dict.fromkeys(reversed(keys), 2.0 * when + 1)
                await asyncio.gather(first.used(forth), second.used(back))
        finally:
            for database in databases:
                await database.dispose()


async def test_earlier_use_that_is_noted_late_replaces_no_later_one(tmp_path: Path) -> None:
    database = await open_database(settings_in(tmp_path).database.url)
    records, key = AdapterRecords(database), ("", "one")
    await records.add(key, targets=(Target("two", 1.0),))
    for when, last in ((5.0, 5.0), (3.0, 5.0), (7.0, 7.0)):
        await records.used({key: when})
        entry = await records.one(key)
        assert entry is not None
        assert entry.last_used_at == last
    await database.dispose()
