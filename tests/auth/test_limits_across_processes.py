"""Four processes on one Redis hold one tenant's limits together: never passed, and used to within 1 %."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from typing import Any

import pytest
from support.services import REDIS, own_redis

NUM_PROCESSES = 4

# Time stands still, so that no rate refills. Each asks until it has been refused for good, and uses half of what it
# reserved of the answer.
WORKER = """
import asyncio, json, random, sys
import msgspec
from redis.asyncio import Redis
from loraplex.auth.caller import Caller
from loraplex.auth.errors import LimitReached
from loraplex.auth.limits.admission import Admission
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.limits.shared import RedisStore
from loraplex.auth.metering import Demand, NoBooks

async def main(url, tenant, limits, seed):
    store = RedisStore(Redis.from_url(url), NoBooks(), clock=lambda: 1_800_014_400.0)
    admission, chance = Admission(store), random.Random(seed)
    policy = Policy(tenant=msgspec.convert(limits, Limits))
    caller = Caller(tenant_id=tenant, tenant_name="t", key_id=f"key_{seed}", role="inference", policy=policy)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    requests = tokens = refusals = 0
    while refusals < 20:
        prompt, answer = chance.randint(1, 6), chance.randint(1, 6)
        demand = Demand(request_id=f"{seed}-{requests}", trace_id="-", route="/", model="m", adapter_id="",
                        num_prompt_tokens=prompt, max_completion_tokens=answer)
        try:
            reservation = await admission.reserve(caller, demand)
        except LimitReached:
            refusals += 1
            await asyncio.sleep(0.1)  # others give back what they leased
            continue
        used = answer // 2
        reservation.settle(prompt, used)
        requests, tokens = requests + 1, tokens + prompt + used
    await admission.close()
    print(json.dumps({"requests": requests, "tokens": tokens}), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])))
"""


async def used_together(limits: dict[str, int]) -> list[dict[str, int]]:
    """What each of the processes was let have."""
    redis = await own_redis()
    tenant = f"tenant_{secrets.token_hex(8)}"
    pipes: dict[str, Any] = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    processes = []
    try:
        for seed in range(NUM_PROCESSES):
            arguments = [sys.executable, "-c", WORKER, REDIS, tenant, json.dumps(limits), str(seed)]
            processes.append(await asyncio.create_subprocess_exec(*arguments, **pipes))
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        ends = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
        assert [process.returncode for process in processes] == [0] * NUM_PROCESSES
        return [json.loads(out) for out, _ in ends]
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if keys := await redis.keys(f"loraplex:{{{tenant}}}*"):
            await redis.delete(*keys)
        await redis.aclose()


@pytest.mark.parametrize(("limit", "counted"), [("requests_per_minute", "requests"), ("tokens_per_day", "tokens")])
@pytest.mark.parametrize("size", [4_000, pytest.param(200_000, marks=pytest.mark.slow)])
async def test_four_processes_hold_one_limit_within_1_percent(limit: str, counted: str, size: int) -> None:
    used = [told[counted] for told in await used_together({limit: size})]
    assert 0.99 * size <= sum(used) <= size
    assert all(used), "each of the processes had a part"


async def test_four_processes_hold_a_rate_and_a_budget_together() -> None:
    """The tighter one is used up, and the other is not passed."""
    used = await used_together({"requests_per_minute": 100_000, "tokens_per_day": 5_000, "tokens_per_month": 4_000})
    assert 0.99 * 4_000 <= sum(told["tokens"] for told in used) <= 4_000
