"""Who is in a step: budgets, chunks, blocks, preemption, cold adapters. No weights anywhere."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.scheduler import Limits, Scheduler
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

BLOCK = 4


class Bench:
    """A scheduler with a clock set by hand; `step` plays a model that always answers token 1."""

    def __init__(self, num_blocks: int = 64, budget: int = 16, max_running: int = 8) -> None:
        self.now = 0.0
        self.blocks = BlockPool(num_blocks, BLOCK)
        self.residency = Residency(capacity=100)
        self.scheduler = Scheduler(Limits(budget, max_running), self.blocks, self.residency, lambda: self.now)
        self.count = 0

    def add(self, num_prompt: int, max_tokens: int = 4, adapter: str | None = None) -> Sequence:
        self.count += 1
        self.now += 0.001
        request = GenerateRequest(
            request_id=str(self.count),
            prompt_token_ids=tuple(range(2, 2 + num_prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            adapter=Adapter(id=adapter, name=adapter, path="") if adapter else None,
        )
        sequence = Sequence(
            request=request, seed=0, eos_token_ids=frozenset(), arrival=self.now, max_len=self.blocks.num_blocks * BLOCK
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[str, int]:
        """Tokens computed for each request in one step."""
        batch = self.scheduler.next()
        if batch is None:
            return {}
        self.scheduler.commit(batch, [1] * len(batch.sampling_segments))
        return {segment.sequence.request_id: segment.num_tokens for segment in batch.segments}


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
    assert bench.step() == {}
    bench.residency.place("cold", 10)
    assert bench.step() == {"1": 4, "2": 4}


def test_running_sequence_holds_its_adapter_until_it_ends() -> None:
    bench = Bench()
    bench.residency.place("a", 60)
    bench.add(4, max_tokens=2, adapter="a")
    bench.step()
    assert bench.residency.place("b", 60) is None
    bench.step()
    assert bench.residency.place("b", 60) == ["a"]


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=25),
    num_blocks=st.integers(11, 24),
    budget=st.integers(1, 24),
    aborts=st.sets(st.integers(1, 25)),
)
def test_any_arrivals_every_request_ends_once_and_no_block_leaks(
    arrivals: list[tuple[int, int, int]], num_blocks: int, budget: int, aborts: set[int]
) -> None:
    bench = Bench(num_blocks=num_blocks, budget=budget, max_running=4)
    sequences: list[Sequence] = []
    for num_prompt, max_tokens, pause in arrivals:
        sequences.append(bench.add(num_prompt, max_tokens))
        for _ in range(pause):
            assert sum(bench.step().values()) <= budget
        if bench.count in aborts and sequences[-1] in [*bench.scheduler.running, *bench.scheduler.waiting]:
            bench.scheduler.remove(sequences[-1])
        tables = Counter(block for sequence in sequences for block in sequence.block_table)
        assert set(tables.values()) <= {1}
        assert bench.blocks.num_used == len(tables)
    for _ in range(4000):
        if not bench.scheduler.has_work:
            break
        bench.step()
    assert not bench.scheduler.has_work
    assert bench.blocks.num_used == 0
    for number, (sequence, (_, max_tokens, _)) in enumerate(zip(sequences, arrivals, strict=True), start=1):
        assert sequence.num_generated == max_tokens or number in aborts
