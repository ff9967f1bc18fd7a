"""Four whole gateways on one PostgreSQL and one Redis hold one tenant's limits together: never passed, and used up.

A budget does not refill. A rate does, more slowly than any machine answers, by the time that the clients took at most.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from support.gateway_processes import (
    GIVE_UP_SECONDS,
    IMPORT_PATH,
    Machine,
    Stores,
    Tenant,
    admin_of,
    running,
    shared_stores,
)

NUM_GATEWAYS = 4
CLIENTS_PER_GATEWAY = 4
MAX_REFUSALS = 12  # after which a client goes; gateways give back what they leased within half a second
PAUSE_SECONDS = 0.1  # after a refusal


@dataclass
class Used:
    """What one gateway let its clients have."""

    num_requests: int = 0
    num_tokens: int = 0


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*IMPORT_PATH)


@pytest_asyncio.fixture
async def shared(tmp_path: Path) -> AsyncIterator[Stores]:
    async with shared_stores(tmp_path) as stores:
        yield stores


# a mark of the function's own would be closer than these, and hold for both
brief = pytest.param(20_000, 200, marks=pytest.mark.timeout(600))
full = pytest.param(400_000, 1_200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(("tokens_per_day", "requests_per_minute"), [brief, full])
async def test_four_gateways_hold_one_tenants_limits_within_1_percent(
    shared: Stores, tokens_per_day: int, requests_per_minute: int
) -> None:
    async with running(shared, NUM_GATEWAYS) as machines, admin_of(machines[0]) as admin:
        budgeted = await Tenant.make(admin, "budgeted", 2, tokens_per_day=tokens_per_day)
        used = await used_together(machines, budgeted)
        assert 0.99 * tokens_per_day <= sum(each.num_tokens for each in used) <= tokens_per_day
        assert all(each.num_requests for each in used), "each of the gateways had a part"
        assert await billed(machines, budgeted) == (
            sum(each.num_requests for each in used),
            sum(each.num_tokens for each in used),
        )

        rated = await Tenant.make(admin, "rated", 2, requests_per_minute=requests_per_minute)
        began = time.monotonic()
        used = await used_together(machines, rated)
        most = requests_per_minute * (1 + (time.monotonic() - began) / 60)
        assert 0.99 * requests_per_minute <= sum(each.num_requests for each in used) <= most
        assert all(each.num_requests for each in used), "each of the gateways had a part"


async def used_together(machines: list[Machine], tenant: Tenant) -> list[Used]:
    """By gateway, once nobody gets anything any more."""
    used = [Used() for _ in machines]
    seeds = iter(range(NUM_GATEWAYS * CLIENTS_PER_GATEWAY))
    async with asyncio.TaskGroup() as group:
        for machine, mine in zip(machines, used, strict=True):
            for seed in (next(seeds) for _ in range(CLIENTS_PER_GATEWAY)):
                group.create_task(use_up(machine, tenant.keys[seed % len(tenant.keys)], seed, mine))
    return used


async def use_up(machine: Machine, key: str, seed: int, used: Used) -> None:
    """Ask for answers of random length, most of which end before what was reserved for them, until there are none."""
    chance = random.Random(seed)
    headers = {"Authorization": f"Bearer {key}"}
    num_refusals = 0
    async with httpx.AsyncClient(base_url=machine.url, headers=headers, timeout=GIVE_UP_SECONDS) as client:
        while num_refusals < MAX_REFUSALS:
            body = {"model": "base", "prompt": "x" * chance.randint(1, 60), "max_tokens": chance.randint(1, 80)}
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == 200:
                used.num_requests += 1
                used.num_tokens += answer.json()["usage"]["total_tokens"]
                continue
            assert answer.status_code == 429, answer.text
            num_refusals += 1
            await asyncio.sleep(PAUSE_SECONDS)


async def billed(machines: list[Machine], tenant: Tenant) -> tuple[int, int]:
    """(requests, tokens) in the books; a gateway that is asked for sums writes first what it settled."""
    found: Any = {}
    for machine in machines:
        async with admin_of(machine) as admin:
            answer = await admin.get("/admin/v1/usage", params={"tenant_id": tenant.id})
            (found,) = answer.json()["data"]
    return found["num_requests"], found["num_prompt_tokens"] + found["num_completion_tokens"]
