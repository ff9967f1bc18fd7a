"""Brings adapters to the device for the engine's core: disk -> host -> arena, and books about each.

Threads check and read the files; what touches the arena is done between steps in small pieces, as many as the step's
allowance of time admits, so that no stream waits for an adapter. An adapter that nobody waits for any more on its way
is given up where it is. All methods are called by the loop that steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import AdapterPlan, Base, LoadedAdapter, plan_adapter
from loraplex.engines.adapters.pieces import Pieces
from loraplex.engines.errors import AdapterError, AdapterInUse, AdapterTooLarge, NoRoomBesidePins
from loraplex.engines.figures import TierFigures
from loraplex.engines.native.host import HostTier
from loraplex.engines.native.preparation import Preparation, adapter_threads
from loraplex.engines.native.residency import Move, Residency
from loraplex.engines.protocol import Adapter, AdapterCard, AdapterResidency
from loraplex.engines.stats import AdapterTierStats, TierStats

Done = Callable[[AdapterError | None], None]


@dataclass(slots=True)
class _Tracked:
    """An adapter that someone asked for. `waiters` (calls, not requests) are told once when it is on the device."""

    adapter: Adapter
    num_requests: int = 0
    waiters: list[Done] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        return bool(self.num_requests or self.waiters)


@dataclass(frozen=True, slots=True)
class _Copy:
    """One adapter's way to the device, or within it, in pieces; `finish` is called behind the last one."""

    adapter_id: str
    pieces: Pieces[None]
    finish: Callable[[], None]
    is_move: bool = False


