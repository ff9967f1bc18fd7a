"""Whose turn it is: weighted virtual token counters (VTC, "Fairness in Serving Large Language Models", OSDI'24).

Each tenant's counter grows with the service it gets, divided by its weight; the waiting tenant with the smallest
counter goes next. A tenant that comes back after a pause is lifted to the smallest counter of those waiting, so that
idleness saves up no claim. Between two tenants that both always wait, service differs by at most twice the cost of the
largest batch (theorem 4.2 there), and nobody waits while there is room: the order is fair, the work is conserved.

Work in the background goes after everybody's other requests. Among itself it is as fair, and it is counted apart: what
a tenant had of a machine that was idle is not held against its users.

A request that is not ready, as its grammar is still being compiled, waits like the others, but has no turn: a step does
not look at it, however many there are.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from loraplex.engines.native.sequence import Sequence

INPUT_COST = 1.0  # a prompt token, as in the paper
OUTPUT_COST = 2.0  # a generated one


class Lane(NamedTuple):
    """Those who are served in turn with one another's: a tenant's requests, or its work in the background."""

    is_background: bool
    tenant: str


class FairQueue:
    """Waiting sequences by lane. Within a lane: higher priority first, then in order of arrival."""

    def __init__(self) -> None:
        self._queues: dict[Lane, deque[Sequence]] = {}
        self._ready: dict[Lane, list[Sequence]] = {}  # those of a queue that are, unless that has to be found anew
        self._counters: dict[Lane, float] = {}
        self._last_active: dict[bool, Lane] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._queues.get(_lane(sequence), ())

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of service, as far as it can be foreseen: one of each tenant in turn, least served first."""
        for is_background in (False, True):
            lanes = [lane for lane in sorted(self._queues, key=self._rank) if lane.is_background == is_background]
            queues = [deque(self._queues[lane]) for lane in lanes]
            while queues:
                for queue in queues:
                    yield queue.popleft()
                queues = [queue for queue in queues if queue]

    def add(self, sequence: Sequence) -> None:
        """A request arrived."""
        lane = _lane(sequence)
        if lane not in self._queues:
            self._lift(lane)
            self._queues[lane] = deque()
        queue = self._queues[lane]
        lower = (at for at, other in enumerate(queue) if other.request.priority < sequence.request.priority)
        queue.insert(next(lower, len(queue)), sequence)
        if sequence.is_ready:
            self.make_ready(sequence)

    def make_ready(self, sequence: Sequence) -> None:
        """A waiting sequence has what it needs from now on, and its turn at the place it had."""
        self._ready.pop(_lane(sequence), None)

    def in_turn(self) -> Iterator[Sequence]:
        """Those that are ready, as their turns come: each once, whether it is then removed or left waiting.

        Counters may grow meanwhile; what comes in is in the next walk only.
        """
        lanes = [(self._rank(lane), number, lane) for number, lane in enumerate(self._queues) if self._ready_of(lane)]
        heapq.heapify(lanes)
        left: dict[Lane, Iterator[Sequence]] = {}
        while lanes:
            rank, number, lane = lanes[0]
            if lane not in left:
                left[lane] = iter(tuple(self._ready_of(lane)))
            if (sequence := next(left[lane], None)) is None:
                heapq.heappop(lanes)
                continue
            yield sequence
            if lane in self._queues and (new_rank := self._rank(lane)) != rank:
                heapq.heapreplace(lanes, (new_rank, number, lane))

    def first(self) -> Sequence | None:
        """Whose turn it is; None where nobody is ready."""
        return next(self.in_turn(), None)

    def last_of_the_longest(self) -> Sequence | None:
        """Of the tenant with most requests waiting, the one that comes last of those not begun; None without any.

        Between tenants with as many, the newest request goes; what is in the background goes before anything else.
        """
        queues = [(lane.is_background, len(queue), queue[-1].arrival, queue) for lane, queue in self._queues.items()]
        for *_, queue in sorted(queues, key=lambda ranked: ranked[:3], reverse=True):
            for sequence in reversed(queue):
                if not sequence.was_admitted:
                    return sequence
        return None

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence: first of its tenant again."""
        lane = _lane(sequence)
        self._queues.setdefault(lane, deque()).appendleft(sequence)
        self.make_ready(sequence)
        self._counters.setdefault(lane, 0.0)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if it does not wait here."""
        lane = _lane(sequence)
        if sequence not in self:
            raise ValueError(f"{sequence.request_id} is not waiting")
        self._queues[lane].remove(sequence)
        if sequence in (ready := self._ready.get(lane, [])):
            ready.remove(sequence)
        if not self._queues[lane]:
            del self._queues[lane]
            self._ready.pop(lane, None)
            self._last_active[lane.is_background] = lane

    def charge(self, sequence: Sequence, cost: float) -> None:
        """Count service, in cost units, for the sequence's lane."""
        lane = _lane(sequence)
        self._counters[lane] = self._counters.get(lane, 0.0) + cost / sequence.request.weight

    def counter(self, tenant: str, *, is_background: bool = False) -> float:
        return self._counters.get(Lane(is_background, tenant), 0.0)

    def _ready_of(self, lane: Lane) -> list[Sequence]:
        if lane not in self._ready:
            self._ready[lane] = [sequence for sequence in self._queues[lane] if sequence.is_ready]
        return self._ready[lane]

    def _rank(self, lane: Lane) -> tuple[bool, float, int]:
        """The foreground, least served first, then the background. Between equals the shorter queue."""
        return lane.is_background, self._counters[lane], len(self._queues[lane])

    def _lift(self, lane: Lane) -> None:
        peers = [self._counters[other] for other in self._queues if other.is_background == lane.is_background]
        last = self._last_active.get(lane.is_background)
        floor = min(peers) if peers else self._counters[last] if last else 0.0
        self._counters[lane] = max(self._counters.get(lane, 0.0), floor)


def _lane(sequence: Sequence) -> Lane:
    return Lane(sequence.request.is_background, sequence.request.tenant)
