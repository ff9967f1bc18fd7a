"""Limits to be held over either store, with time and books set by hand."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis.asyncio import ConnectionPool

from loraplex.auth.caller import Caller
from loraplex.auth.errors import LimitReached
from loraplex.auth.limits.admission import Admission, Reservation
from loraplex.auth.limits.memory import MemoryStore
from loraplex.auth.limits.policy import NO_LIMITS, Limits, Policy
from loraplex.auth.limits.shared import RedisStore
from loraplex.auth.limits.stores import Store
from loraplex.auth.metering import Demand, NoBooks

NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC


class Clock:
    """Set by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


class Books(NoBooks):
    """Says what it is told to say was spent."""

    def __init__(self) -> None:
        self.tokens = 0

    async def spent(self, tenant_id: str, key_id: str | None, since: float) -> int:
        return self.tokens


class World:
    """A clock, books, and as many gateways' stores as a test wants; all count together only on Redis."""

    def __init__(self, kind: str, redis: Any) -> None:
        self.kind = kind
        self.clock = Clock()
        self.books = Books()
        self.stores: list[Store] = []
        self._redis = redis
        self.tenant = f"tenant_{secrets.token_hex(8)}"

    def admission(self, fallback: Callable[[], Store] | None = None) -> Admission:
        if self.kind == "memory":
            store: Store = MemoryStore(self.books, self.clock)
        else:
            store = RedisStore(self._redis, self.books, clock=self.clock)
        self.stores.append(store)
        return Admission(store, fallback)

    def shared(self) -> RedisStore:
        """The first gateway's store."""
        store = self.stores[0]
        assert isinstance(store, RedisStore)
        return store

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Nothing listens where Redis was, then it is back with all that it knew."""
        there = self._redis.connection_pool
        self._redis.connection_pool = ConnectionPool.from_url("redis://127.0.0.1:1/0")
        try:
            yield
        finally:
            self._redis.connection_pool = there
            for store in self.stores:
                store._away_until = 0.0  # type: ignore[attr-defined]

    async def calm(self) -> None:
        """Wait until Redis knows all that was settled, and nothing is leased in advance."""
        for store in self.stores:
            if isinstance(store, RedisStore):
                await store._flush(-1.0)
                await store._flush(-1.0)

    def caller(self, tenant: Limits = NO_LIMITS, key: Limits = NO_LIMITS, key_id: str = "key_1") -> Caller:
        policy = Policy(tenant=tenant, key=key)
        return Caller(tenant_id=self.tenant, tenant_name="t", key_id=key_id, role="inference", policy=policy)


only_redis = pytest.mark.parametrize("world", ["redis"], indirect=True)


def demand(prompt: int = 1, answer: int = 1, is_open_ended: bool = False) -> Demand:
    return Demand(
        request_id=secrets.token_hex(8),
        trace_id="-",
        route="/",
        model="m",
        adapter_id="",
        num_prompt_tokens=prompt,
        max_completion_tokens=answer,
        is_open_ended=is_open_ended,
    )


async def admitted(admission: Admission, caller: Caller, wanted: Demand, most: int = 1000) -> list[Reservation]:
    """As many as there is room for."""
    found = []
    for _ in range(most):
        try:
            found.append(await admission.reserve(caller, wanted))
        except LimitReached:
            return found
    raise AssertionError(f"{most} were admitted")
