"""The device tier: one flat buffer in which each resident adapter is one contiguous extent of exactly its size.

What is copied into it, or within it, is copied piece by piece, where nobody reads; an adapter is known at a place from
`publish` on, all of it at once.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.peft import AdapterPlan, LoadedAdapter
from loraplex.engines.adapters.pieces import Pieces
from loraplex.engines.pages import in_large_pages, populate


class Arena:
    """`capacity` elements of `dtype` on `device`. Who may use which extent is not decided here (see Residency).

    `version` changes whenever some adapter is to be found elsewhere, or nowhere.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = (
            in_large_pages(capacity * dtype.itemsize).view(dtype)
            if device.type == "cpu"
            else torch.empty(capacity, dtype=dtype, device=device)
        )
        self._plans: dict[str, AdapterPlan] = {}
        self._offsets: dict[str, int] = {}
        self.version = 0
        self._populating = threading.Lock()
        self._num_populated = 0

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    @property
    def buffer(self) -> Tensor:
        """All of it. Shape [capacity]."""
        return self._buffer

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._offsets

    def populate(self, size: int) -> None:
        """Have the kernel back `size` elements more with memory, from any thread: a copy into pages that were never
        used takes four times as long (rank 64 beside the demo's base: 5.3 ms instead of 1.3 ms). Adapters are placed
        from the front, so who populates for each that comes stays ahead of the copies."""
        if self.device.type != "cpu":
            return
        with self._populating:
            begin = self._num_populated
            end = self._num_populated = min(begin + size, self._buffer.numel())
        populate(self._buffer[begin:end])

    def write(self, offset: int, loaded: LoadedAdapter) -> Pieces[None]:
        """Copy an adapter to `offset`; the extent must belong to nobody who is being computed with."""
        return pieces.copy(self._buffer[offset : offset + loaded.plan.size], loaded.flat)

    def move(self, adapter_id: str, offset: int) -> Pieces[None]:
        """Copy a resident adapter to a lower `offset`. Where the extents overlap, nobody may compute with it."""
        source, size = self._offsets[adapter_id], self._plans[adapter_id].size
        overlaps = source - offset < pieces.PIECE
        for begin in range(0, size, pieces.PIECE):
            end = min(begin + pieces.PIECE, size)
            piece = self._buffer[source + begin : source + end]
            self._buffer[offset + begin : offset + end].copy_(piece.clone() if overlaps else piece)
            yield

    def publish(self, plan: AdapterPlan, offset: int) -> None:
        """The adapter lies at `offset` from now on."""
        self._plans[plan.adapter.id] = plan
        self._offsets[plan.adapter.id] = offset
        self.version += 1

    def forget(self, adapter_id: str) -> None:
        del self._plans[adapter_id], self._offsets[adapter_id]
        self.version += 1

    def plan(self, adapter_id: str) -> AdapterPlan:
        return self._plans[adapter_id]

    def flat(self, adapter_id: str) -> Tensor:
        """The adapter's extent. Shape [plan.size]."""
        offset = self._offsets[adapter_id]
        return self._buffer[offset : offset + self._plans[adapter_id].size]
