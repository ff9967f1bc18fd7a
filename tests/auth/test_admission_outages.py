"""Admission where a store is away, a gateway is killed, or what was used is told late or twice."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis
from support.limits import Books, Clock, World, admitted, demand, only_redis
from support.services import own_redis

from loraplex.auth.errors import LimitReached, LimitsUnavailable, QuotaSpent, RequestsLimited
from loraplex.auth.limits.admission import Admission
from loraplex.auth.limits.memory import MemoryStore
from loraplex.auth.limits.policy import Limits
from loraplex.auth.limits.shared import RedisStore
from loraplex.auth.limits.stores import Store


class _Away:
    """A store that does not answer until it is told to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_away = True

    async def take(self, wanted: list[Any], *, may_owe: bool = False) -> None:
        if self.is_away:
            raise LimitsUnavailable("away")
        await self._store.take(wanted, may_owe=may_owe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_store_away_fails_closed_or_open() -> None:
    clock, books = Clock(), Books()
    away = _Away(MemoryStore(books, clock))
    caller = World("memory", None).caller(Limits(requests_per_minute=2))
    with pytest.raises(LimitsUnavailable):
        await Admission(away).reserve(caller, demand())
    open_admission = Admission(away, lambda: MemoryStore(books, clock))
    assert len(await admitted(open_admission, caller, demand())) == 2
    await open_admission.reserve(World("memory", None).caller(), demand())  # it asks no store, so it finds none
    with pytest.raises(RequestsLimited):
        await open_admission.reserve(caller, demand())
    away.is_away = False
    assert len(await admitted(open_admission, caller, demand())) == 2


async def test_answer_that_goes_on_while_the_store_is_away_takes_from_the_substitute() -> None:
    clock, books = Clock(), Books()
    away, substitute = _Away(MemoryStore(books, clock)), MemoryStore(books, clock)
    admission = Admission(away, lambda: substitute)
    caller = World("memory", None).caller(Limits(tokens_per_day=700))
    away.is_away = False
    reservation = await admission.reserve(caller, demand(10, 10_000, is_open_ended=True))
    away.is_away = True
    await reservation.extend()
    assert reservation.num_output_tokens == 512
    reservation.settle(10, 300)  # 266 had been taken before, the other 44 meanwhile
    for store, num_left in ((substitute, 656), (away._store, 434)):
        with pytest.raises(QuotaSpent):
            await Admission(store).reserve(caller, demand(num_left, 1))
        await Admission(store).reserve(caller, demand(num_left, 0))


async def test_answer_that_goes_on_while_the_store_is_away_ends_without_a_substitute() -> None:
    away = _Away(MemoryStore(Books(), Clock()))
    away.is_away = False
    caller = World("memory", None).caller(Limits(tokens_per_day=700))
    reservation = await Admission(away).reserve(caller, demand(10, 10_000, is_open_ended=True))
    away.is_away = True
    with pytest.raises(LimitsUnavailable):
        await reservation.extend()


async def test_answer_begun_while_the_store_was_away_goes_on_in_it() -> None:
    clock, books = Clock(), Books()
    away = _Away(MemoryStore(books, clock))
    admission = Admission(away, lambda: MemoryStore(books, clock))
    caller = World("memory", None).caller(Limits(tokens_per_day=700))
    reservation = await admission.reserve(caller, demand(10, 10_000, is_open_ended=True))
    away.is_away = False
    await reservation.extend()
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(445, 0))
    await admission.reserve(caller, demand(444, 0))


