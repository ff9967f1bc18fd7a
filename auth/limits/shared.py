"""Limits that many gateways hold together, counted in Redis.

A process leases a little more than it needs, at most 1/400 of a limit and 1/16 of what is left, and takes from that
without a call; what it does not need it gives back within half a second. Redis grants a lease over all limits of a
request at one stroke, or nothing, by its own clock. What a process holds of budgets and slots lapses when it has not
been heard of for `hold_seconds`, so a killed gateway blocks nothing for longer. Budgets begin with what the books say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from loraplex.auth.errors import LimitReached, LimitsUnavailable
from loraplex.auth.limits.charges import RATE_SECONDS, Charge, Standing, budgets, refusal
from loraplex.auth.limits.pools import Outgoing, Pool
from loraplex.auth.limits.scripts import CORRECT, LEASE, RENEW, SEED, SETTLE
from loraplex.auth.metering import Books

_log = logging.getLogger("loraplex.limits")

_IDLE_SECONDS = 0.5  # after this an unused lease goes back
_TICK_SECONDS = 0.2
_AWAY_SECONDS = 1.0  # how long a Redis that failed is not asked again
_SLOT_SECONDS = 0.05  # how long a slot that another process is giving back may be on its way


class RedisStore:
    """Implements `Store`. `clock` replaces Redis's own, in tests."""

    def __init__(
        self, redis: Redis, books: Books, *, hold_seconds: float = 10.0, clock: Callable[[], float] | None = None
    ) -> None:
        self._redis = redis
        self._books = books
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._process = secrets.token_hex(8)
        self._pools: dict[str, Pool] = {}
        self._offset = 0.0  # Redis's clock minus ours
        self._away_until = 0.0
        self._is_away = False
        self._news = asyncio.Event()
        self._renewing = asyncio.Lock()
        self._lease, self._settle, self._renew, self._seed, self._correct = (
            redis.register_script(script) for script in (LEASE, SETTLE, RENEW, SEED, CORRECT)
        )
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        return self._is_away

    def now(self) -> float:
        return self._clock() if self._clock else time.time() + self._offset

    async def take(self, wanted: list[Charge], *, may_owe: bool = False) -> None:
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        try:
            await self._take(wanted, may_owe)
        except LimitReached:
            if not any(charge.family == "slots" for charge in wanted):
                raise
            await asyncio.sleep(_SLOT_SECONDS)
            await self._take(wanted, may_owe)

    async def correct(self, tenant_id: str, key_id: str | None) -> None:
        for budget in budgets(tenant_id, key_id, self.now()):
            spent = await self._books.spent(tenant_id, key_id, budget.since)
            try:
                await self._correct(keys=[_key(budget.bucket)], args=[*self._head(), spent])
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
                raise LimitsUnavailable("The limits cannot be checked at the moment.") from error

    def settle(self, charge: Charge, used: int) -> None:
        self._pool(charge).settle(charge.amount, used)
        self._news.set()

    def standing(self, charge: Charge) -> Standing:
        pool = self._pool(charge)
        refilled = (time.monotonic() - pool.told_at) * charge.limit / RATE_SECONDS
        remaining = min(charge.limit, int(pool.told_remaining + refilled) + pool.available)
        return Standing(charge.limit, remaining, (charge.limit - remaining) * RATE_SECONDS / charge.limit)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self._flush(0.0)
            await self._flush(0.0)  # what had been sent before without an answer came first
        await self._redis.aclose()

    async def _take(self, wanted: list[Charge], may_owe: bool) -> None:
        pools = [self._pool(charge) for charge in wanted]
        parts = [pool.draw(charge.amount) for pool, charge in zip(pools, wanted, strict=True)]
        short = [
            charge._replace(amount=charge.amount - part)
            for charge, part in zip(wanted, parts, strict=True)
            if part < charge.amount
        ]
        if not short:
            return
        leasing = asyncio.create_task(self._ask(short, may_owe))
        try:
            await asyncio.shield(leasing)
        except BaseException as error:
            for pool, part in zip(pools, parts, strict=True):
                pool.available += part
            if isinstance(error, asyncio.CancelledError):  # granted to nobody, it is idle
                leasing.add_done_callback(lambda done: self._put(short, done))
            self._news.set()
            raise

    def _put(self, granted: Iterable[Charge], leasing: asyncio.Task[None]) -> None:
        if leasing.cancelled() or leasing.exception() is not None:
            return
        for charge in granted:
            self._pool(charge).available += charge.amount
        self._news.set()

    async def _ask(self, short: list[Charge], may_owe: bool) -> None:
        """Lease what is short. Raises LimitReached or LimitsUnavailable."""
        if self._renewing.locked():  # or it would overwrite what is granted meanwhile
            async with self._renewing:
                pass
        pools = [self._pool(charge) for charge in short]
        for pool in pools:
            pool.num_calls += 1
        try:
            while True:
                answer = await self._call_lease(short, may_owe)
                if answer[0] != b"seed":
                    break
                await self._seed_budget(short[answer[2] - 1])
        finally:
            for pool in pools:
                pool.num_calls -= 1
        if answer[0] == b"refused":
            charge, wait = short[answer[2] - 1], answer[3] / 1000
            is_impossible = wait < 0 or (charge.family == "rate" and charge.amount > charge.limit)
            raise refusal(charge, math.inf if is_impossible else wait, self.now())
        for number, (pool, charge) in enumerate(zip(pools, short, strict=True)):
            pool.granted(charge.amount, *answer[2 + 2 * number : 4 + 2 * number])

    async def _call_lease(self, short: list[Charge], may_owe: bool) -> Any:
        arguments: list[str | int | float] = [*self._head(), int(may_owe)]
        for charge in short:
            arguments += [charge.family, charge.limit, charge.amount, charge.limit // 400, self._expiry(charge.until)]
        if time.monotonic() < self._away_until:
            raise LimitsUnavailable("The limits cannot be checked at the moment.")
        try:
            answer = await self._lease(keys=[_key(charge.bucket) for charge in short], args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._lost(error)
            raise LimitsUnavailable("The limits cannot be checked at the moment.") from error
        self._found()
        self._offset = answer[1] / 1000 - time.time()
        return answer

    async def _seed_budget(self, charge: Charge) -> None:
        spent = await self._books.spent(charge.tenant_id, charge.key_id, charge.since)
        arguments = [*self._head(), spent, self._expiry(charge.until)]
        try:
            await self._seed(keys=[_key(charge.bucket)], args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._lost(error)
            raise LimitsUnavailable("The limits cannot be checked at the moment.") from error

    async def _keep(self) -> None:
        """Give back what is settled or idle, and say that this process lives."""
        renewed_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._news.wait()
            self._news.clear()
            try:
                await self._flush(_IDLE_SECONDS)
                if time.monotonic() - renewed_at > self._hold_seconds / 3:
                    renewed_at = time.monotonic()
                    await self._renew_all()
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
                await asyncio.sleep(_TICK_SECONDS)

    async def _flush(self, idle_seconds: float) -> None:
        pending: list[tuple[Pool, Outgoing]] = []
        now = time.monotonic()
        for bucket, pool in list(self._pools.items()):
            outgoing = pool.pack(now - idle_seconds)
            if outgoing is not None:
                pending.append((pool, outgoing))
            elif pool.is_forgettable(now - 2 * RATE_SECONDS):
                del self._pools[bucket]
        for start in range(0, len(pending), 100):
            some = pending[start : start + 100]
            await asyncio.gather(*(self._send(pool, outgoing) for pool, outgoing in some))

    async def _send(self, pool: Pool, outgoing: Outgoing) -> None:
        arguments = [
            *self._head(), pool.family, outgoing.limit, outgoing.sequence, outgoing.spent, outgoing.returned,
            self._expiry(pool.until),
        ]  # fmt: skip
        await self._settle(keys=[_key(pool.bucket)], args=arguments)
        pool.outgoing = None

    async def _renew_all(self) -> None:
        async with self._renewing:
            # what is under way to or from Redis is no settled figure; there is no wait between this look and the call
            for pool in list(self._pools.values()):
                if pool.family != "rate" and pool.held and not pool.num_calls and pool.outgoing is None:
                    arguments = [*self._head(), pool.held, self._expiry(pool.until)]
                    await self._renew(keys=[_key(pool.bucket)], args=arguments)

    def _pool(self, charge: Charge) -> Pool:
        pool = self._pools.get(charge.bucket)
        if pool is None:
            pool = self._pools[charge.bucket] = Pool(charge.bucket, charge.family, charge.until)
            pool.told_remaining = charge.limit  # until Redis says what others took
        pool.limit = charge.limit
        return pool

    def _head(self) -> list[str | int | float]:
        now = f"{self._clock() * 1000:.0f}" if self._clock else ""
        return [self._process, now, round(self._hold_seconds * 1000)]

    def _expiry(self, until: float) -> int:
        """Milliseconds until Redis may forget a bucket: a day after its period, where it has one."""
        return max(round((until - self.now() + 86400) * 1000), 86_400_000)

    def _lost(self, error: Exception) -> None:
        self._away_until = time.monotonic() + _AWAY_SECONDS
        if not self._is_away:
            self._is_away = True
            _log.error("Redis is away, limits are no longer held across gateways: %s", error)

    def _found(self) -> None:
        if self._is_away:
            self._is_away = False
            _log.warning("Redis is back, limits are held across gateways again")


def _key(bucket: str) -> str:
    return f"loraplex:{bucket}"
