"""A database of each kind, of the test's own, and a clock set by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock
from support.limits import World
from support.services import own_postgres_database, own_redis

from loraplex.auth.store.database import open_database


@pytest_asyncio.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """An empty database of the test's own."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
        return
    async with own_postgres_database() as url:
        yield url


@pytest_asyncio.fixture
async def database(url: str) -> AsyncIterator[AsyncEngine]:
    engine = await open_database(url)
    yield engine
    await engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    redis = await own_redis() if request.param == "redis" else None
    world = World(request.param, redis)
    yield world
    for store in world.stores:
        await store.close()
    if redis is not None:
        keys = await redis.keys(f"loraplex:{{{world.tenant}}}*")
        if keys:
            await redis.delete(*keys)
        await redis.aclose()
