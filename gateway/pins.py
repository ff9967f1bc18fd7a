"""Which contents are kept on the device: those that entries pin, in all and for each tenant within a share of it.

A pin belongs to an entry and is in the database; what each gateway's engine keeps is made to follow from all of them.
"""

from collections.abc import Iterable, Sequence

import msgspec

from loraplex.engines.protocol import Engine
from loraplex.gateway.adapter_records import SHARED, Registered
from loraplex.gateway.errors import PinsFull


class PinShares(msgspec.Struct, frozen=True):
    """What pins may take of the device's room for adapters: all of them, and those of one tenant."""

    all: float = 0.5
    tenant: float = 0.25


class PinBudget:
    """Judges pins by the bytes that their contents occupy on the device; one content counts once."""

    def __init__(self, engine: Engine, shares: PinShares) -> None:
        self._engine = engine
        self._shares = shares

    async def require_room(self, entry: Registered, entries: Iterable[Registered]) -> None:
        """Raises PinsFull where `entry`, beside the others that are pinned, takes too much; EngineUnavailable."""
        _, misfits = await self.fitting([entry], [one for one in pins_of(entries) if one.key != entry.key])
        for reason in misfits.values():
            raise PinsFull(reason, "pinned")

    async def fitting(
        self, wanted: Sequence[Registered], kept: Sequence[Registered]
    ) -> tuple[list[Registered], dict[str, str]]:
        """Those of `wanted` that fit beside what is kept, first come first; why the others, by name, do not."""
        capacity = await self._capacity()
        fitting, misfits = list(kept), {}
        for entry in wanted:
            reason = None if capacity is None else self._misfit(entry, fitting, capacity)
            if reason is None:
                fitting.append(entry)
            else:
                misfits[entry.name] = reason
        return fitting[len(kept) :], misfits

    async def _capacity(self) -> int | None:
        """Bytes for adapters on the device; None where the engine has no such tier."""
        tiers = (await self._engine.stats()).tiers
        return next((tier.capacity_bytes for tier in tiers if tier.tier == "device"), None)

    def _misfit(self, entry: Registered, kept: Sequence[Registered], capacity: int) -> str | None:
        own = [one for one in kept if one.tenant_id == entry.tenant_id]
        bounds = [("", "pinned_share", self._shares.all, kept)]
        if entry.tenant_id != SHARED:
            bounds.append((" of one tenant", "tenant_pinned_share", self._shares.tenant, own))
        for whose, setting, share, beside in bounds:
            sizes = {one.shown.adapter_id: _num_bytes(one) for one in (*beside, entry)}
            limit = int(share * capacity)
            if sum(sizes.values()) > limit:
                return (
                    f"{_num_bytes(entry)} bytes more would exceed the {limit} that pinned adapters{whose} may take of "
                    f"the device: adapters.{setting}"
                )
        return None


def pins_of(entries: Iterable[Registered]) -> list[Registered]:
    """Those that are to be kept on the device, and have a version that can be."""
    return [entry for entry in entries if entry.pinned and entry.current_version is not None]


def _num_bytes(entry: Registered) -> int:
    version = entry.shown
    return version.num_bytes if version.card is None else version.card.num_bytes
