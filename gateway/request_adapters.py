"""Adapters that a request names itself, registered or not: LoRAX's `adapter_id` and merges, and OpenAI's `model`.

A name of the catalogue is the catalogue's. Anything else is fetched only from sources that the tenant's limits name
(`request_adapters`), and what one tenant's token opened is kept for that tenant alone.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from loraplex.auth.caller import Caller
from loraplex.engines.adapters.recipe import MergePart, MergeRecipe
from loraplex.engines.errors import AdapterSourceForbidden
from loraplex.engines.protocol import Adapter, WeightedAdapter
from loraplex.gateway.catalogue import Catalogue, Route
from loraplex.gateway.errors import MalformedRequest, ModelNotAllowed, ModelNotFound, UnsupportedParameter

MAX_PARTS = 16
MAX_WEIGHT = 100  # either way, as in the `adapters` of OpenAI's routes
MIN_DENSITY = 0.001  # DARE divides what it keeps by the density
_MAX_KNOWN = 4096
_SCHEMES = {"hub": "hf://", "s3": "s3://", "local": "file://"}

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]


class MergedAdapters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several adapters as one: sums of B·A, after PEFT's `add_weighted_adapter`; ranks may differ.

    `linear` is the weighted sum. The others keep the share `density` of each adapter's weights: `ties` the largest,
    those beginning with `dare` random ones; `majority_sign_method` elects the sign in `ties` and `dare_ties`.
    """

    ids: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    weights: Annotated[tuple[float, ...], msgspec.Meta(max_length=MAX_PARTS)]
    merge_strategy: Strategy | None = None
    density: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None

    def check(self) -> None:
        """Raises MalformedRequest for what the types cannot hold."""
        if len(self.ids) != len(self.weights):
            raise MalformedRequest("number of adapter IDs must match number of adapter weights", "merged_adapters")
        if len(set(self.ids)) != len(self.ids):
            raise MalformedRequest("Each adapter can be named once.", "merged_adapters.ids")
        if not all(-MAX_WEIGHT <= weight <= MAX_WEIGHT for weight in self.weights):
            raise MalformedRequest(
                f"A weight is a number from -{MAX_WEIGHT} to {MAX_WEIGHT}.", "merged_adapters.weights"
            )
        if (self.merge_strategy or "linear") != "linear" and (self.density or 0.0) < MIN_DENSITY:
            message = (
                f"{self.merge_strategy} needs a density from {MIN_DENSITY} to 1: the share of each adapter's weights "
                "that it keeps."
            )
            raise MalformedRequest(message, "merged_adapters.density")


