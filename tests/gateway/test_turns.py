"""Parts of one request take turns in the engine, in order, within the request's time."""

from __future__ import annotations

import asyncio

import pytest

from loraplex.config.settings import EngineSettings
from loraplex.engines.errors import DeadlineExceeded
from loraplex.engines.protocol import GenerateRequest, SamplingParams
from loraplex.gateway.turns import Turns, parts_at_once


@pytest.mark.parametrize(("max_running", "max_waiting", "most"), [(64, 1024, 64), (256, 100, 50), (8, 1, 1)])
def test_no_request_brings_more_at_once_than_the_queue_takes(max_running: int, max_waiting: int, most: int) -> None:
    assert parts_at_once(EngineSettings(max_running=max_running, max_waiting=max_waiting)) == most


def part(timeout_seconds: float | None) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=1)
    return GenerateRequest(request_id="a", prompt_token_ids=(1,), sampling=sampling, timeout_seconds=timeout_seconds)


async def test_part_that_waits_has_what_is_left_of_the_time() -> None:
    turns, given = Turns(at_once=1), []

    async def take(timeout_seconds: float | None) -> None:
        async with turns.turn(part(timeout_seconds)) as mine:
            given.append(mine.timeout_seconds)
            await asyncio.sleep(0.05)

    await asyncio.gather(take(9.0), take(9.0), take(None))
    first, second, third = given
    assert (first, third) == (9.0, None)
    assert second is not None
    assert 8.0 < second <= 8.95


async def test_part_whose_time_is_over_before_its_turn_fails() -> None:
    turns = Turns(at_once=1)

    async def late() -> None:
        async with turns.turn(part(0.01)):
            raise AssertionError("it has no time left")

    async with turns.turn(part(None)):
        waiting = asyncio.create_task(late())
        await asyncio.sleep(0.05)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
        await waiting
    async with turns.turn(part(None)) as free:
        assert free.timeout_seconds is None
