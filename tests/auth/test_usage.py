"""What was used, as it is asked about: the same on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from support.books import write_records

from loraplex.auth.ledger.retention import Retention, prune
from loraplex.auth.ledger.rows import SUMS, day_of
from loraplex.auth.ledger.usage import DIMENSIONS, Dimension, Scope, Sums, Usage
from loraplex.auth.metering import COMPLETED, UsageRecord

NOON = 1_800_014_400  # 2027-01-15 12:00 UTC
DAY = 86400


async def nothing() -> None: ...


def some_records(count: int) -> list[UsageRecord]:
    """Over three days, three tenants with two keys each, two models; some begin at the very same moment."""
    rng = random.Random(count)
    return [
        UsageRecord(
            request_id=f"r{number:05}",
            trace_id="-",
            route="/v1/completions",
            tenant_id=f"tenant_{rng.randrange(3)}",
            key_id=f"key_{rng.randrange(2)}",
            model=f"model-{rng.randrange(2)}",
            adapter_id="",
            num_prompt_tokens=rng.randrange(100),
            num_cached_tokens=rng.randrange(10),
            num_completion_tokens=rng.randrange(100),
            began_at=NOON + rng.randrange(-DAY, DAY, 900),
            ended_at=NOON + 2 * DAY,
            outcome=COMPLETED,
        )
        for number in range(count)
    ]


def summed(records: list[UsageRecord], by: list[str], seconds: int = 0) -> list[tuple[Any, ...]]:
    """By hand: the dimensions and the sums, in order."""
    found: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in records:
        named = {**msgspec.structs.asdict(record), "day": day_of(record.began_at)}
        begin = [int(record.began_at // seconds * seconds)] if seconds else []
        sums = found[*begin, *(named[name] for name in by)]
        for at, amount in enumerate((1, *(named[name] for name in SUMS[1:]))):
            sums[at] += amount
    return sorted((*place, *amounts) for place, amounts in found.items())


def told(sums: list[Sums], names: list[str]) -> list[tuple[Any, ...]]:
    return [tuple(getattr(one, name) for name in (*names, *SUMS)) for one in sums]


@pytest.mark.parametrize("by", [[], ["day"], ["tenant_id"], ["key_id", "model"], list(DIMENSIONS)])
async def test_sums_by_day_are_those_of_the_rows(database: AsyncEngine, by: list[Dimension]) -> None:
    records = some_records(300)
    for start in range(0, 300, 100):
        await write_records(database, records[start : start + 100])
    usage = Usage(database, nothing)
    assert told(await usage.by_day(Scope(), None, None, by), list(by)) == summed(records, list(by))
    mine = [record for record in records if record.tenant_id == "tenant_1" and record.model == "model-0"]
    today = [record for record in mine if day_of(record.began_at) == "2027-01-15"]
    scope = Scope(tenant_ids=("tenant_1",), models=("model-0",))
    assert told(await usage.by_day(scope, "2027-01-15", "2027-01-15", by), list(by)) == summed(today, list(by))


async def test_nothing_used_is_one_sum_of_nothing_or_no_group(database: AsyncEngine) -> None:
    usage = Usage(database, nothing)
    assert told(await usage.by_day(Scope(), None, None, []), []) == [(0, 0, 0, 0)]
    assert await usage.by_day(Scope(), None, None, ["model"]) == []
    assert await usage.by_time(Scope(), 0, NOON, 60, []) == []
    assert [page async for page in usage.requests(Scope(), 0, NOON)] == [[]]
    await write_records(database, some_records(10))
    assert told(await usage.by_day(Scope(tenant_ids=()), None, None, []), []) == [(0, 0, 0, 0)]


@pytest.mark.parametrize("seconds", [60, 3600, DAY])
async def test_sums_by_time_fall_into_the_stretch_they_began_in(database: AsyncEngine, seconds: int) -> None:
    records = some_records(200)
    edges = [msgspec.structs.replace(records[0], request_id=f"e{at}", began_at=NOON + at)
             for at in (0.0, -0.25, 59.75, 1800.0, 3599.999)]  # fmt: skip
    await write_records(database, records + edges)
    usage = Usage(database, nothing)
    since, until = NOON - 7200, NOON + 7200
    inside = [record for record in records + edges if since <= record.began_at < until]
    found = await usage.by_time(Scope(), since, until, seconds, ["key_id"])
    assert told(found, ["since", "key_id"]) == summed(inside, ["key_id"], seconds)


async def test_requests_come_in_pages_each_once_and_in_order(database: AsyncEngine) -> None:
    records = some_records(2500)  # about a dozen begin at each moment
    for start in range(0, 2500, 500):
        await write_records(database, records[start : start + 500])
    usage = Usage(database, nothing)
    pages = [page async for page in usage.requests(Scope(), NOON - 40_000, NOON + 40_000)]
    assert [len(page) for page in pages][:-1] == [1000] * (len(pages) - 1)
    inside = [record for record in records if NOON - 40_000 <= record.began_at < NOON + 40_000]
    in_order = sorted(inside, key=lambda record: (record.began_at, record.request_id))
    assert [record for page in pages for record in page] == in_order
    (page,) = [page async for page in usage.requests(Scope(key_ids=("key_1",), tenant_ids=("tenant_2",)), 0, NOON)]
    assert {(record.key_id, record.tenant_id) for record in page} == {("key_1", "tenant_2")}


async def test_pruning_deletes_old_rows_and_keeps_the_sums(database: AsyncEngine) -> None:
    records = some_records(2500)
    for start in range(0, 2500, 500):
        await write_records(database, records[start : start + 500])
    usage = Usage(database, nothing)
    before = await usage.by_day(Scope(), None, None, list(DIMENSIONS))
    young = [record for record in records if record.began_at >= NOON]
    assert await prune(database, NOON) == 2500 - len(young)
    kept = [record for page in [page async for page in usage.requests(Scope(), 0, NOON * 2)] for record in page]
    assert sorted(record.request_id for record in kept) == [record.request_id for record in young]
    assert await usage.by_day(Scope(), None, None, list(DIMENSIONS)) == before
    assert await prune(database, NOON) == 0


async def test_retention_prunes_at_the_start(database: AsyncEngine) -> None:
    await write_records(database, some_records(20))
    retention = Retention(database, 3, lambda: NOON + 5.0 * DAY)
    usage = Usage(database, nothing)
    async with asyncio.timeout(20):
        while [page async for page in usage.requests(Scope(), 0, NOON * 2)] != [[]]:
            await asyncio.sleep(0.01)
    await retention.close()
