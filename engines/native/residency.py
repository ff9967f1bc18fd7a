"""Which adapters are on the device, where in the arena, and which may go. Plain Python: never touches weights.

The arena is one flat run of `capacity` elements; an adapter is one contiguous extent of exactly its own size. Room is
reserved first, filled by someone else, and published: only then may a sequence compute with the adapter.
An adapter may be evicted unless it is pinned, is computed with by a running sequence, is being moved, or is needed by a
waiting sequence that comes before the one that wants the room. Where enough is free, but in pieces, adapters are moved
together instead: a running one only to a place apart from its own, so that it is read where it was until it is there.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

_Taken = tuple[int, int, str]  # offset, end, adapter


@dataclass(slots=True)
class Extent:
    """Elements `offset … offset + size - 1` of the arena."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Move:
    """A resident adapter's way to a lower offset. `slides`: the extents overlap, so it is not ready on the way."""

    adapter_id: str
    target: int
    slides: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What had to be done for an adapter: who was evicted, and the move that must be made before asking again.

    Without a move, the adapter has its extent.
    """

    evicted: tuple[str, ...] = ()
    move: Move | None = None


@dataclass(slots=True)
class _Resident:
    extent: Extent
    is_ready: bool = False
    move: Move | None = None
    num_running: int = 0
    pinned: bool = False
    last_use: int = 0


class Residency:
    """The device tier's books: first fit, least recently used goes first. `x in residency`: it can be computed with."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._residents: dict[str, _Resident] = {}
        self._uses = 0
        self.lacking: set[str] = set()  # those whose last reservation was in vain

    def __contains__(self, adapter_id: str) -> bool:
        resident = self._residents.get(adapter_id)
        return resident is not None and resident.is_ready

    def __len__(self) -> int:
        return sum(resident.is_ready for resident in self._residents.values())

    def holds(self, adapter_id: str) -> bool:
        """Whether it has an extent, ready or not."""
        return adapter_id in self._residents

    @property
    def num_used(self) -> int:
        return sum(resident.extent.size for resident in self._residents.values())

    @property
    def num_pinned(self) -> int:
        """Elements that stay taken whoever asks for room."""
        return sum(resident.extent.size for resident in self._residents.values() if resident.pinned)

    def extent(self, adapter_id: str) -> Extent:
        return self._residents[adapter_id].extent

    def is_pinned(self, adapter_id: str) -> bool:
        return adapter_id in self._residents and self._residents[adapter_id].pinned

    def num_running(self, adapter_id: str) -> int:
        """Sequences that compute with it now."""
        return self._residents[adapter_id].num_running if adapter_id in self._residents else 0

    def is_running(self, adapter_id: str) -> bool:
        return self.num_running(adapter_id) > 0

    def reserve(self, adapter_id: str, size: int, protected: Set[str] = frozenset()) -> Room | None:
        """Give an adapter an extent; None, and nothing done, where no eviction would make room for it."""
        taken, going = self._taken(), []
        free = self.capacity - sum(end - begin for begin, end, _ in taken)
        for candidate in [None, *self._evictable(protected)]:
            if candidate is not None:
                going.append(candidate)
                extent = self._residents[candidate].extent
                taken.remove((extent.offset, extent.end, candidate))
                free += extent.size
            if free < size:
                continue
            offset = _first_fit(taken, size, self.capacity)
            move = self._best_move(taken, size, protected) if offset is None else None
            if offset is None and move is None:
                continue
            for victim in going:
                del self._residents[victim]
            if offset is not None:
                self._residents[adapter_id] = _Resident(extent=Extent(offset, size))
                self._touch(adapter_id)
            elif move is not None:
                self._begin(move)
            self.lacking.discard(adapter_id)
            return Room(tuple(going), move)
        self.lacking.add(adapter_id)
        return None

    def give_up(self, adapter_id: str) -> None:
        """It wants no room any more; what was reserved and is not ready is free again."""
        self.lacking.discard(adapter_id)
        resident = self._residents.get(adapter_id)
        if resident is not None and not resident.is_ready and resident.move is None:
            del self._residents[adapter_id]

    def publish(self, adapter_id: str) -> None:
        """Its extent is filled: at the place reserved, or where it was moved to."""
        resident = self._residents[adapter_id]
        if resident.move is not None:
            resident.extent = Extent(resident.move.target, resident.extent.size)
            resident.move = None
        resident.is_ready = True

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

    def _begin(self, move: Move) -> None:
        resident = self._residents[move.adapter_id]
        resident.move = move
        resident.is_ready = not move.slides

    def _evictable(self, protected: Set[str]) -> list[str]:
        """Oldest use first."""
        free = [
            (resident.last_use, adapter_id)
            for adapter_id, resident in self._residents.items()
            if self._is_idle(resident) and not resident.pinned and adapter_id not in protected
        ]
        return [adapter_id for _, adapter_id in sorted(free)]

    @staticmethod
    def _is_idle(resident: _Resident) -> bool:
        return resident.is_ready and resident.move is None and not resident.num_running

    def _taken(self) -> list[_Taken]:
        """Every extent in use, targets of moves included, in the arena's order."""
        taken = []
        for adapter_id, resident in self._residents.items():
            extent, move = resident.extent, resident.move
            taken.append((extent.offset, extent.end, adapter_id))
            if move is not None:
                taken.append((move.target, min(move.target + extent.size, extent.offset), adapter_id))
        return sorted(taken)

    def _best_move(self, taken: list[_Taken], size: int, protected: Set[str]) -> Move | None:
        """The first of the moves that join free pieces to `size`, copying the least; None where none can.

        Neighbours are pushed together downwards, one after the other; each move brings what is left to copy down, so
        asking again and again comes to an end.
        """
        ends = [0, *(end for _, end, _ in taken)]
        gaps = [begin - before for (begin, _, _), before in zip(taken, ends, strict=False)]
        gaps.append(self.capacity - ends[-1])
        best: Move | None = None
        least = self.capacity + 1
        for first, (_, _, moved) in enumerate(taken):
            cost, free = 0, gaps[first]
            for (_, _, adapter_id), gap in zip(taken[first:] if free else [], gaps[first + 1 :], strict=False):
                cost += self._residents[adapter_id].extent.size
                if cost >= least or not self._is_movable(adapter_id, free, protected):
                    break
                free += gap
                if free >= size:
                    least = cost
                    best = Move(moved, ends[first], slides=self._residents[moved].extent.size > gaps[first])
                    break
        return best

    def _is_movable(self, adapter_id: str, free: int, protected: Set[str]) -> bool:
        resident = self._residents[adapter_id]
        if resident.move is not None or not resident.is_ready:
            return False
        return resident.extent.size <= free or (self._is_idle(resident) and adapter_id not in protected)


def _first_fit(taken: list[_Taken], size: int, capacity: int) -> int | None:
    """The lowest offset with `size` free elements behind it."""
    offset = 0
    for begin, end, _ in taken:
        if begin - offset >= size:
            return offset
        offset = end
    return offset if capacity - offset >= size else None
