"""The device tier: one flat buffer in which each resident adapter is one contiguous extent of exactly its size."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.engines.adapters.peft import AdapterPlan, LoadedAdapter


class Arena:
    """`capacity` elements of `dtype` on `device`. Who may use which extent is not decided here (see Residency)."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(capacity, dtype=dtype, device=device)
        self._plans: dict[str, AdapterPlan] = {}
        self._offsets: dict[str, int] = {}

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

    def write(self, offset: int, loaded: LoadedAdapter) -> None:
        """Copy an adapter to `offset`; the extent must belong to nobody who is being computed with."""
        adapter_id = loaded.plan.adapter.id
        self._buffer[offset : offset + loaded.plan.size].copy_(loaded.flat)
        self._plans[adapter_id] = loaded.plan
        self._offsets[adapter_id] = offset

    def forget(self, adapter_id: str) -> None:
        del self._plans[adapter_id], self._offsets[adapter_id]

    def plan(self, adapter_id: str) -> AdapterPlan:
        return self._plans[adapter_id]

    def flat(self, adapter_id: str) -> Tensor:
        """The adapter's extent. Shape [plan.size]."""
        offset = self._offsets[adapter_id]
        return self._buffer[offset : offset + self._plans[adapter_id].size]
