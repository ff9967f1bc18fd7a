"""Brings adapters to the device for the engine's core: disk -> host (in threads) -> arena, and books about each.

The step loop calls `poll` between steps; reading and parsing happen in threads, so a step never waits for a disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.peft import AdapterPlan, Base, LoadedAdapter, load_adapter, plan_adapter
from loraplex.engines.errors import AdapterError, AdapterInUse, AdapterInvalid, AdapterTooLarge
from loraplex.engines.native.residency import Residency
from loraplex.engines.protocol import Adapter, AdapterCard, AdapterResidency

Done = Callable[[AdapterError | None], None]


@dataclass(slots=True)
class _Tracked:
    """An adapter that someone asked for. `waiters` (calls, not requests) are told once when it is on the device."""

    adapter: Adapter
    num_requests: int = 0
    waiters: list[Done] = field(default_factory=list)


class AdapterTiers:
    """Host and device tiers of one engine process. Bytes are those of the engine's dtype."""

    def __init__(
        self,
        base: Base,
        arena: Arena,
        residency: Residency,
        host_bytes: int,
        on_failure: Callable[[str, AdapterError], None],
        num_threads: int = 2,
    ) -> None:
        """`on_failure(adapter_id, error)` is called when an adapter that requests wait for cannot be had."""
        self._base = base
        self._on_failure = on_failure
        self._arena = arena
        self._residency = residency
        self._host: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._host_room = host_bytes
        self._tracked: dict[str, _Tracked] = {}
        self._reading: dict[str, Future[LoadedAdapter]] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter")

    @property
    def is_loading(self) -> bool:
        """Whether a thread is reading an adapter, so that `poll` will soon have something to do."""
        return bool(self._reading)

    @property
    def num_on_device(self) -> int:
        return len(self._residency)

    def inspect(self, adapter: Adapter, done: Callable[[Future[AdapterCard]], None]) -> None:
        """Check an adapter in a thread; `done` is called there."""
        self._threads.submit(self._inspect, adapter).add_done_callback(done)

    def plans(self, adapter_ids: Iterable[str]) -> list[AdapterPlan]:
        """The plans of those adapters that are on the host or the device."""
        found = (self._host[id].plan if id in self._host else self._arena.plan(id) for id in adapter_ids
                 if id in self._host or id in self._residency)  # fmt: skip
        return list(found)

    def enter(self, adapter: Adapter) -> None:
        """A request that names the adapter arrived: start reading it before the request is scheduled."""
        tracked = self._track(adapter)
        tracked.num_requests += 1
        self._read_ahead(tracked)

    def leave(self, adapter_id: str) -> None:
        """A request that named the adapter ended."""
        self._tracked[adapter_id].num_requests -= 1

    def load(self, adapter: Adapter, done: Done) -> None:
        """Bring an adapter to the device for nobody in particular; `done` is called when it is there or cannot be."""
        tracked = self._track(adapter)
        if adapter.id in self._residency:
            done(None)
            return
        tracked.waiters.append(done)
        self._read_ahead(tracked)

    def pin(self, adapter: Adapter, *, pinned: bool, done: Done) -> None:
        """Keep an adapter on the device (loading it first), or stop doing so."""
        if not pinned:
            if adapter.id in self._residency:
                self._residency.pin(adapter.id, pinned=False)
            done(None)
            return

        def pin_then(error: AdapterError | None) -> None:
            if error is None:
                self._residency.pin(adapter.id, pinned=True)
            done(error)

        self.load(adapter, pin_then)

    def unload(self, adapter_id: str) -> None:
        """Drop an adapter from host and device. Raises AdapterInUse while requests name it."""
        tracked = self._tracked.get(adapter_id)
        if tracked is not None and (tracked.num_requests or tracked.waiters):
            raise AdapterInUse(f"{tracked.num_requests} requests use the adapter")
        self._tracked.pop(adapter_id, None)
        self._host.pop(adapter_id, None)
        if adapter_id in self._residency:
            self._drop(adapter_id)

    def poll(self, wanted: Iterable[str]) -> None:
        """Move along what can be moved, between steps: finished reads to the host tier, wanted adapters to the device.

        `wanted` names the adapters of waiting sequences, first come first: none of them is evicted for a later one.
        """
        for adapter_id in [adapter_id for adapter_id, future in self._reading.items() if future.done()]:
            self._finish_read(adapter_id, self._reading.pop(adapter_id))
        if not self._cold():
            return
        protected: set[str] = set()
        for adapter_id in dict.fromkeys([*wanted, *self._called_for()]):
            if adapter_id in self._residency:
                protected.add(adapter_id)
            elif adapter_id not in self._host:
                self._read_ahead(self._tracked[adapter_id])
            elif self._place(self._tracked[adapter_id], self._host[adapter_id], protected):
                protected.add(adapter_id)

    def residents(self) -> list[AdapterResidency]:
        return [self._residency_of(tracked) for tracked in self._tracked.values()]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _track(self, adapter: Adapter) -> _Tracked:
        return self._tracked.setdefault(adapter.id, _Tracked(adapter))

    def _cold(self) -> bool:
        return any(
            (tracked.num_requests or tracked.waiters) and adapter_id not in self._residency
            for adapter_id, tracked in self._tracked.items()
        )

    def _called_for(self) -> list[str]:
        return [adapter_id for adapter_id, tracked in self._tracked.items() if tracked.waiters]

    def _read_ahead(self, tracked: _Tracked) -> None:
        adapter_id = tracked.adapter.id
        if not (adapter_id in self._residency or adapter_id in self._host or adapter_id in self._reading):
            self._reading[adapter_id] = self._threads.submit(self._read, tracked.adapter)

    def _inspect(self, adapter: Adapter) -> AdapterCard:
        return plan_adapter(adapter, self._base).card(self._base.dtype.itemsize)

    def _read(self, adapter: Adapter) -> LoadedAdapter:
        return load_adapter(adapter, self._base)

    def _finish_read(self, adapter_id: str, future: Future[LoadedAdapter]) -> None:
        error = future.exception()
        if error is None:
            self._keep_on_host(future.result())
        else:
            known = error if isinstance(error, AdapterError) else AdapterInvalid(f"cannot be loaded: {error!r}")
            self._fail(adapter_id, known)

    def _keep_on_host(self, loaded: LoadedAdapter) -> None:
        """The newest always stays, so that an adapter larger than the tier can still be served."""
        self._host[loaded.plan.adapter.id] = loaded
        used = sum(kept.flat.nbytes for kept in self._host.values())
        for adapter_id in list(self._host)[:-1]:
            if used <= self._host_room:
                break
            used -= self._host.pop(adapter_id).flat.nbytes

    def _place(self, tracked: _Tracked, loaded: LoadedAdapter, protected: Set[str]) -> bool:
        adapter_id, size = tracked.adapter.id, loaded.plan.size
        if size > self._residency.capacity:
            room = self._residency.capacity * self._base.dtype.itemsize
            self._fail(adapter_id, AdapterTooLarge(f"{loaded.flat.nbytes} bytes exceed adapters.device_bytes = {room}"))
            return False
        evicted = self._residency.place(adapter_id, size, protected)
        if evicted is None:
            return False
        for victim in evicted:
            self._arena.forget(victim)
        self._arena.write(self._residency.extent(adapter_id).offset, loaded)
        self._host.move_to_end(adapter_id)
        self._tell(adapter_id, None)
        return True

    def _fail(self, adapter_id: str, error: AdapterError) -> None:
        self._tell(adapter_id, error)
        self._on_failure(adapter_id, error)

    def _tell(self, adapter_id: str, error: AdapterError | None) -> None:
        tracked = self._tracked[adapter_id]
        waiters, tracked.waiters = tracked.waiters, []
        for done in waiters:
            done(error)

    def _drop(self, adapter_id: str) -> None:
        self._residency.drop(adapter_id)
        self._arena.forget(adapter_id)

    def _residency_of(self, tracked: _Tracked) -> AdapterResidency:
        adapter = tracked.adapter
        on_device, on_host = adapter.id in self._residency, self._host.get(adapter.id)
        elements = self._arena.plan(adapter.id).size if on_device else on_host.plan.size if on_host else 0
        return AdapterResidency(
            adapter_id=adapter.id,
            name=adapter.name,
            tier="device" if on_device else "host" if on_host else "disk",
            pinned=self._residency.is_pinned(adapter.id),
            num_bytes=elements * self._base.dtype.itemsize,
            num_requests=tracked.num_requests,
        )
