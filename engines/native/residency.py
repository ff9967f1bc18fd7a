"""Which adapters are on the device, where in the arena, and which may go. Plain Python: never touches weights.

The arena is one flat run of `capacity` elements; an adapter is one contiguous extent of exactly its own size.
An adapter may be evicted unless it is pinned, is computed with by a running sequence, or is needed by a waiting
sequence that comes before the one that wants the room.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(slots=True)
class Extent:
    """Elements `offset … offset + size - 1` of the arena."""

    offset: int
    size: int


@dataclass(slots=True)
class _Resident:
    extent: Extent
    num_running: int = 0
    pinned: bool = False
    last_use: int = 0


class Residency:
    """The device tier's books: first fit, least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._residents: dict[str, _Resident] = {}
        self._uses = 0
        self.num_evictions = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def num_used(self) -> int:
        return sum(resident.extent.size for resident in self._residents.values())

    def extent(self, adapter_id: str) -> Extent:
        return self._residents[adapter_id].extent

    def is_pinned(self, adapter_id: str) -> bool:
        return adapter_id in self._residents and self._residents[adapter_id].pinned

    def is_running(self, adapter_id: str) -> bool:
        return adapter_id in self._residents and self._residents[adapter_id].num_running > 0

    def place(self, adapter_id: str, size: int, protected: Set[str] = frozenset()) -> list[str] | None:
        """Give an adapter an extent; returns who was evicted for it, None (and nothing done) where none can be."""
        evicted = self._make_room(size, protected)
        if evicted is None:
            return None
        for victim in evicted:
            del self._residents[victim]
        self.num_evictions += len(evicted)
        offset = self._first_fit(size)
        assert offset is not None, "room was made"
        self._residents[adapter_id] = _Resident(extent=Extent(offset, size))
        self._touch(adapter_id)
        return evicted

    def start(self, adapter_id: str) -> None:
        """A sequence begins to compute with the adapter."""
        self._residents[adapter_id].num_running += 1
        self._touch(adapter_id)

    def stop(self, adapter_id: str) -> None:
        """A sequence stops computing with it."""
        self._residents[adapter_id].num_running -= 1

    def pin(self, adapter_id: str, *, pinned: bool) -> None:
        self._residents[adapter_id].pinned = pinned

    def drop(self, adapter_id: str) -> None:
        """Give up an adapter's extent. It must not be running."""
        assert not self.is_running(adapter_id), f"{adapter_id} is being computed with"
        del self._residents[adapter_id]

    def _touch(self, adapter_id: str) -> None:
        self._uses += 1
        self._residents[adapter_id].last_use = self._uses

    def _evictable(self, protected: Set[str]) -> list[str]:
        """Oldest use first."""
        free = [
            (resident.last_use, adapter_id)
            for adapter_id, resident in self._residents.items()
            if not (resident.pinned or resident.num_running or adapter_id in protected)
        ]
        return [adapter_id for _, adapter_id in sorted(free)]

    def _make_room(self, size: int, protected: Set[str]) -> list[str] | None:
        """The fewest least recently used adapters whose going leaves a gap of `size`; None where that is not enough."""
        going: list[str] = []
        for candidate in [None, *self._evictable(protected)]:
            if candidate is not None:
                going.append(candidate)
            if self._first_fit(size, without=going) is not None:
                return going
        return None

    def _first_fit(self, size: int, without: list[str] | None = None) -> int | None:
        """The lowest offset with `size` free elements behind it."""
        gone = set(without or ())
        extents = sorted(
            (resident.extent.offset, resident.extent.size)
            for adapter_id, resident in self._residents.items()
            if adapter_id not in gone
        )
        offset = 0
        for start, length in extents:
            if start - offset >= size:
                return offset
            offset = start + length
        return offset if self.capacity - offset >= size else None
