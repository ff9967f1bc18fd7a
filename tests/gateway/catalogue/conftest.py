"""One catalogue over a shelf for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine
from support.gateway import BASE, settings_in
from support.shelf import Shelf

from loraplex.auth.store.database import open_database
from loraplex.auth.store.tables import tenants
from loraplex.engines.echo import EchoEngine
from loraplex.gateway.catalogue import Catalogue


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    async with engine.begin() as connection:
        for id, name in (("t1", "acme"), ("t2", "other")):
            await connection.execute(insert(tenants).values(id=id, name=name, created_at=0.0))
    yield engine
    await engine.dispose()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def catalogue(database: AsyncEngine, shelf: Shelf, tmp_path: Path) -> Catalogue:
    return Catalogue(database, shelf, EchoEngine(settings_in(tmp_path)), BASE)
