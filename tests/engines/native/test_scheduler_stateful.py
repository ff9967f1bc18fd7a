"""Whatever comes in whatever order: no block leaks, nobody starves, fairness holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.bench import BLOCK, Bench, place

from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST
from loraplex.engines.native.sequence import Sequence

ADAPTERS = {"a": 30, "b": 45, "c": 60, "d": 20}  # id -> elements; the arena has 100
NUM_BLOCKS = 12
BUDGET = 13
MAX_RUNNING = 4


class AnyOrder(RuleBasedStateMachine):
    """Requests, steps, aborts, and adapters that come, go and are pinned, as the engine's core does it."""

    num_drafts = 0
    newcomers_alone = False

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(NUM_BLOCKS, BUDGET, MAX_RUNNING, self.num_drafts, newcomers_alone=self.newcomers_alone)
        self.scheduler, self.residency = self.bench.scheduler, self.bench.residency
        self.aborted: set[Sequence] = set()
        self.computed: Counter[str] = Counter()

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 15),
        adapter=st.sampled_from([None, None, *ADAPTERS]),
        tenant=st.sampled_from("xyz"),
        priority=st.integers(0, 2),
        same_prompt=st.booleans(),
    )
    def submit(self, num_prompt: int, max_tokens: int, **more: Any) -> None:
        self.bench.add(num_prompt, max_tokens, **more)

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._poll()
            taken = self.bench.step()
            assert sum(taken.values()) <= BUDGET
            assert len(taken) <= MAX_RUNNING
            self.bench.now += 0.1

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._unfinished()))
        self.scheduler.remove(sequence)
        self.aborted.add(sequence)
        assert sequence.block_table == []

    @rule(adapter=st.sampled_from(list(ADAPTERS)), pinned=st.booleans())
    def pin(self, adapter: str, pinned: bool) -> None:
        others = sum(ADAPTERS[other] for other in ADAPTERS if other != adapter and self.residency.is_pinned(other))
        if adapter in self.residency and not (pinned and others):  # two pinned ones could shut a third out for ever
            self.residency.pin(adapter, pinned=pinned)

    @rule(adapter=st.sampled_from(list(ADAPTERS)))
    def unload(self, adapter: str) -> None:
        if adapter in self.residency and not self.residency.is_running(adapter):
            self.residency.drop(adapter)

    @invariant()
    def blocks_are_held_by_those_that_run_and_shared_only_between_equals(self) -> None:
        held: dict[int, list[tuple[Sequence, int]]] = defaultdict(list)
        for sequence in self.bench.sequences:
            assert not sequence.block_table or sequence in self.scheduler.running
            assert len(sequence.block_table) * BLOCK >= sequence.num_computed or sequence not in self._unfinished()
            for number, block in enumerate(sequence.block_table):
                held[block].append((sequence, number))
        assert self.bench.blocks.num_used == len(held)
        for holders in held.values():
            if len(holders) > 1:
                ends = {BLOCK * (place + 1) for _, place in holders}
                assert len(ends) == 1
                end = ends.pop()
                assert len({(s.adapter_ids, s.request.tenant, *s.token_ids[:end]) for s, _ in holders}) == 1

    @invariant()
    def extents_are_exact_disjoint_and_inside_the_arena(self) -> None:
        present = [adapter for adapter in ADAPTERS if adapter in self.residency]
        extents = sorted((self.residency.extent(adapter).offset, ADAPTERS[adapter]) for adapter in present)
        for (offset, size), (following, _) in pairwise([*extents, (100, 0)]):
            assert 0 <= offset <= offset + size <= following
        assert self.residency.num_used == sum(size for _, size in extents)

    @invariant()
    def those_that_run_have_their_adapter(self) -> None:
        running = self.scheduler.running
        assert len(running) == len(set(running)) <= MAX_RUNNING
        for adapter in ADAPTERS:
            needed = any(adapter in sequence.adapter_ids for sequence in running)
            assert self.residency.is_running(adapter) == needed

    def teardown(self) -> None:
        """Whatever happened, everything ends: nobody starves, and nothing is left behind."""
        for adapter in ADAPTERS:
            if adapter in self.residency:
                self.residency.pin(adapter, pinned=False)
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self._poll()
            self.bench.step()
            self.bench.now += 0.1
        assert not self.scheduler.has_work
        assert self.bench.blocks.num_used == 0
        for sequence in self.bench.sequences:
            wanted = sequence.request.sampling.max_tokens
            room = NUM_BLOCKS * BLOCK - sequence.num_prompt_tokens
            assert sequence.num_generated == min(wanted, room) or sequence in self.aborted
            answer = sequence.token_ids[sequence.num_prompt_tokens :]
            assert answer == [self.bench.answer(place) for place in range(len(answer))]

    def _unfinished(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _poll(self) -> None:
        """Bring the adapters of waiting sequences, first come first, where there is room for them."""
        protected: set[str] = set()
        for adapter in dict.fromkeys(id for s in self.scheduler.waiting for id in s.adapter_ids):
            if self._is_placed(adapter, protected):
                protected.add(adapter)

    def _is_placed(self, adapter: str, protected: set[str]) -> bool:
        while adapter not in self.residency:
            room = place(self.residency, adapter, ADAPTERS[adapter], protected)
            if room is None:
                return False
        return True


class AnyOrderWithDrafts(AnyOrder):
    num_drafts = 5


class AnyOrderWithNewcomersAlone(AnyOrder):
    newcomers_alone = True


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrderWithDrafts = AnyOrderWithDrafts.TestCase
TestAnyOrderWithDrafts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrderWithNewcomersAlone = AnyOrderWithNewcomersAlone.TestCase
TestAnyOrderWithNewcomersAlone.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 20), st.integers(1, 12), st.integers(0, 4), st.integers(1, 6)),
        min_size=10, max_size=60,
    ),
    weight=st.sampled_from([1.0, 3.0]),
    newcomers_alone=st.booleans(),
)  # fmt: skip
def test_fairness_bound_holds_in_any_interval_in_which_both_wait(
    arrivals: list[tuple[str, int, int, int, int]], weight: float, newcomers_alone: bool
) -> None:
    """Theorem 4.2 of the paper: |W_a - W_b| <= 2U there, U = max(cost of the longest prompt, of a full batch)."""
    bench = Bench(num_blocks=200, budget=24, max_running=4, newcomers_alone=newcomers_alone)
    bound = 2 * max(INPUT_COST * 20, OUTPUT_COST * 4 * 12)
    served: Counter[str] = Counter()
    differences: list[float] = []

    def step() -> None:
        before = {s: (s.was_admitted, s.num_generated) for s in bench.sequences}
        bench.step()
        for sequence, (was_admitted, generated) in before.items():
            cost = OUTPUT_COST * (sequence.num_generated - generated)
            cost += INPUT_COST * sequence.num_prompt_tokens * (sequence.was_admitted and not was_admitted)
            served[sequence.request.tenant] += cost / sequence.request.weight  # type: ignore[assignment]
        if {sequence.request.tenant for sequence in bench.scheduler.waiting} == {"a", "b"}:
            differences.append(served["a"] - served["b"])
            assert max(differences) - min(differences) <= bound
        else:
            differences.clear()

    for tenant, num_prompt, max_tokens, pause, burst in arrivals:
        for _ in range(burst):
            bench.add(num_prompt, max_tokens, tenant=tenant, weight=weight if tenant == "b" else 1.0)
        for _ in range(pause):
            step()
    while bench.scheduler.has_work:
        step()
