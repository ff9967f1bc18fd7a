"""What the admin API shows of adapters."""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from loraplex.engines.protocol import AdapterCard, AdapterResidency
from loraplex.gateway.adapter_records import Registered, State, Version
from loraplex.gateway.catalogue import Catalogue


class VersionView(Struct, kw_only=True):
    """One version. `is_current`: requests for the bare name are served by it. `notes` are worth a look."""

    version: int
    is_current: bool
    state: State
    reason: str | None
    source: str
    revision: str
    adapter_id: str
    num_bytes: int
    created_at: float
    card: AdapterCard | None
    notes: tuple[str, ...]


class VersionList(Struct):
    data: list[VersionView]


class AdapterView(Struct, kw_only=True):
    """An adapter as operators see it: its current version, or the one that is to be.

    `tier` is where its content is now, whoever brought it there; `num_requests` name this adapter right now, whichever
    version. `last_used_at` in seconds since 1970.
    """

    name: str
    base: str
    tenant_id: str | None
    version: int
    state: State
    reason: str | None
    source: str
    revision: str
    adapter_id: str
    num_bytes: int
    created_at: float
    card: AdapterCard | None
    notes: tuple[str, ...]
    tier: str
    pinned: bool
    num_requests: int
    last_used_at: float | None
    versions: list[VersionView]


class AdapterList(Struct):
    """`last_id`, given as `after`, leads to the next page while there `has_more`."""

    data: list[AdapterView]
    has_more: bool
    last_id: str | None


def view_of(entry: Registered, catalogue: Catalogue, residency: Mapping[str, AdapterResidency]) -> AdapterView:
    """`residency` by content."""
    shown = entry.shown
    found = residency.get(shown.adapter_id)
    return AdapterView(
        name=entry.name,
        base=catalogue.base,
        tenant_id=entry.tenant_id or None,
        version=shown.number,
        state=shown.state,
        reason=shown.reason or None,
        source=shown.source,
        revision=shown.revision,
        adapter_id=shown.adapter_id,
        num_bytes=shown.num_bytes,
        created_at=entry.created_at,
        card=shown.card,
        notes=shown.notes,
        tier=found.tier if found is not None else "disk" if shown.adapter_id else "remote",
        pinned=entry.pinned,
        num_requests=catalogue.num_requests(entry, residency),
        last_used_at=catalogue.last_used_at(entry),
        versions=listed_versions(entry.versions, entry.current_version),
    )


def listed_versions(versions: Sequence[Version], current: int | None) -> list[VersionView]:
    """In the order of their numbers."""
    return [
        VersionView(
            version=version.number,
            is_current=version.number == current,
            state=version.state,
            reason=version.reason or None,
            source=version.source,
            revision=version.revision,
            adapter_id=version.adapter_id,
            num_bytes=version.num_bytes,
            created_at=version.created_at,
            card=version.card,
            notes=version.notes,
        )
        for version in versions
    ]
