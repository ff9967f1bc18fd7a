"""The audit log: begun, ended, found again by every filter and page by page."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine
from support.clock import Clock

from loraplex.auth.audit import BEGUN, OK, AuditEntry, AuditFilter, AuditLog


def entry(action: str = "create_key", key_id: str = "admin", tenant_id: str = "") -> AuditEntry:
    return AuditEntry(
        key_id=key_id, role="admin", action=action, object="tenants", tenant_id=tenant_id, address="::1", request_id="r"
    )


async def test_action_is_begun_and_ended(database: AsyncEngine, clock: Clock) -> None:
    log = AuditLog(database, clock)
    number = await log.begin(entry())
    begun = (await log.find(AuditFilter(), 10))[0]
    assert (begun.id, begun.at, begun.outcome, begun.status, begun.ended_at) == (number, 1000.0, BEGUN, None, None)
    clock.now += 1
    await log.end(number, 201, OK, "tenants/t/keys/k", "t", {"name": "ä", "limits": {"weight": 2.0}})
    ended = (await log.find(AuditFilter(), 10))[0]
    assert (ended.object, ended.tenant_id, ended.status, ended.ended_at) == ("tenants/t/keys/k", "t", 201, 1001.0)
    assert ended.details == {"name": "ä", "limits": {"weight": 2.0}}


async def test_entries_are_found_by_every_filter_newest_first_and_in_pages(database: AsyncEngine, clock: Clock) -> None:
    log = AuditLog(database, clock)
    numbers = []
    for at in range(6):
        clock.now = 1000.0 + at
        name = ("create_key", "revoke_key")[at % 2]
        numbers.append(await log.begin(entry(name, key_id=f"key_{at // 3}", tenant_id=f"t{at}")))
        await log.end(numbers[-1], 200, OK if at else "key_not_found")

    async def found(limit: int = 10, after: int | None = None, **wanted: object) -> list[int]:
        entries = await log.find(AuditFilter(**wanted), limit, after)  # type: ignore[arg-type]
        return [numbers.index(one.id) for one in entries]

    assert await found() == [5, 4, 3, 2, 1, 0]
    assert await found(action="revoke_key") == [5, 3, 1]
    assert await found(key_id="key_0") == [2, 1, 0]
    assert await found(tenant_id="t4") == [4]
    assert await found(outcome="key_not_found") == [0]
    assert await found(since=1001.0, until=1003.0) == [2, 1]
    assert await found(limit=2) == [5, 4]
    assert await found(limit=2, after=numbers[4]) == [3, 2]
    assert await found(after=numbers[0]) == []


async def test_object_longer_than_its_column_is_cut(database: AsyncEngine) -> None:
    log = AuditLog(database)
    number = await log.begin(entry())
    await log.end(number, 200, OK, "x" * 5000)
    assert (await log.find(AuditFilter(), 1))[0].object == "x" * 512
