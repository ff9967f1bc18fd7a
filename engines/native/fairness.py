"""Whose turn it is: weighted virtual token counters (VTC, "Fairness in Serving Large Language Models", OSDI'24).

Each tenant's counter grows with the service it gets, divided by its weight; the waiting tenant with the smallest
counter goes next. A tenant that comes back after a pause is lifted to the smallest counter of those waiting, so that
idleness saves up no claim. Between two tenants that both always wait, service differs by at most twice the cost of the
largest batch (theorem 4.2 there), and nobody waits while there is room: the order is fair, the work is conserved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set

from loraplex.engines.native.sequence import Sequence

INPUT_COST = 1.0  # a prompt token, as in the paper
OUTPUT_COST = 2.0  # a generated one


class FairQueue:
    """Waiting sequences by tenant. Within a tenant: higher priority first, then in order of arrival."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._counters: dict[str, float] = {}
        self._last_active = ""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._queues.get(sequence.request.tenant, ())

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of service, as far as it can be foreseen: one of each tenant in turn, least served first."""
        tenants = sorted(self._queues, key=lambda tenant: self._counters[tenant])
        queues = [deque(self._queues[tenant]) for tenant in tenants]
        while queues:
            for queue in queues:
                yield queue.popleft()
            queues = [queue for queue in queues if queue]

    def add(self, sequence: Sequence) -> None:
        """A request arrived."""
        tenant = sequence.request.tenant
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant] = deque()
        queue = self._queues[tenant]
        lower = (at for at, other in enumerate(queue) if other.request.priority < sequence.request.priority)
        queue.insert(next(lower, len(queue)), sequence)

    def first(self, skipped: Set[Sequence] = frozenset()) -> Sequence | None:
        """Whose turn it is, leaving out some; None where nobody is left."""
        for tenant in sorted(self._queues, key=self.counter):
            for sequence in self._queues[tenant]:
                if sequence not in skipped:
                    return sequence
        return None

    def last_of_the_longest(self) -> Sequence | None:
        """Of the tenant with most requests waiting, the one that comes last of those not begun; None without any.

        Between tenants with as many, the newest request goes.
        """
        for queue in sorted(self._queues.values(), key=lambda queue: (len(queue), queue[-1].arrival), reverse=True):
            for sequence in reversed(queue):
                if not sequence.was_admitted:
                    return sequence
        return None

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence: first of its tenant again."""
        self._queues.setdefault(sequence.request.tenant, deque()).appendleft(sequence)
        self._counters.setdefault(sequence.request.tenant, 0.0)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if it does not wait here."""
        tenant = sequence.request.tenant
        if sequence not in self:
            raise ValueError(f"{sequence.request_id} is not waiting")
        self._queues[tenant].remove(sequence)
        if not self._queues[tenant]:
            del self._queues[tenant]
            self._last_active = tenant

    def charge(self, sequence: Sequence, cost: float) -> None:
        """Count service, in cost units, for the sequence's tenant."""
        tenant = sequence.request.tenant
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost / sequence.request.weight

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def _lift(self, tenant: str) -> None:
        waiting = [self._counters[other] for other in self._queues]
        floor = min(waiting) if waiting else self._counters.get(self._last_active, 0.0)
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
