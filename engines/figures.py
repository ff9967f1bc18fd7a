"""Histograms of durations, and how requests found their adapters in each tier: in all, and by some names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from loraplex.engines.stats import OTHERS, SECONDS_BUCKETS, AdapterTierStats, Durations, TierStats

Tier = Literal["disk", "host", "device"]


class DurationCounts:
    """A histogram of durations; `bounds` are its buckets' upper ends, in seconds."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS_BUCKETS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Durations:
        return Durations(counts=tuple(self._counts), seconds=self._total)


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    load_seconds: float = 0.0


@dataclass(slots=True)
class TierFigures:
    """One tier's. The first `max_names` adapters are told apart, all later ones are counted together."""

    tier: Tier
    max_names: int
    _all: _Counts = field(default_factory=_Counts)
    _by_name: dict[str, _Counts] = field(default_factory=dict)
    _durations: DurationCounts = field(default_factory=DurationCounts)

    def found(self, name: str, *, is_hit: bool) -> None:
        """A request looked for its adapter here."""
        for counts in self._of(name):
            counts.hits += is_hit
            counts.misses += not is_hit

    def evicted(self, name: str) -> None:
        for counts in self._of(name):
            counts.evictions += 1

    def loaded(self, name: str, seconds: float) -> None:
        self._durations.add(seconds)
        for counts in self._of(name):
            counts.loads += 1
            counts.load_seconds += seconds

    def stats(self, num_adapters: int, num_bytes: int, capacity_bytes: int) -> TierStats:
        return TierStats(
            tier=self.tier,
            num_adapters=num_adapters,
            num_bytes=num_bytes,
            capacity_bytes=capacity_bytes,
            total_hits=self._all.hits,
            total_misses=self._all.misses,
            total_evictions=self._all.evictions,
            load_durations=self._durations.snapshot(),
        )

    def by_adapter(self) -> Iterator[AdapterTierStats]:
        for name, counts in self._by_name.items():
            yield AdapterTierStats(
                name=name,
                tier=self.tier,
                total_hits=counts.hits,
                total_misses=counts.misses,
                total_evictions=counts.evictions,
                total_loads=counts.loads,
                load_seconds=counts.load_seconds,
            )

    def _of(self, name: str) -> tuple[_Counts, _Counts]:
        if name not in self._by_name and len(self._by_name) >= self.max_names:
            name = OTHERS
        return self._all, self._by_name.setdefault(name, _Counts())
