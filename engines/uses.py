"""Whose requests name which adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from loraplex.engines.protocol import AdapterUse, EmbedRequest, GenerateRequest


def uses_of(requests: Iterable[GenerateRequest | EmbedRequest]) -> dict[str, tuple[AdapterUse, ...]]:
    """By content; each request says the tenant and the name, however many names the content has."""
    counted = Counter(
        (part.adapter.id, request.tenant, part.adapter.name) for request in requests for part in request.parts
    )
    uses: dict[str, tuple[AdapterUse, ...]] = {}
    for (adapter_id, tenant, name), number in counted.items():
        uses[adapter_id] = (*uses.get(adapter_id, ()), AdapterUse(tenant, name, number))
    return uses
