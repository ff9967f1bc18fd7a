"""The host tier: parsed adapters in this process's memory, the least recently used leave. Plain books."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from loraplex.engines.adapters.peft import LoadedAdapter


class HostTier:
    """At most `capacity` bytes; the newest always stays, so that an adapter larger than that can still be served."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, adapter_id: str) -> LoadedAdapter:
        return self._kept[adapter_id]

    def keep(self, loaded: LoadedAdapter) -> Iterator[LoadedAdapter]:
        """Take one in; who had to leave."""
        self._kept[loaded.plan.adapter.id] = loaded
        self.num_bytes += loaded.flat.nbytes
        while self.num_bytes > self.capacity and len(self._kept) > 1:
            yield self.drop(next(iter(self._kept)))

    def touch(self, adapter_id: str) -> None:
        """It was used just now."""
        self._kept.move_to_end(adapter_id)

    def drop(self, adapter_id: str) -> LoadedAdapter:
        loaded = self._kept.pop(adapter_id)
        self.num_bytes -= loaded.flat.nbytes
        return loaded
