"""Which adapters an upstream has loaded for this gateway: by content, each once, idle ones making room for others.

What another gateway does there is not seen: a request that finds its adapter gone says so with `forget`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex.engines.adapters.flights import SingleFlight
from loraplex.engines.errors import AdapterInUse, EngineError, NoRoomBesidePins
from loraplex.engines.protocol import Adapter, AdapterResidency, AdapterUse


@dataclass
class _Loaded:
    adapter: Adapter
    num_bytes: int


class LoadedAdapters:
    """For one event loop. `load` and `unload` ask the upstream; `most` adapters are loaded at the same time."""

    def __init__(
        self, load: Callable[[Adapter], Awaitable[None]], unload: Callable[[str], Awaitable[None]], most: int
    ) -> None:
        self._load, self._unload, self._most = load, unload, most
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the least recently used first
        self._num_coming = 0
        self._users: dict[str, int] = {}
        self._pinned: dict[str, Adapter] = {}
        self._flights: SingleFlight[str, None] = SingleFlight()
        self._freed = asyncio.Event()  # set when an adapter is used no more; then another one stands here

    def __len__(self) -> int:
        return len(self._loaded)

    @asynccontextmanager
    async def held(self, adapter: Adapter) -> AsyncIterator[None]:
        """It is loaded, and stays so until the block ends. Raises what loading raises, NoRoomBesidePins."""
        self._users[adapter.id] = self._users.get(adapter.id, 0) + 1
        try:
            await self.bring(adapter)
            yield
        finally:
            self._users[adapter.id] -= 1
            if not self._users[adapter.id]:
                del self._users[adapter.id]
                self._tell_freed()

    async def bring(self, adapter: Adapter) -> None:
        """Load it, unless it is loaded; waits for room where requests use all that is. Raises as `held` does."""
        if adapter.id in self._loaded:
            self._loaded.move_to_end(adapter.id)
            return
        await self._flights.join(adapter.id, lambda: self._bring(adapter))

    def forget(self, adapter_id: str) -> None:
        """The upstream has it no more."""
        self._loaded.pop(adapter_id, None)
        self._tell_freed()

    async def remove(self, adapter_id: str) -> None:
        """Raises AdapterInUse, and what unloading raises."""
        if self._users.get(adapter_id):
            raise AdapterInUse(f"adapter {adapter_id} serves requests")
        self._pinned.pop(adapter_id, None)
        if self._loaded.pop(adapter_id, None) is not None:
            self._tell_freed()
            await self._unload(adapter_id)

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        """Raises as `held` does."""
        if not pinned:
            self._pinned.pop(adapter.id, None)
            self._tell_freed()
            return
        await self.bring(adapter)
        self._pinned[adapter.id] = adapter

    async def settle(self, served: Set[str]) -> list[EngineError]:
        """After the upstream was away it has those `served` alone. Pinned ones are loaded again; why some could not."""
        for adapter_id in [adapter_id for adapter_id in self._loaded if adapter_id not in served]:
            self.forget(adapter_id)
        brought = await asyncio.gather(
            *(self.bring(adapter) for adapter in self._pinned.values()), return_exceptions=True
        )
        return [error for error in brought if isinstance(error, EngineError)]

    def residency(self, uses: dict[str, tuple[AdapterUse, ...]], running: dict[str, int]) -> list[AdapterResidency]:
        """Those that are loaded; `uses` and `running` are of the requests in flight."""
        return [
            AdapterResidency(
                adapter_id=loaded.adapter.id,
                name=loaded.adapter.name,
                tier="device",
                pinned=loaded.adapter.id in self._pinned,
                num_bytes=loaded.num_bytes,
                num_requests=sum(use.num_requests for use in uses.get(loaded.adapter.id, ())),
                num_running=running.get(loaded.adapter.id, 0),
                uses=uses.get(loaded.adapter.id, ()),
            )
            for loaded in self._loaded.values()
        ]

    async def close(self) -> None:
        await self._flights.cancel_all()

    async def _bring(self, adapter: Adapter) -> None:
        idle = await self._place()
        try:
            if idle is not None:
                await self._unload(idle)
            await self._load(adapter)
            self._loaded[adapter.id] = _Loaded(adapter, await asyncio.to_thread(_num_bytes, adapter.path))
        finally:
            self._num_coming -= 1
            self._tell_freed()

    async def _place(self) -> str | None:
        """Take a place, once there is one; of those that no request uses, the one that is to leave for it."""
        while len(self._loaded) + self._num_coming >= self._most:
            if sum(one in self._loaded for one in self._pinned) >= self._most:
                raise NoRoomBesidePins(f"all {self._most} of upstream.max_adapters are pinned")
            idle = next((one for one in self._loaded if one not in self._pinned and one not in self._users), None)
            if idle is not None:
                del self._loaded[idle]  # at once: who asks for it from now on loads it anew
                self._num_coming += 1
                return idle
            await self._freed.wait()
        self._num_coming += 1
        return None

    def _tell_freed(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()


def _num_bytes(path: str) -> int:
    """Of its weights, as they lie on the disk."""
    file = Path(path) / "adapter_model.safetensors"
    return file.stat().st_size if file.is_file() else 0
