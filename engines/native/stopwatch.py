"""Where the time of a step goes. Costs two clock readings a phase."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.engines.protocol import SECONDS_BUCKETS, Durations


class Stopwatch:
    """Seconds by phase since the start."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began


class DurationCounts:
    """A histogram of durations over SECONDS_BUCKETS."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Durations:
        return Durations(counts=tuple(self._counts), seconds=self._total)
