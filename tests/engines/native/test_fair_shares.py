"""Tenants' shares of a full engine, counted in tokens and steps, never in seconds."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from support.bench import Bench

from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_1_to_3_give_service_of_1_to_3_under_saturation(seed: int) -> None:
    """Within 5 %, of what the counters count: prompt tokens and, twice as dear, generated ones."""
    chance = random.Random(seed)
    bench = Bench(num_blocks=4000, budget=64, max_running=16)
    for _ in range(600):
        bench.add(chance.randint(4, 40), chance.randint(4, 40), tenant="one")
        bench.add(chance.randint(4, 40), chance.randint(4, 40), tenant="three", weight=3.0)
    while {sequence.request.tenant for sequence in bench.scheduler.waiting} == {"one", "three"}:
        assert bench.step()
    service = {"one": 0.0, "three": 0.0}
    for sequence in bench.sequences:
        had = OUTPUT_COST * sequence.num_generated + INPUT_COST * sequence.num_prompt_tokens * sequence.was_admitted
        service[sequence.request.tenant] += had
    assert service["three"] / service["one"] == pytest.approx(3.0, rel=0.05)


def steps_to_first_token(num_noisy: int, num_steps_before: int) -> int:
    """Of one request of a quiet tenant, which comes after so many steps of the noisy one's."""
    chance = random.Random(1)
    bench = Bench(num_blocks=8000, budget=128, max_running=32)
    for _ in range(num_noisy):
        bench.add(chance.randint(4, 64), chance.randint(8, 64), tenant="noisy")
    for _ in range(num_steps_before):
        bench.step()
    quiet = bench.add(512, 4, tenant="quiet")
    num_steps = 0
    while quiet.num_generated == 0:
        bench.step()
        num_steps += 1
    return num_steps


def test_one_request_beside_500_of_another_tenant_waits_at_most_twice_as_long() -> None:
    """On average over when it comes: before it begins, one of the running answers has to end and give up its place."""
    alone = steps_to_first_token(0, 0)
    beside = [steps_to_first_token(500, steps) for steps in range(1, 160, 8)]
    assert alone == 4
    assert mean(beside) <= 2 * alone
    assert max(beside) <= 3 * alone
