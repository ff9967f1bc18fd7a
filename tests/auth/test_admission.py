"""Admission over both stores: all or nothing, settled however it ends, never overshot."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from redis.asyncio import ConnectionPool, Redis
from support.services import own_redis

from loraplex.auth.caller import Caller
from loraplex.auth.errors import LimitReached, LimitsUnavailable, QuotaSpent, RequestsLimited, TokensLimited
from loraplex.auth.limits.admission import Admission, Reservation
from loraplex.auth.limits.charges import period
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


async def test_caller_without_limits_passes(world: World) -> None:
    admission = world.admission()
    for _ in range(100):
        (await admission.reserve(world.caller(), demand(10**6, 10**6))).settle(1, 1)


async def test_rate_holds_a_minutes_worth_and_refills(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(requests_per_minute=30))
    assert len(await admitted(admission, caller, demand())) == 30
    with pytest.raises(RequestsLimited) as refused:
        await admission.reserve(caller, demand())
    assert refused.value.retry_after == pytest.approx(2.0, abs=0.01)
    world.clock.now += 2.0
    assert len(await admitted(admission, caller, demand())) == 1
    world.clock.now += 3600
    assert len(await admitted(admission, caller, demand())) == 30


async def test_refused_request_takes_nothing_of_any_limit(world: World) -> None:
    limits = Limits(requests_per_minute=10, input_tokens_per_minute=100, concurrent_requests=5, tokens_per_day=50)
    admission, caller = world.admission(), world.caller(limits)
    for _ in range(20):
        with pytest.raises(QuotaSpent):
            await admission.reserve(caller, demand(60, 10))
    held = [await admission.reserve(caller, demand(9, 1)) for _ in range(5)]
    with pytest.raises(LimitReached):
        await admission.reserve(caller, demand(1, 0))
    for reservation in held:
        reservation.settle(0, 0)
    assert len(await admitted(admission, caller, demand(1, 1))) == 5


async def test_settlement_gives_back_what_was_not_used(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(tokens_per_day=100, output_tokens_per_minute=100))
    reservation = await admission.reserve(caller, demand(10, 90))
    with pytest.raises(LimitReached):
        await admission.reserve(caller, demand(1, 1))
    reservation.settle(10, 20)
    reservation.settle(0, 0)  # changes nothing
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(1, 70))
    (await admission.reserve(caller, demand(0, 70))).settle(0, 0)


async def test_key_and_tenant_both_hold(world: World) -> None:
    admission = world.admission()
    tenant = Limits(requests_per_minute=10)
    one = world.caller(tenant, Limits(requests_per_minute=4), "key_1")
    other = world.caller(tenant, key_id="key_2")
    assert len(await admitted(admission, one, demand())) == 4
    assert len(await admitted(admission, other, demand())) == 6


@pytest.mark.parametrize(("kind", "ahead"), [("tokens_per_day", 12 * 3600.0), ("tokens_per_month", 16.5 * 86400.0)])
async def test_budget_is_of_its_period_and_begins_with_the_books(world: World, kind: str, ahead: float) -> None:
    world.books.tokens = 95
    admission, caller = world.admission(), world.caller(msgspec.convert({kind: 100}, Limits))
    with pytest.raises(QuotaSpent) as refused:
        await admission.reserve(caller, demand(3, 3))
    assert refused.value.retry_after == pytest.approx(ahead)
    assert refused.value.is_final
    (await admission.reserve(caller, demand(3, 2))).settle(3, 2)
    await world.calm()
    world.books.tokens = 0
    world.clock.now += ahead - 1
    with pytest.raises(QuotaSpent):
        await admission.reserve(caller, demand(1, 0))
    world.clock.now += 1
    await admission.reserve(caller, demand(100, 0))


async def test_budget_that_is_only_reserved_is_not_spent(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(tokens_per_day=1000))
    running = await admission.reserve(caller, demand(10, 690))
    with pytest.raises(QuotaSpent) as refused:
        await admission.reserve(caller, demand(10, 600))
    assert (refused.value.is_final, refused.value.retry_after) == (False, 1.0)
    running.settle(10, 690)
    await world.calm()
    with pytest.raises(QuotaSpent) as refused:
        await admission.reserve(caller, demand(10, 600))
    assert (refused.value.is_final, refused.value.retry_after) == (True, 12 * 3600)
    await admission.reserve(caller, demand(10, 290))


async def test_slots_come_back_one_by_one(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(concurrent_requests=3))
    held = await admitted(admission, caller, demand())
    assert len(held) == 3
    held[1].settle(1, 1)
    assert len(await admitted(admission, caller, demand())) == 1


async def test_request_larger_than_a_limit_is_final(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(input_tokens_per_minute=10))
    with pytest.raises(TokensLimited) as refused:
        await admission.reserve(caller, demand(11, 1))
    assert (refused.value.is_final, refused.value.retry_after) == (True, None)


async def test_limits_changed_live_hold_at_once(world: World) -> None:
    admission = world.admission()
    assert len(await admitted(admission, world.caller(Limits(concurrent_requests=2)), demand())) == 2
    assert len(await admitted(admission, world.caller(Limits(concurrent_requests=5)), demand())) == 3
    with pytest.raises(RequestsLimited):
        await admission.reserve(world.caller(Limits(concurrent_requests=1)), demand())


async def test_open_ended_answer_grows_until_the_budget_is_spent_exactly(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(tokens_per_day=700, output_tokens_per_minute=300))
    reservation = await admission.reserve(caller, demand(10, 10_000, is_open_ended=True))
    assert reservation.num_output_tokens == 256
    while reservation.num_output_tokens < 690:
        await reservation.extend()
    with pytest.raises(QuotaSpent):
        await reservation.extend()
    assert reservation.num_output_tokens == 690
    reservation.settle(10, 690)
    with pytest.raises(QuotaSpent):
        await admission.reserve(world.caller(Limits(tokens_per_day=700)), demand(0, 1))
    with pytest.raises(TokensLimited):  # the rate gave more than it had, and has to refill
        await admission.reserve(world.caller(Limits(output_tokens_per_minute=300)), demand(0, 1))


async def test_open_ended_answer_reserves_what_answers_usually_have(world: World) -> None:
    admission, caller = world.admission(), world.caller()
    for _ in range(50):
        admission.learn("key_1", "m", 40)
    assert 40 <= (await admission.reserve(caller, demand(1, 10_000, is_open_ended=True))).num_output_tokens < 60


async def test_open_ended_answer_is_admitted_while_a_token_is_left(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(tokens_per_day=20))
    reservation = await admission.reserve(caller, demand(10, 10_000, is_open_ended=True))
    while reservation.num_output_tokens < 10:
        await reservation.extend()
    with pytest.raises(QuotaSpent):
        await reservation.extend()


async def test_standings_tell_the_tightest_limit(world: World) -> None:
    limits = Limits(requests_per_minute=60, input_tokens_per_minute=1000, output_tokens_per_minute=100)
    reservation = await world.admission().reserve(world.caller(limits), demand(100, 40))
    standings = reservation.standings()
    assert (standings["requests"].limit, standings["tokens"].limit) == (60, 100)
    assert standings["requests"].remaining in (58, 59)  # rounded down
    assert standings["tokens"].remaining in (59, 60)
    assert standings["tokens"].reset_seconds == pytest.approx(24.0, abs=1.0)


async def test_standings_of_who_was_refused_take_nothing(world: World) -> None:
    admission, caller = world.admission(), world.caller(Limits(requests_per_minute=2, input_tokens_per_minute=1000))
    assert {unit: it.remaining for unit, it in admission.standings(caller).items()} == {"requests": 2, "tokens": 1000}
    await admitted(admission, caller, demand(100))
    standings = admission.standings(caller)
    assert standings["requests"].remaining == 0
    assert standings["requests"].reset_seconds == pytest.approx(60, abs=1)
    assert standings["tokens"].remaining in (799, 800)  # rounded down
    assert admission.standings(caller)["requests"].remaining == 0


async def test_budget_is_never_overshot_by_concurrency(world: World) -> None:
    """Random requests at once through several gateways, some cancelled while they are being admitted."""
    gateways = [world.admission()] if world.kind == "memory" else [world.admission() for _ in range(4)]
    limits = Limits(tokens_per_day=20_000, concurrent_requests=40)
    chance = random.Random(1)
    used, running, most, refusals = 0, 0, 0, 0

    async def ask(number: int) -> None:
        nonlocal used, running, most, refusals
        prompt, answer = chance.randint(1, 40), chance.randint(1, 60)
        try:
            reservation = await chance.choice(gateways).reserve(world.caller(limits), demand(prompt, answer))
        except LimitReached:
            refusals += 1
            return
        running += 1
        most = max(most, running)
        actual = chance.randint(0, answer)
        try:
            await asyncio.sleep(0)
        finally:
            used += prompt + actual
            running -= 1
            reservation.settle(prompt, actual)

    tasks = []
    for number in range(1000):
        tasks.append(asyncio.create_task(ask(number)))
        if chance.random() < 0.1:
            await asyncio.sleep(0)
            tasks[chance.randrange(len(tasks))].cancel()
        if number % 30 == 0:
            await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 40
    assert used <= 20_000
    assert refusals
    await world.calm()
    # nothing is left reserved: the whole rest can be had
    await gateways[0].reserve(world.caller(limits), demand(20_000 - used, 0))
    assert len(await admitted(gateways[0], world.caller(Limits(concurrent_requests=40)), demand())) == 39
    with pytest.raises(QuotaSpent):
        await gateways[0].reserve(world.caller(Limits(tokens_per_day=20_000)), demand(1, 0))


@pytest.mark.parametrize(
    ("date", "since", "until"),
    [(1_800_000_000.0, 1_798_761_600.0, 1_801_440_000.0), (1_797_000_000.0, 1_796_083_200.0, 1_798_761_600.0)],
)
def test_month_is_the_calendars(date: float, since: float, until: float) -> None:
    assert period("month", date) == (since, until)


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
