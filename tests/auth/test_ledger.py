"""The books on their database, SQLite and PostgreSQL alike: a row for each request, once, whatever ends a process."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from support.books import write_records

from loraplex.auth.errors import LimitsUnavailable, UsageUnrecorded
from loraplex.auth.ledger.journal import leftovers
from loraplex.auth.ledger.ledger import Ledger, open_ledger
from loraplex.auth.ledger.rows import RowWriter
from loraplex.auth.metering import ABORTED, COMPLETED, INTERRUPTED, UsageRecord
from loraplex.auth.store.tables import usage_days, usage_records

NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC
MIDNIGHT = NOON - 43_200
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # where no SQL is looked at


def record(name: str | None = None, **changes: object) -> UsageRecord:
    made = UsageRecord(
        request_id=name or secrets.token_hex(8),
        trace_id="req_1",
        route="/v1/completions",
        tenant_id="tenant_1",
        key_id="key_1",
        model="base",
        adapter_id="",
        num_prompt_tokens=7,
        began_at=NOON,
    )
    return msgspec.structs.replace(made, **changes)


def over(begun: UsageRecord, num_tokens: int = 3, outcome: str = COMPLETED) -> UsageRecord:
    return msgspec.structs.replace(
        begun, num_completion_tokens=num_tokens, first_token_at=NOON + 1, ended_at=NOON + 2, outcome=outcome
    )


async def rows(database: AsyncEngine) -> list[UsageRecord]:
    query = select(usage_records).order_by(usage_records.c.request_id)
    async with database.connect() as connection:
        return [UsageRecord(**row._mapping) for row in await connection.execute(query)]


async def days(database: AsyncEngine) -> list[tuple[Any, ...]]:
    query = select(usage_days).order_by(*list(usage_days.c)[:4])
    async with database.connect() as connection:
        return [tuple(row) for row in await connection.execute(query)]


@pytest_asyncio.fixture
async def books(database: AsyncEngine, tmp_path: Path) -> AsyncIterator[Ledger]:
    ledger = await open_ledger(database, tmp_path / "journal")
    yield ledger
    await ledger.close()


def abandon(ledger: Ledger) -> None:
    """What the end of a process does: nothing more is written, and the lock goes."""
    ledger._writer.cancel()
    ledger._journal._unmap()
    ledger._journal._file.close()


class Away:
    """Implements `RowWriter` for a database that does not answer."""

    async def insert(self, records: Sequence[UsageRecord]) -> None:
        raise OperationalError("INSERT", {}, OSError("gone"))

    async def close(self) -> None: ...


def take_away(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> RowWriter:
    """Returns what the ledger wrote with until now."""
    rows = ledger._rows
    monkeypatch.setattr(ledger, "_rows", Away())
    return rows


async def test_settled_request_becomes_its_row_and_part_of_its_day(books: Ledger, database: AsyncEngine) -> None:
    begun = record("r1", adapter_id="abc", model="mödel/😀")
    books.begin(begun).progress(1, 4)
    assert await rows(database) == []
    final = msgspec.structs.replace(over(begun), num_cached_tokens=4)
    books.settle(final)
    await books.flush()
    assert await rows(database) == [final]
    assert await days(database) == [("2027-01-15", "tenant_1", "key_1", "mödel/😀", 1, 7, 4, 3)]


@on_sqlite
async def test_row_is_written_soon_without_being_asked_for(books: Ledger, database: AsyncEngine) -> None:
    books.begin(begun := record())
    books.settle(over(begun))
    async with asyncio.timeout(20):
        while not await rows(database):
            await asyncio.sleep(0.01)


@on_sqlite
async def test_rows_that_come_together_are_written_together(
    books: Ledger, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    insert = books._rows.insert

    async def counted(records: list[UsageRecord]) -> None:
        batches.append(len(records))
        await insert(records)

    monkeypatch.setattr(books._rows, "insert", counted)
    for number in range(450):
        books.begin(begun := record(f"r{number:03}"))
        books.settle(over(begun))
    await books.flush()
    assert batches == [200, 200, 50]
    assert len(await rows(database)) == 450
    assert await days(database) == [("2027-01-15", "tenant_1", "key_1", "base", 450, 7 * 450, 0, 3 * 450)]


async def test_writing_again_changes_nothing(database: AsyncEngine) -> None:
    first, second = over(record("r1")), over(record("r2"), 5)
    await write_records(database, [first])
    await write_records(database, [msgspec.structs.replace(first, num_completion_tokens=99), second])
    await write_records(database, [second, first])
    assert await rows(database) == [first, second]
    assert await days(database) == [("2027-01-15", "tenant_1", "key_1", "base", 2, 14, 0, 8)]


async def test_many_writers_at_once_lose_and_double_nothing(database: AsyncEngine) -> None:
    """Every record is given to three writers, each with neighbours of its own in an order of its own."""
    all_records = [
        over(
            record(
                f"r{number:03}",
                key_id=f"key_{number % 5}",
                model=f"m{number % 3}",
                began_at=NOON + 86400 * (number % 2),
            )
        )
        for number in range(300)
    ]

    async def write(step: int) -> None:
        mine = all_records[::step] if step > 0 else all_records[::-1]
        for start in range(0, len(mine), 20):
            await write_records(database, mine[start : start + 20])

    await asyncio.gather(write(1), write(-1), write(2))
    assert await rows(database) == all_records
    assert sum(day[4] for day in await days(database)) == 300
    assert sum(day[7] for day in await days(database)) == 900


async def test_spent_counts_what_was_settled_just_now_and_only_that(books: Ledger) -> None:
    for changes in (
        {},
        {"key_id": "key_2"},
        {"tenant_id": "tenant_2"},
        {"began_at": MIDNIGHT - 1},
        {"began_at": MIDNIGHT},
    ):
        begun = record(**changes)
        books.begin(begun)
        books.settle(over(begun))
    assert await books.spent("tenant_1", None, MIDNIGHT) == 30
    assert await books.spent("tenant_1", "key_1", MIDNIGHT) == 20
    assert await books.spent("tenant_1", "key_1", MIDNIGHT - 86400 * 14) == 30
    assert await books.spent("tenant_1", "key_1", MIDNIGHT + 86400) == 0
    assert await books.spent("nobody", None, 0) == 0


async def test_dead_process_is_settled_by_the_next(database: AsyncEngine, tmp_path: Path) -> None:
    """One request written, one settled and not written, one running, one that gave nothing yet."""
    dead = await open_ledger(database, tmp_path)
    begun = {name: record(name) for name in ("written", "settled", "running", "silent")}
    entries = {name: dead.begin(each) for name, each in begun.items()}
    dead.settle(over(begun["written"]))
    await dead.flush()
    dead.settle(over(begun["settled"], 4, ABORTED))
    entries["running"].progress(6, 0)
    abandon(dead)
    ledger = await open_ledger(database, tmp_path)
    found = {each.request_id: each for each in await rows(database)}
    assert found["written"] == over(begun["written"])
    assert found["settled"] == over(begun["settled"], 4, ABORTED)
    running = found["running"]
    assert (running.num_prompt_tokens, running.num_completion_tokens, running.outcome) == (7, 6, INTERRUPTED)
    assert running.ended_at is None
    silent = found["silent"]
    assert (silent.num_prompt_tokens, silent.num_completion_tokens, silent.outcome) == (0, 0, INTERRUPTED)
    assert await ledger.spent("tenant_1", None, MIDNIGHT) == 10 + 11 + 13
    await ledger.close()
    assert not list(leftovers(tmp_path))


async def test_row_written_before_its_slot_was_freed_is_counted_once(database: AsyncEngine, tmp_path: Path) -> None:
    dead = await open_ledger(database, tmp_path)
    dead.begin(begun := record("r1"))
    dead.settle(over(begun))
    await write_records(database, [over(begun)])
    abandon(dead)
    for _ in range(2):
        await (await open_ledger(database, tmp_path)).close()
    assert await rows(database) == [over(begun)]
    assert [day[4] for day in await days(database)] == [1]


@on_sqlite
async def test_living_neighbour_is_left_alone(books: Ledger, database: AsyncEngine, tmp_path: Path) -> None:
    books.begin(begun := record("r1"))
    neighbour = await open_ledger(database, tmp_path / "journal")
    await neighbour.close()
    assert await rows(database) == []
    books.settle(over(begun))
    await books.flush()
    assert await rows(database) == [over(begun)]


@on_sqlite
async def test_database_that_is_away_loses_nothing_and_is_told_of(
    books: Ledger, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "loraplex.ledger")
    rows_writer = take_away(books, monkeypatch)
    books.begin(begun := record("r1"))
    books.settle(over(begun))
    with pytest.raises(UsageUnrecorded):
        await books.flush()
    with pytest.raises(LimitsUnavailable):
        await books.spent("tenant_1", None, MIDNIGHT)
    assert len(caplog.records) == 1
    monkeypatch.setattr(books, "_rows", rows_writer)
    async with asyncio.timeout(20):
        while not await rows(database):
            await asyncio.sleep(0.01)
    await books.flush()
    assert await rows(database) == [over(begun)]
    assert "again" in caplog.records[-1].message


@on_sqlite
async def test_closing_without_a_database_leaves_it_to_the_next_start(
    database: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await open_ledger(database, tmp_path)
    take_away(ledger, monkeypatch)
    ledger.begin(begun := record("r1"))
    ledger.settle(over(begun))
    await ledger.close()
    await (await open_ledger(database, tmp_path)).close()
    assert await rows(database) == [over(begun)]


@on_sqlite
async def test_too_much_unwritten_takes_on_no_more(books: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.auth.ledger.ledger._MAX_UNWRITTEN", 2)
    for _ in range(2):
        books.begin(begun := record())
        books.settle(over(begun))
    with pytest.raises(UsageUnrecorded):
        books.begin(record())
    await books.flush()
    books.begin(begun := record())
    books.settle(over(begun))


async def test_row_that_is_refused_is_cut_to_fit(books: Ledger, database: AsyncEngine) -> None:
    books.begin(begun := record("r1", model="m" * 500, trace_id="a\0b\ud800"))
    books.settle(over(begun))
    await books.flush()
    (found,) = await rows(database)
    assert (found.model, found.trace_id) == ("m" * 256, "ab?")


def test_no_table_of_usage_could_hold_a_prompt() -> None:
    """Every text column is an identifier, a name, a path or an outcome."""
    texts = {
        column.name for table in (usage_records, usage_days) for column in table.c if hasattr(column.type, "length")
    }
    assert texts == {
        "request_id", "trace_id", "route", "tenant_id", "key_id", "model", "adapter_id", "outcome", "day",
    }  # fmt: skip