class AdapterTiers:
    """Host and device tiers of one engine process. Bytes are those of the engine's dtype."""

    def __init__(
        self,
        base: Base,
        arena: Arena,
        residency: Residency,
        host_bytes: int,
        on_failure: Callable[[str, AdapterError], None],
        *,
        max_names: int = 100,
        num_threads: int = 2,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_failure(adapter_id, error)` is called when an adapter that requests wait for cannot be had."""
        self._base = base
        self._on_failure = on_failure
        self._arena = arena
        self._residency = residency
        self._clock = clock
        self._host = HostTier(host_bytes)
        self._tracked: dict[str, _Tracked] = {}
        self._cold: dict[str, None] = {}  # wanted, and not known to be on the device; in order of asking
        self._preparing: dict[str, Preparation] = {}
        self._copy: _Copy | None = None
        self.num_pins = 0  # made so far
        self._host_figures = TierFigures("host", max_names)
        self._device_figures = TierFigures("device", max_names)
        self._threads = adapter_threads(num_threads, arena.device)

    @property
    def is_loading(self) -> bool:
        """Whether a thread is preparing an adapter, so that `poll` will soon have something to do."""
        return bool(self._preparing)

    @property
    def is_copying(self) -> bool:
        """Whether `poll` has something to do right now."""
        return self._copy is not None

    @property
    def num_on_device(self) -> int:
        return len(self._residency)

    def inspect(self, adapter: Adapter, done: Callable[[Future[AdapterCard]], None]) -> None:
        """Check an adapter in a thread; `done` is called there."""
        self._threads.submit(self._inspect, adapter).add_done_callback(done)

    def plans(self, adapter_ids: Iterable[str]) -> list[AdapterPlan]:
        """The plans of those adapters that are on the host or the device."""
        found = (self._host[id].plan if id in self._host else self._arena.plan(id) for id in adapter_ids
                 if id in self._host or id in self._arena)  # fmt: skip
        return list(found)

    def lack_of_room(self, plans: Sequence[AdapterPlan]) -> AdapterError | None:
        """Why adapters can never be on the device together, as long as those pinned stay; None where they can."""
        itemsize, books = self._base.dtype.itemsize, self._residency
        size, room = sum(plan.size for plan in plans) * itemsize, books.capacity * itemsize
        pinned = books.num_pinned - sum(plan.size for plan in plans if books.is_pinned(plan.adapter.id))
        taken = pinned * itemsize
        if size > room:
            return AdapterTooLarge(
                f"{size} bytes exceed the {room} for adapters on the device: adapters.device_bytes or device_share"
            )
        if size > room - taken:
            return NoRoomBesidePins(f"{size} bytes exceed the {room - taken} that pinned adapters leave on the device")
        return None

    def enter(self, adapter: Adapter) -> None:
        """A request that names the adapter arrived: start reading it before the request is scheduled."""
        tracked = self._track(adapter)
        tracked.num_requests += 1
        is_on_device = adapter.id in self._residency
        self._device_figures.found(adapter.name, is_hit=is_on_device)
        if not is_on_device:
            self._host_figures.found(adapter.name, is_hit=adapter.id in self._host)
        self._want(tracked)

    def leave(self, adapter_id: str) -> None:
        """A request that named the adapter ended; what was on its way for it alone is given up."""
        tracked = self._tracked[adapter_id]
        tracked.num_requests -= 1
        if not tracked.is_wanted:
            self._abandon(adapter_id)
            self._prune(adapter_id)

    def load(self, adapter: Adapter, done: Done) -> None:
        """Bring an adapter to the device for nobody in particular; `done` is called when it is there or cannot be."""
        tracked = self._track(adapter)
        if adapter.id in self._residency:
            done(None)
            return
        tracked.waiters.append(done)
        self._want(tracked)

    def pin(self, adapter: Adapter, *, pinned: bool, done: Done) -> None:
        """Keep an adapter on the device (loading it first), or stop doing so."""
        if not pinned:
            if self._residency.holds(adapter.id):
                self._residency.pin(adapter.id, pinned=False)
            done(None)
            return

        def pin_then(error: AdapterError | None) -> None:
            if error is None:
                self._residency.pin(adapter.id, pinned=True)
                self.num_pins += 1
            done(error)

        self.load(adapter, pin_then)

    def unload(self, adapter_id: str) -> None:
        """Drop an adapter from host and device. Raises AdapterInUse while requests name it."""
        tracked = self._tracked.get(adapter_id)
        if tracked is not None and tracked.is_wanted:
            raise AdapterInUse(f"{tracked.num_requests} requests use the adapter")
        self._abandon(adapter_id, moves_too=True)
        if adapter_id in self._host:
            self._host.drop(adapter_id)
        if self._residency.holds(adapter_id):
            self._residency.drop(adapter_id)
            self._arena.forget(adapter_id)
        self._tracked.pop(adapter_id, None)

    def poll(self, wanted: Iterable[str], seconds: float) -> None:
        """Move along what can be moved, between steps, for about so long.

        `wanted` names the adapters of waiting sequences, first come first: none of them is evicted for a later one.
        """
        end = self._clock() + seconds
        if not (self._cold or self._copy):
            return
        order = list(dict.fromkeys([*wanted, *self._cold]))
        while True:  # copies first: they are nearer to their end, and the host tier may have no room for two
            if (copy := self._copy or self._begin_copy(order)) is not None:
                if not self._go_on(copy, end):
                    return
            elif not self._take_in():
                return

    def residents(self, *, only_on_device: bool = False) -> list[AdapterResidency]:
        """Those known here: on the host, the device, or wanted."""
        return [
            self._residency_of(tracked)
            for tracked in self._tracked.values()
            if not only_on_device or tracked.adapter.id in self._residency
        ]

    def stats(self) -> tuple[TierStats, TierStats]:
        itemsize, books = self._base.dtype.itemsize, self._residency
        return (
            self._host_figures.stats(len(self._host), self._host.num_bytes, self._host.capacity),
            self._device_figures.stats(len(books), books.num_used * itemsize, books.capacity * itemsize),
        )

    def stats_by_adapter(self) -> Iterator[AdapterTierStats]:
        yield from self._host_figures.by_adapter()
        yield from self._device_figures.by_adapter()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _track(self, adapter: Adapter) -> _Tracked:
        return self._tracked.setdefault(adapter.id, _Tracked(adapter))

    def _inspect(self, adapter: Adapter) -> AdapterCard:
        return plan_adapter(adapter, self._base).card(self._base.dtype.itemsize)

    def _want(self, tracked: _Tracked) -> None:
        """See that an adapter comes to the device."""
        adapter_id = tracked.adapter.id
        if adapter_id in self._residency:
            return
        self._cold[adapter_id] = None
        is_copied = self._residency.holds(adapter_id)  # to its extent, or from one to another
        if not (adapter_id in self._host or adapter_id in self._preparing or is_copied):
            self._preparing[adapter_id] = Preparation(
                tracked.adapter, self._base, self._threads, self._clock(), self._arena.populate
            )

    def _take_in(self) -> bool:
        """One adapter that a thread has read, to the host tier; whether there was one."""
        adapter_id = next((adapter_id for adapter_id, one in self._preparing.items() if one.is_done), None)
        if adapter_id is None:
            return False
        preparation = self._preparing.pop(adapter_id)
        try:
            loaded = preparation.loaded()
        except AdapterError as error:
            self._fail(adapter_id, error)
            return True
        self._host_figures.loaded(loaded.plan.adapter.name, self._clock() - preparation.began)
        for left in self._host.keep(loaded):
            self._host_figures.evicted(left.plan.adapter.name)
            self._left(left.plan.adapter.id)
        return True

    def _begin_copy(self, order: Iterable[str]) -> _Copy | None:
        """Start the copy of the first adapter that room can be made for."""
        protected: set[str] = set()
        for adapter_id in order:
            tracked = self._tracked.get(adapter_id)
            if self._residency.holds(adapter_id):
                protected.add(adapter_id)
            elif tracked is not None and tracked.is_wanted and adapter_id in self._host:
                loaded = self._host[adapter_id]
                if (error := self.lack_of_room([loaded.plan])) is not None:
                    self._fail(adapter_id, error)
                elif (copy := self._place(loaded, protected)) is not None:
                    self._copy = copy
                    return copy
        return None

    def _place(self, loaded: LoadedAdapter, protected: Set[str]) -> _Copy | None:
        """The copy into the arena, or a move that has to be made before; None where no room can be made."""
        plan, began = loaded.plan, self._clock()
        room = self._residency.reserve(plan.adapter.id, plan.size, protected)
        if room is None:
            return None
        for victim in room.evicted:
            self._leave_device(victim)
        if (move := room.move) is not None:
            finish_move = partial(self._finish_move, move)
            return _Copy(move.adapter_id, self._arena.move(move.adapter_id, move.target), finish_move, is_move=True)
        offset = self._residency.extent(plan.adapter.id).offset
        return _Copy(plan.adapter.id, self._arena.write(offset, loaded), partial(self._finish_copy, plan, began))

    def _go_on(self, copy: _Copy, end: float) -> bool:
        """To the copy's end or to the allowance's; whether time is left."""
        for _ in copy.pieces:
            if self._clock() >= end:
                return False
        self._copy = None
        copy.finish()
        return self._clock() < end

    def _finish_copy(self, plan: AdapterPlan, began: float) -> None:
        adapter_id = plan.adapter.id
        self._arena.publish(plan, self._residency.extent(adapter_id).offset)
        self._residency.publish(adapter_id)
        self._cold.pop(adapter_id, None)
        self._device_figures.loaded(plan.adapter.name, self._clock() - began)
        if adapter_id in self._host:
            self._host.touch(adapter_id)
        self._tell(adapter_id, None)

    def _finish_move(self, move: Move) -> None:
        self._residency.publish(move.adapter_id)
        self._arena.publish(self._arena.plan(move.adapter_id), move.target)
        self._cold.pop(move.adapter_id, None)
        self._tell(move.adapter_id, None)  # those who asked for it while it slid

    def _leave_device(self, adapter_id: str) -> None:
        """The books have given its extent to another one."""
        self._arena.forget(adapter_id)
        self._device_figures.evicted(self._tracked[adapter_id].adapter.name)
        self._left(adapter_id)

    def _left(self, adapter_id: str) -> None:
        """It left a tier: bring it again for those who want it, or forget it."""
        if self._tracked[adapter_id].is_wanted:
            self._want(self._tracked[adapter_id])
        self._prune(adapter_id)

    def _fail(self, adapter_id: str, error: AdapterError) -> None:
        self._abandon(adapter_id)
        self._tell(adapter_id, error)
        self._on_failure(adapter_id, error)
        self._prune(adapter_id)

    def _tell(self, adapter_id: str, error: AdapterError | None) -> None:
        if (tracked := self._tracked.get(adapter_id)) is not None:
            waiters, tracked.waiters = tracked.waiters, []
            for done in waiters:
                done(error)

    def _abandon(self, adapter_id: str, *, moves_too: bool = False) -> None:
        """Give up what is on its way; a move of it within the device goes on, unless it leaves."""
        self._cold.pop(adapter_id, None)
        if (preparation := self._preparing.pop(adapter_id, None)) is not None:
            preparation.give_up()
        copy = self._copy
        if copy is not None and copy.adapter_id == adapter_id and (moves_too or not copy.is_move):
            copy.pieces.close()
            self._copy = None
        self._residency.give_up(adapter_id)

    def _prune(self, adapter_id: str) -> None:
        """Forget one that is nowhere here and that nobody wants."""
        tracked = self._tracked.get(adapter_id)
        is_here = adapter_id in self._host or self._residency.holds(adapter_id)
        if tracked is not None and not tracked.is_wanted and not is_here:
            del self._tracked[adapter_id]

    def _residency_of(self, tracked: _Tracked) -> AdapterResidency:
        adapter = tracked.adapter
        on_device, on_host = adapter.id in self._residency, adapter.id in self._host
        plan = next(iter(self.plans([adapter.id])), None)
        return AdapterResidency(
            adapter_id=adapter.id,
            name=adapter.name,
            tier="device" if on_device else "host" if on_host else "disk",
            pinned=self._residency.is_pinned(adapter.id),
            num_bytes=plan.size * self._base.dtype.itemsize if plan else 0,
            num_requests=tracked.num_requests,
            num_running=self._residency.num_running(adapter.id),
        )