class RequestAdapters:
    """Turns what a request says of its adapters into a Route. For one event loop."""

    def __init__(self, catalogue: Catalogue, trust_seconds: float, merge_rank: int = 128) -> None:
        """For `trust_seconds` a source is not asked again what an address means; merges have at most `merge_rank`."""
        self._catalogue = catalogue
        self._merge_rank = merge_rank
        self._trust_seconds = trust_seconds
        self._known: OrderedDict[tuple[str, str, str], tuple[float, Adapter]] = OrderedDict()

    @property
    def base(self) -> str:
        """The name of what is served without an adapter."""
        return self._catalogue.base

    def label(self, name: str, caller: Caller) -> str:
        """What metrics and books call it: by a name of the catalogue, or as what kind of adapter it is."""
        return name if self._catalogue.source_of(name, caller) is not None else "request-adapter"

    def composed(self, parts: tuple[WeightedAdapter, ...]) -> Route:
        """The base with the weighted sum of what these adapters add."""
        return self._catalogue.composed(parts)

    async def route(
        self,
        caller: Caller,
        *,
        adapter_id: str | None = None,
        adapter_source: str | None = None,
        api_token: str | None = None,
        merged: MergedAdapters | None = None,
        user: str | None = None,
    ) -> Route:
        """Where the request leads; without `adapter_id` and `merged`, to the base.

        `adapter_source` is `hub`, `local` or `s3`; unset means the catalogue first and then, for what it does not know,
        the hub. `api_token` is for the source, and kept nowhere; unset means the tenant's own for the hub and S3, not
        for https, where a request could name a host of its own to be sent it. `user` sticks to one target of a
        weighted route.
        Raises MalformedRequest, UnsupportedParameter, ModelNotFound, ModelNotAllowed, AdapterError.
        """
        if merged is None:
            if not adapter_id:
                return await self._catalogue.route(self._catalogue.base, caller)
            return await self._single(caller, adapter_id, adapter_source, api_token, user)
        if adapter_id:
            raise MalformedRequest("at most one of `adapter_id` or `adapters` may be provided", "adapter_id")
        merged.check()
        routes = await asyncio.gather(
            *(self._single(caller, name, adapter_source, api_token, user) for name in merged.ids)
        )
        parts = []
        for name, weight, found in zip(merged.ids, merged.weights, routes, strict=True):
            if found.adapter is None:
                raise MalformedRequest(f"{name!r} is the base model, not an adapter.", "merged_adapters.ids")
            parts.append(WeightedAdapter(found.adapter, weight))
        return await self._merge(tuple(parts), merged)

    async def _merge(self, parts: tuple[WeightedAdapter, ...], merged: MergedAdapters) -> Route:
        if len({part.adapter.id for part in parts}) < len(parts):
            raise MalformedRequest("Two of them are the same adapter; name it once.", "merged_adapters.ids")
        strategy = merged.merge_strategy or "linear"
        if strategy == "linear":
            return self._catalogue.composed(parts)
        recipe = MergeRecipe(
            parts=tuple(
                MergePart(adapter_id=part.adapter.id, path=part.adapter.path, weight=part.weight) for part in parts
            ),
            strategy=strategy,
            density=merged.density or 0.0,
            sign_method=merged.majority_sign_method or "total",
            max_rank=self._merge_rank,
        )
        name = f"{strategy}({', '.join(part.adapter.name for part in parts)})"[:128]
        stored = await self._catalogue.store.merge(recipe, name)
        return Route(base=self._catalogue.base, adapter=stored.adapter)

    async def _single(
        self, caller: Caller, adapter_id: str, source: str | None, token: str | None, user: str | None
    ) -> Route:
        kind = None if source is None else source.lower()
        if kind is not None and kind not in _SCHEMES:
            raise UnsupportedParameter(f"adapter_source may be one of {', '.join(_SCHEMES)}.", "adapter_source")
        if self._is_registered(caller, adapter_id, kind):
            return await self._catalogue.route(adapter_id, caller, user=user)
        patterns = caller.policy.request_adapters
        if kind is None and not (patterns and _may_be_address(adapter_id)):
            raise ModelNotFound(f"The model {adapter_id!r} does not exist or you do not have access to it.", "model")
        if not caller.policy.may_use(adapter_id):
            raise ModelNotAllowed(f"This key may not use the model {adapter_id!r}.", "model")
        return Route(base=self._catalogue.base, adapter=await self._fetch(caller, adapter_id, kind, token))

    def _is_registered(self, caller: Caller, name: str, kind: str | None) -> bool:
        """Whether the catalogue knows the name, and from the kind of source that was named, if one was.

        A name without a slash is no address on the hub or in a bucket, so it is the catalogue's, whichever was named.
        """
        source = self._catalogue.source_of(name, caller)
        if source is None:
            return False
        is_from_there = kind is None or source == "" or source.startswith(_SCHEMES[kind])
        is_no_address = "/" not in name if kind != "local" else source.startswith("upload:")
        return is_from_there or is_no_address

    async def _fetch(self, caller: Caller, adapter_id: str, kind: str | None, token: str | None) -> Adapter:
        uri = _uri(adapter_id, kind)
        address = await self._address(caller, uri)
        if address is None:
            # told as it was sent: the address says where on this machine a relative path leads
            raise AdapterSourceForbidden(
                f"{adapter_id}: this tenant may not use unregistered adapters from here (limits: request_adapters)"
            )
        key = caller.tenant_id, uri, "" if token is None else hashlib.sha256(token.encode()).hexdigest()
        known = self._known.get(key)
        if known is not None and known[0] > time.monotonic() and Path(known[1].path).is_dir():  # noqa: ASYNC240
            return known[1]
        if token is None and not address.startswith("https:"):
            token = await self._catalogue.token_for(caller.tenant_id, address)
        stored = await self._catalogue.store.fetch(uri, without_query(adapter_id), token=token)
        self._known[key] = time.monotonic() + self._trust_seconds, stored.adapter
        self._known.move_to_end(key)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return stored.adapter

    async def _address(self, caller: Caller, uri: str) -> str | None:
        """What an address leads to; None, whatever the reason, where this caller may not fetch from there."""
        try:
            address = await self._catalogue.store.address(uri)
        except AdapterSourceForbidden:
            return None
        return None if address.startswith("upload:") or not caller.policy.may_fetch(address) else address


def without_query(name: str) -> str:
    """As it may be told and kept: what stands behind an address's `?` may be its signature. No name has any."""
    return name.partition("?")[0]


def _may_be_address(adapter_id: str) -> bool:
    """A path, an address with its scheme, or the hub's `organisation/name`."""
    return adapter_id.startswith("/") or "://" in adapter_id or adapter_id.partition("@")[0].count("/") == 1


def _uri(adapter_id: str, kind: str | None) -> str:
    """The address that LoRAX's two fields mean. Raises MalformedRequest where they contradict each other."""
    if kind is None:
        return adapter_id if "://" in adapter_id or adapter_id.startswith("/") else f"hf://{adapter_id}"
    scheme = _SCHEMES[kind]
    if adapter_id.startswith(scheme) or kind == "local":
        return adapter_id
    if "://" in adapter_id:
        raise MalformedRequest(f"adapter_source is {kind}, but adapter_id is {adapter_id!r}.", "adapter_source")
    return scheme + adapter_id
