"""Real services on this machine: a test that needs one skips with the reason, or fails where CI demands it."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

POSTGRES = "postgresql://postgres@127.0.0.1:5432/postgres"


def missing(service: str, reason: object) -> NoReturn:
    """Skip, or fail where LORAPLEX_REQUIRE_SERVICES is set."""
    message = f"{service} is not there: {reason}"
    if os.environ.get("LORAPLEX_REQUIRE_SERVICES"):
        pytest.fail(message)
    pytest.skip(message)


REDIS = "redis://127.0.0.1:6379/7"


async def own_redis() -> Redis:
    """A connection to a Redis that is there; whoever uses it names its keys by something of its own."""
    redis = Redis.from_url(REDIS, socket_timeout=5)
    try:
        await redis.ping()
    except (OSError, RedisError) as error:
        missing("Redis", error)
    return redis


@asynccontextmanager
async def own_postgres_database() -> AsyncIterator[str]:
    """The SQLAlchemy URL of an empty database that is dropped afterwards."""
    try:
        server = await asyncpg.connect(POSTGRES, timeout=5)
    except (OSError, asyncpg.PostgresError) as error:
        missing("PostgreSQL", error)
    name = f"loraplex_test_{secrets.token_hex(6)}"
    try:
        await server.execute(f"CREATE DATABASE {name}")
        yield f"postgresql+asyncpg://postgres@127.0.0.1:5432/{name}"
    finally:
        await server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await server.close()
