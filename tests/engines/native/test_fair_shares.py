"""Tenants' shares of a full engine, counted in tokens and steps, never in seconds."""

from __future__ import annotations

import random

import pytest
from support.bench import Bench

from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST


@pytest.mark.parametrize("newcomers_alone", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_weights_of_1_to_3_give_service_of_1_to_3_under_saturation(seed: int, newcomers_alone: bool) -> None:
    """Within 5 %, of what the counters count: prompt tokens and, twice as dear, generated ones."""
    chance = random.Random(seed)
    bench = Bench(num_blocks=4000, budget=64, max_running=16, newcomers_alone=newcomers_alone)
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


def steps_to_first_token(num_prompt: int, num_noisy: int, num_steps_before: int) -> int:
    """Of one request of a quiet tenant, which comes after so many steps of the noisy one's."""
    chance = random.Random(1)
    bench = Bench(num_blocks=8000, budget=128, max_running=32)
    for _ in range(num_noisy):
        bench.add(chance.randint(4, 64), chance.randint(8, 64), tenant="noisy")
    for _ in range(num_steps_before):
        bench.step()
    quiet = bench.add(num_prompt, 4, tenant="quiet")
    num_steps = 0
    while quiet.num_generated == 0:
        bench.step()
        num_steps += 1
    return num_steps


@pytest.mark.parametrize(("num_prompt", "num_steps_alone"), [(8, 1), (128, 1), (512, 4)])
def test_one_request_beside_500_of_another_tenant_waits_at_most_twice_as_long(
    num_prompt: int, num_steps_alone: int
) -> None:
    """Whenever it comes: the other tenant's youngest running answer gives up its place at once."""
    assert steps_to_first_token(num_prompt, 0, 0) == num_steps_alone
    for num_steps_before in range(1, 160, 12):
        assert steps_to_first_token(num_prompt, 500, num_steps_before) <= 2 * num_steps_alone


def test_long_prompts_of_another_tenant_leave_a_share_of_each_step() -> None:
    """What a step has room for is shared evenly between the two, though the long prompt was there first."""
    bench = Bench(num_blocks=8000, budget=64, max_running=32)
    for _ in range(3):
        bench.add(6400, 4, tenant="noisy")
    for _ in range(10):
        assert bench.step() == {"1": 64}
    quiet = bench.add(64, 4, tenant="quiet")
    assert [bench.step(), bench.step()] == [{"1": 32, quiet.request_id: 32}] * 2
    assert quiet.num_generated == 1


def test_who_gave_up_its_place_goes_on_later_and_loses_nothing() -> None:
    bench = Bench(num_blocks=8000, budget=64, max_running=4)
    noisy = [bench.add(9, 20, tenant="noisy") for _ in range(6)]
    for _ in range(5):
        bench.step()
    quiet = bench.add(8, 2, tenant="quiet")
    assert bench.step() == {**{sequence.request_id: 1 for sequence in noisy[:3]}, quiet.request_id: 8}
    assert bench.scheduler.num_preemptions == 1
    while quiet.num_generated < 2:
        bench.step()
    assert bench.step()["4"] == 2  # of the 14 tokens it had, what no cached block holds
    while bench.scheduler.has_work:
        bench.step()
    assert [sequence.num_generated for sequence in noisy] == [20] * 6
    assert bench.blocks.num_used == 0


def test_newcomers_have_a_step_of_their_own_where_rows_cost_time() -> None:
    bench = Bench(num_blocks=8000, budget=64, max_running=8, newcomers_alone=True)
    for _ in range(3):
        bench.add(8, 20, tenant="noisy")
    assert bench.step() == {"1": 8, "2": 8, "3": 8}
    bench.add(8, 4, tenant="quiet")
    bench.add(8, 4, tenant="shy")
    assert bench.step() == {"4": 8, "5": 8}
    assert bench.step() == {str(number): 1 for number in range(1, 6)}
    bench.add(8, 4, tenant="noisy")
    assert bench.step() == {**{str(number): 1 for number in range(1, 6)}, "6": 8}


def test_newcomers_never_have_two_steps_in_a_row_and_none_for_a_part_of_a_prompt() -> None:
    bench = Bench(num_blocks=8000, budget=64, max_running=8, newcomers_alone=True)
    bench.add(8, 20, tenant="noisy")
    bench.step()
    bench.add(8, 4, tenant="a")
    assert bench.step() == {"2": 8}
    bench.add(8, 4, tenant="b")
    assert bench.step() == {"1": 1, "2": 1, "3": 8}
    bench.add(80, 4, tenant="c")
    assert bench.step() == {"1": 1, "2": 1, "3": 1, "4": 61}


def test_nobody_gives_up_its_only_place() -> None:
    bench = Bench(max_running=2)
    for tenant in "abc":
        bench.add(4, 4, tenant=tenant)
    bench.step()
    bench.step()
    assert [sequence.request.tenant for sequence in bench.scheduler.running] == ["a", "b"]
    assert bench.scheduler.num_preemptions == 0
