"""Who is in a step: budgets, chunks, blocks, preemption, cold adapters. No weights anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import BLOCK, Bench, place

from loraplex.engines.native.blocks import next_key, root_key
from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST
from loraplex.engines.native.residency import Room
from loraplex.engines.native.sequence import Sequence


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(budget=16)
    bench.add(40, max_tokens=2)
    assert [bench.step() for _ in range(5)] == [{"1": 16}, {"1": 16}, {"1": 8}, {"1": 1}, {}]


def test_decodes_are_served_before_a_long_prompts_chunk() -> None:
    bench = Bench(budget=16)
    bench.add(4, max_tokens=10)
    bench.step()
    bench.add(40)
    assert bench.step() == {"1": 1, "2": 15}
    assert bench.step() == {"1": 1, "2": 15}
    assert bench.step() == {"1": 1, "2": 10}


def test_blocks_run_out_youngest_is_preempted_and_computed_again() -> None:
    bench = Bench(num_blocks=4, budget=16)
    old, young = bench.add(7, max_tokens=6), bench.add(7, max_tokens=6)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert bench.scheduler.running == [old]
    assert young.num_computed == 0
    assert young.num_generated > 0
    while bench.scheduler.has_work:
        bench.step()
    assert (old.num_generated, young.num_generated) == (6, 6)
    assert bench.blocks.num_used == 0


def test_cold_adapter_waits_without_delaying_those_behind_it() -> None:
    bench = Bench()
    bench.add(4, adapter="cold")
    bench.add(4)
    assert bench.step() == {"2": 4}


def test_cold_adapter_past_patience_nothing_behind_it_is_admitted() -> None:
    bench = Bench()
    bench.add(4, adapter="cold")
    bench.now += 3.0
    bench.add(4)
    bench.residency.lacking.add("cold")
    assert bench.step() == {}
    place(bench.residency, "cold", 10)
    assert bench.step() == {"1": 4, "2": 4}


def test_cold_adapter_past_patience_delays_nobody_while_it_lacks_no_room() -> None:
    bench = Bench()
    bench.add(4, adapter="cold")
    bench.now += 3.0
    bench.add(4)
    assert bench.step() == {"2": 4}


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from("xyz"), st.integers(0, 3)),
        min_size=20, max_size=20,
    ),
    tenant=st.sampled_from("xyz"),
)  # fmt: skip
def test_cold_adapter_begins_in_bounded_time_however_others_come(
    arrivals: list[tuple[int, int, str, int]], tenant: str
) -> None:
    """Of two adapters that do not fit together one is asked for again and again, by everybody and for ever.

    Steps of 0.1 s: 21 of patience; then its tenant's turn, before which each of the two others may catch up on twice
    the cost of a full batch, 8 a step at least; then at most 16 until the longest of those that run is over.
    """
    bound = 21 + 2 * round(2 * OUTPUT_COST * 4 * 12 / 8) + 16
    bench = Bench(num_blocks=200, budget=24, max_running=4)
    place(bench.residency, "warm", 60)
    bench.add(8, max_tokens=12, adapter="warm")
    bench.step()
    cold = bench.add(8, max_tokens=2, adapter="cold", tenant=tenant)
    for num_steps, (num_prompt, max_tokens, other, count) in enumerate(cycle(arrivals), start=1):
        for _ in range(count):
            bench.add(num_prompt, max_tokens, adapter="warm", tenant=other)
        place(bench.residency, "cold", 60)
        bench.step()
        bench.now += 0.1
        if cold.was_admitted:
            break
        assert num_steps <= bound


def test_queue_seconds_are_those_until_the_first_admission_and_stay() -> None:
    bench = Bench(num_blocks=4, budget=16)
    old, young = bench.add(7, max_tokens=6, adapter="cold"), bench.add(7, max_tokens=6)
    bench.now = young.arrival + 0.5
    bench.step()
    assert old.queue_seconds is None
    assert young.queue_seconds == pytest.approx(0.5)
    bench.now = old.arrival + 1.5
    place(bench.residency, "cold", 10)
    while bench.scheduler.has_work:
        bench.step()
        bench.now += 1.0
    assert bench.scheduler.num_preemptions
    assert [sequence.queue_seconds for sequence in (old, young)] == pytest.approx([1.5, 0.5])


def test_running_sequence_holds_its_adapter_until_it_ends() -> None:
    bench = Bench()
    place(bench.residency, "a", 60)
    bench.add(4, max_tokens=2, adapter="a")
    bench.step()
    assert place(bench.residency, "b", 60) is None
    bench.step()
    assert place(bench.residency, "b", 60) == Room(("a",))


def test_prompt_begun_before_is_found_in_the_cache() -> None:
    bench = Bench()
    bench.add(11, max_tokens=1, same_prompt=True)
    bench.step()
    again = bench.add(11, max_tokens=1, same_prompt=True)
    assert bench.step() == {"2": 3}
    assert again.num_cached_tokens == 8


def test_prompt_wholly_cached_still_computes_its_last_token() -> None:
    bench = Bench()
    bench.add(8, max_tokens=4, same_prompt=True)
    bench.step()
    bench.add(8, same_prompt=True)
    assert bench.step() == {"1": 1, "2": 4}


def test_cache_is_not_shared_across_tenants_or_adapters() -> None:
    bench = Bench()
    place(bench.residency, "a", 10)
    bench.add(12, max_tokens=1, same_prompt=True, tenant="one")
    bench.step()
    bench.add(12, max_tokens=1, same_prompt=True, tenant="two")
    bench.add(12, max_tokens=1, same_prompt=True, tenant="one", adapter="a")
    assert sum(bench.step().values()) + sum(bench.step().values()) == 24


def test_cache_gives_way_least_recently_released_first() -> None:
    bench = Bench(num_blocks=6)
    for _ in range(2):
        bench.add(8, max_tokens=1)
        bench.step()
    assert bench.blocks.num_cached == 4
    bench.add(16, max_tokens=1)
    bench.step()
    assert bench.blocks.num_cached == 6
    assert bench.blocks.share(root_block_keys(1, 8)) == []
    assert len(bench.blocks.share(root_block_keys(2, 8))) == 2


def root_block_keys(count: int, num_prompt: int) -> list[bytes]:
    """The keys of the prompt of the count-th request of a bench."""
    tokens = range(1000 * count, 1000 * count + num_prompt)
    keys = [root_key(None, "", "")]
    for start in range(0, num_prompt, BLOCK):
        keys.append(next_key(keys[-1], tokens[start : start + BLOCK]))
    return keys[1:]


def test_tenant_with_one_request_goes_before_a_queue_of_another() -> None:
    bench = Bench(budget=8, max_running=2)
    for _ in range(10):
        bench.add(8, max_tokens=2, tenant="noisy")
    bench.step()
    quiet = bench.add(8, max_tokens=2, tenant="quiet")
    while quiet.num_generated == 0:
        bench.step()
    assert sum(sequence.was_admitted for sequence in bench.sequences if sequence.request.tenant == "noisy") <= 2


def test_priority_goes_first_within_a_tenant() -> None:
    bench = Bench(budget=4, max_running=1)
    bench.add(4, max_tokens=1)
    bench.add(4, max_tokens=1, priority=5)
    assert [bench.step(), bench.step()] == [{"2": 4}, {"1": 4}]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 20), st.integers(1, 12)),
        min_size=120, max_size=120,
    ),
    weight=st.sampled_from([1.0, 3.0]),
    newcomers_alone=st.booleans(),
)  # fmt: skip
def test_backlogged_tenants_services_stay_within_the_papers_bound(
    sizes: list[tuple[int, int, int, int]], weight: float, newcomers_alone: bool
) -> None:
    """|W_a/w_a - W_b/w_b| <= 2 max(input cost of one prompt, output cost of a full batch), at every step."""
    bench = Bench(num_blocks=200, budget=24, max_running=4, newcomers_alone=newcomers_alone)
    for a_prompt, a_tokens, b_prompt, b_tokens in sizes:
        bench.add(a_prompt, a_tokens, tenant="a")
        bench.add(b_prompt, b_tokens, tenant="b", weight=weight)
    bound = 2 * max(INPUT_COST * 20, OUTPUT_COST * 4 * 12)
    while {sequence.request.tenant for sequence in bench.scheduler.waiting} == {"a", "b"}:
        assert bench.step(), "there is work and room, and nothing ran"
        assert abs(bench.scheduler.waiting.counter("a") - bench.scheduler.waiting.counter("b")) <= bound


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5), st.booleans(), st.sampled_from("xyz")),
        min_size=1,
        max_size=25,
    ),
    num_blocks=st.integers(11, 24),
    budget=st.integers(1, 24),
    aborts=st.sets(st.integers(1, 25)),
)
def test_any_arrivals_every_request_ends_once_and_no_block_leaks(
    arrivals: list[tuple[int, int, int, bool, str]], num_blocks: int, budget: int, aborts: set[int]
) -> None:
    bench = Bench(num_blocks=num_blocks, budget=budget, max_running=4)
    sequences: list[Sequence] = []
    for num_prompt, max_tokens, pause, same_prompt, tenant in arrivals:
        sequences.append(bench.add(num_prompt, max_tokens, same_prompt=same_prompt, tenant=tenant))
        for _ in range(pause):
            assert sum(bench.step().values()) <= budget
        if bench.count in aborts and sequences[-1] in [*bench.scheduler.running, *bench.scheduler.waiting]:
            bench.scheduler.remove(sequences[-1])
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        assert bench.blocks.num_used == len(held)
        for block in (block for block, count in held.items() if count > 1):
            holders = [sequence for sequence in sequences if block in sequence.block_table]
            ends = {BLOCK * (sequence.block_table.index(block) + 1) for sequence in holders}
            assert len(ends) == 1
            end = ends.pop()
            assert len({tuple(sequence.token_ids[:end]) for sequence in holders}) == 1
            assert len({sequence.request.tenant for sequence in holders}) == 1
    for _ in range(4000):
        if not bench.scheduler.has_work:
            break
        bench.step()
    assert not bench.scheduler.has_work
    assert bench.blocks.num_used == 0
    for number, (sequence, (_, max_tokens, *_)) in enumerate(zip(sequences, arrivals, strict=True), start=1):
        assert sequence.num_generated == max_tokens or number in aborts


def test_background_waits_until_no_tenant_has_anything_else() -> None:
    bench = Bench(budget=4, max_running=8)
    bench.add(4, max_tokens=1, tenant="a", is_background=True, priority=100)
    bench.add(4, max_tokens=1, tenant="a")
    bench.add(4, max_tokens=1, tenant="b")
    assert [bench.step() for _ in range(3)] == [{"2": 4}, {"3": 4}, {"1": 4}]


def test_background_is_not_held_against_its_tenants_other_requests() -> None:
    bench = Bench(budget=8)
    for _ in range(4):
        bench.add(8, max_tokens=1, tenant="a", is_background=True)
        bench.step()
    bench.add(8, max_tokens=1, tenant="b")
    bench.add(8, max_tokens=1, tenant="a")
    assert bench.scheduler.waiting.counter("a") == bench.scheduler.waiting.counter("b") == 0
    assert bench.scheduler.waiting.counter("a", is_background=True) == 4 * (8 * INPUT_COST + OUTPUT_COST)


def test_background_of_two_tenants_is_served_in_turn() -> None:
    bench = Bench(budget=4)
    for tenant in "aaabb":
        bench.add(4, max_tokens=1, tenant=tenant, is_background=True)
    assert [bench.step() for _ in range(5)] == [{"4": 4}, {"1": 4}, {"5": 4}, {"2": 4}, {"3": 4}]


def test_background_makes_way_where_every_place_is_taken_and_loses_no_token() -> None:
    bench = Bench(max_running=2)
    first, second = (bench.add(4, max_tokens=6, is_background=True) for _ in range(2))
    bench.step()
    user = bench.add(4, max_tokens=2, tenant="b")
    bench.step()
    assert bench.scheduler.running == [first, user]
    while bench.scheduler.has_work:
        bench.step()
    assert (first.num_generated, second.num_generated, user.num_generated) == (6, 6, 2)
    assert bench.blocks.num_used == 0


def test_background_makes_way_where_blocks_are_short() -> None:
    bench = Bench(num_blocks=4, budget=32)
    bench.add(12, max_tokens=4, is_background=True)
    bench.step()
    user = bench.add(8, max_tokens=2)
    bench.step()
    assert bench.scheduler.running == [user]


def test_background_never_preempts_anything() -> None:
    bench = Bench(max_running=1)
    user = bench.add(4, max_tokens=4)
    bench.step()
    bench.add(4, is_background=True)
    bench.step()
    assert bench.scheduler.running == [user]
    assert bench.scheduler.num_preemptions == 0


def test_long_prompt_among_running_streams_costs_them_no_step() -> None:
    """8,000 tokens arrive among 16 streams: each gets its token in every step, and no step exceeds the budget."""
    bench = Bench(num_blocks=4000, budget=512, max_running=32)
    streams = [bench.add(8, max_tokens=200) for _ in range(16)]
    bench.step()
    long = bench.add(8000, max_tokens=1)
    chunks = []
    while long.num_generated == 0:
        before = [stream.num_generated for stream in streams]
        computed = bench.step()
        assert [stream.num_generated for stream in streams] == [count + 1 for count in before]
        assert sum(computed.values()) <= 512
        chunks.append(computed[long.request_id])
    assert chunks == [496] * 16 + [64]
