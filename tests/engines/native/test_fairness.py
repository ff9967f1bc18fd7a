"""The order of service against the plainest form of it, whatever comes in between."""

from __future__ import annotations

import random
from typing import cast

import pytest

from loraplex.engines.native.fairness import FairQueue, Lane
from loraplex.engines.native.sequence import Constraint, Sequence
from loraplex.engines.protocol import GenerateRequest, Grammar, SamplingParams


class Plain:
    """Whoever waits, in lists; each question goes through all of them."""

    def __init__(self, fair: FairQueue) -> None:
        self.fair = fair
        self.queues: dict[Lane, list[Sequence]] = {}

    def add(self, sequence: Sequence) -> None:
        queue = self.queues.setdefault(lane_of(sequence), [])
        lower = (at for at, other in enumerate(queue) if other.request.priority < sequence.request.priority)
        queue.insert(next(lower, len(queue)), sequence)

    def put_back(self, sequence: Sequence) -> None:
        self.queues.setdefault(lane_of(sequence), []).insert(0, sequence)

    def remove(self, sequence: Sequence) -> None:
        lane = lane_of(sequence)
        self.queues[lane].remove(sequence)
        if not self.queues[lane]:
            del self.queues[lane]

    def first(self, skipped: set[Sequence]) -> Sequence | None:
        def rank(lane: Lane) -> tuple[bool, float, int]:
            served = self.fair.counter(lane.tenant, is_background=lane.is_background)
            return lane.is_background, served, len(self.queues[lane])

        in_turn = (sequence for lane in sorted(self.queues, key=rank) for sequence in self.queues[lane])
        return next((sequence for sequence in in_turn if sequence.is_ready and sequence not in skipped), None)


def lane_of(sequence: Sequence) -> Lane:
    return Lane(sequence.request.is_background, sequence.request.tenant)


def arrive(chance: random.Random, number: int) -> Sequence:
    grammar = Grammar(kind="regex", source="a") if chance.random() < 0.5 else None
    request = GenerateRequest(
        request_id=str(number),
        prompt_token_ids=(1,) * chance.randint(1, 9),
        sampling=SamplingParams(max_tokens=1, grammar=grammar),
        tenant=chance.choice("xyz"),
        weight=chance.choice([1.0, 3.0]),
        priority=chance.randint(0, 2),
        is_background=chance.random() < 0.2,
    )
    return Sequence(request=request, seed=0, eos_token_ids=frozenset(), arrival=float(number), max_len=99)


def walk(chance: random.Random, fair: FairQueue, plain: Plain) -> list[Sequence]:
    """One admission: some are started, others left waiting; those started."""
    started: list[Sequence] = []
    skipped: set[Sequence] = set()
    for sequence in fair.in_turn():
        assert sequence is plain.first(skipped)
        if chance.random() < 0.1:
            return started
        if chance.random() < 0.5:
            skipped.add(sequence)
            continue
        fair.remove(sequence)
        plain.remove(sequence)
        fair.charge(sequence, sequence.num_prompt_tokens * chance.randint(0, 1))
        started.append(sequence)
    assert plain.first(skipped) is None
    return started


@pytest.mark.parametrize("seed", range(20))
def test_turns_are_those_of_the_plainest_form(seed: int) -> None:
    chance = random.Random(seed)
    fair = FairQueue()
    plain = Plain(fair)
    running: list[Sequence] = []
    for number in range(300):
        sequence = arrive(chance, number)
        fair.add(sequence)
        plain.add(sequence)
        waiting = [sequence for queue in plain.queues.values() for sequence in queue]
        unready = [sequence for sequence in waiting if not sequence.is_ready]
        if unready and chance.random() < 0.4:
            sequence = chance.choice(unready)
            sequence.constraint = cast("Constraint", object())
            fair.make_ready(sequence)
        if chance.random() < 0.1:
            sequence = chance.choice(waiting)
            fair.remove(sequence)
            plain.remove(sequence)
        if running and chance.random() < 0.2:
            sequence = running.pop()
            fair.put_back(sequence)
            plain.put_back(sequence)
        if chance.random() < 0.3:
            running += walk(chance, fair, plain)
        assert len(fair) == sum(len(queue) for queue in plain.queues.values())
        assert {*fair} == {sequence for queue in plain.queues.values() for sequence in queue}
        assert fair.first() is plain.first(set())


def test_those_that_are_not_ready_count_where_requests_are_shed() -> None:
    chance, fair = random.Random(0), FairQueue()
    sequences = [arrive(chance, number) for number in range(30)]
    for sequence in sequences:
        fair.add(sequence)
    while (victim := fair.last_of_the_longest()) is not None:
        fair.remove(victim)
    assert len(fair) == 0
    assert fair.first() is None