async def test_redis_gone_is_told_once_and_asked_again_later(caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(Redis.from_url("redis://127.0.0.1:1/0"), Books())
    caller = World("redis", None).caller(Limits(requests_per_minute=2))
    for _ in range(3):
        with pytest.raises(LimitsUnavailable):
            await Admission(store).reserve(caller, demand())
    assert store.is_away
    await store.close()
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


async def test_killed_gateways_reservations_lapse() -> None:
    redis = await own_redis()
    world = World("redis", redis)
    try:
        limits = Limits(concurrent_requests=4, tokens_per_day=100)
        killed, alive = world.admission(), world.admission()
        assert len(await admitted(killed, world.caller(limits), demand(10, 10))) == 4
        with pytest.raises(LimitReached):
            await alive.reserve(world.caller(limits), demand(10, 10))
        store = world.stores[0]
        assert isinstance(store, RedisStore)
        assert store._keeper is not None
        store._keeper.cancel()
        world.clock.now += 10.5
        assert len(await admitted(alive, world.caller(limits), demand(10, 10))) == 4
    finally:
        await world.stores[1].close()
        keys = await redis.keys(f"loraplex:{{{world.tenant}}}*")
        await redis.delete(*keys)
        await redis.aclose()


async def test_settlement_sent_twice_counts_once() -> None:
    """The answer to a settlement is lost, so that it is sent again."""
    redis = await own_redis()
    world = World("redis", redis)
    try:
        admission = world.admission()
        caller = world.caller(Limits(tokens_per_day=100))
        (await admission.reserve(caller, demand(10, 30))).settle(10, 10)
        store = world.stores[0]
        assert isinstance(store, RedisStore)
        pool = next(iter(store._pools.values()))
        outgoing = pool.pack(float("inf"))
        assert outgoing is not None
        for _ in range(3):
            await store._send(pool, outgoing)
        with pytest.raises(QuotaSpent):
            await world.admission().reserve(caller, demand(81, 0))
        await world.admission().reserve(caller, demand(80, 0))
    finally:
        for store in world.stores:
            await store.close()
        await redis.delete(*await redis.keys(f"loraplex:{{{world.tenant}}}*"))
        await redis.aclose()


@only_redis
async def test_slots_are_held_while_more_are_asked_for_without_a_pause(world: World) -> None:
    """A bucket that is asked for at the moment is not renewed, and a refusal has to do as well."""
    admission, store = world.admission(), world.shared()
    caller = world.caller(Limits(concurrent_requests=4))
    assert len(await admitted(admission, caller, demand())) == 4
    (pool,) = store._pools.values()
    pool.num_calls += 1  # others are on their way all the time
    for _ in range(3):
        world.clock.now += 6
        await store._renew_all()
        with pytest.raises(RequestsLimited):
            await admission.reserve(caller, demand())
    with pytest.raises(RequestsLimited):
        await world.admission().reserve(caller, demand())


@only_redis
async def test_tenant_that_was_idle_is_counted_on(world: World) -> None:
    """What this process knows of an idle bucket is forgotten; in Redis it is not."""
    admission, store = world.admission(), world.shared()
    budget, slots = Limits(tokens_per_day=1000), Limits(concurrent_requests=2)
    caller = world.caller(budget, slots)
    for _ in range(3):
        (await admission.reserve(caller, demand(10, 10))).settle(10, 10)
        await world.calm()
    for pool in store._pools.values():
        pool.used_at -= 200
    await world.calm()
    assert store._pools == {}
    (await admission.reserve(caller, demand(900, 0))).settle(900, 0)
    await world.calm()
    assert len(await admitted(world.admission(), world.caller(key=slots), demand())) == 2
    world.clock.now += 11  # what is held lapses, what is spent does not
    other = world.admission()
    with pytest.raises(QuotaSpent):
        await other.reserve(world.caller(budget), demand(41, 0))
    await other.reserve(world.caller(budget), demand(40, 0))


@only_redis
async def test_budget_counts_what_was_used_while_redis_was_away(world: World) -> None:
    admission = world.admission(lambda: MemoryStore(world.books, world.clock))
    caller = world.caller(Limits(tokens_per_day=1000), Limits(tokens_per_month=5000))

    async def use(num_tokens: int) -> None:
        reservation = await admission.reserve(caller, demand(num_tokens, 0))
        world.books.tokens += num_tokens
        reservation.settle(num_tokens, 0)

    await use(10)
    await world.calm()
    with world.outage():
        for _ in range(9):
            await use(100)
    await use(100)  # it finds Redis again, and is admitted by what Redis knew
    with pytest.raises(QuotaSpent):
        await use(100)
    with pytest.raises(QuotaSpent):  # of the key as well
        await admission.reserve(world.caller(key=Limits(tokens_per_month=1000)), demand(100, 0))


@only_redis
async def test_budget_that_could_not_be_corrected_is_corrected_when_redis_is_back(world: World) -> None:
    caller = world.caller(Limits(tokens_per_day=100))
    (await world.admission().reserve(caller, demand(10, 0))).settle(10, 0)
    await world.calm()
    world.books.tokens = 60
    admission = world.admission()
    with world.outage(), pytest.raises(LimitsUnavailable):
        await admission.correct([(caller.tenant_id, caller.key_id)])
    await admission.reserve(caller, demand(1, 0))
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(40, 0))
    await admission.reserve(caller, demand(39, 0))


async def test_budget_counts_what_a_killed_gateway_used(world: World) -> None:
    """What it held has lapsed and was used all the same; in Redis nobody else knows until the books do."""
    caller = world.caller(Limits(tokens_per_day=100), Limits(tokens_per_month=100))
    killed = world.admission()
    await killed.reserve(caller, demand(30, 10))
    if world.kind == "redis":
        world.stores[-1]._keeper.cancel()  # type: ignore[attr-defined]
    world.clock.now += 60
    world.books.tokens = 40
    admission = world.admission()
    await admission.correct([(caller.tenant_id, caller.key_id)])
    await admission.correct([(caller.tenant_id, caller.key_id)])  # again changes nothing
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(60, 1))
    (await admission.reserve(caller, demand(50, 10))).settle(50, 10)
    world.books.tokens = 30  # less than is known: nothing comes back
    await admission.correct([(caller.tenant_id, caller.key_id)])
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(1, 0))
