"""Admission over both stores: all or nothing, settled however it ends, never overshot."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from support.limits import World, admitted, demand

from loraplex.auth.errors import LimitReached, QuotaSpent, RequestsLimited, TokensLimited
from loraplex.auth.limits.charges import period
from loraplex.auth.limits.policy import Limits


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
