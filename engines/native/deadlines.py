"""Which requests have run out of time: before their first step, or altogether."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from loraplex.engines.native.sequence import Sequence


class Deadlines:
    """A heap of moments at which a request must be looked at. An id whose request ended is left in it until then."""

    def __init__(self, max_wait: float) -> None:
        """`max_wait` in seconds, from arrival to the first step."""
        self._max_wait = max_wait
        self._moments: list[tuple[float, str]] = []

    def add(self, sequence: Sequence) -> None:
        limit = sequence.request.timeout_seconds
        for seconds in [self._max_wait] if limit is None else [self._max_wait, limit]:
            heapq.heappush(self._moments, (sequence.arrival + seconds, sequence.request_id))

    def passed(self, now: float) -> Iterator[str]:
        """Ids of requests one of whose moments has passed, each moment once."""
        while self._moments and self._moments[0][0] <= now:
            yield heapq.heappop(self._moments)[1]
