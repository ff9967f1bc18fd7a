"""Model name -> Route(base, adapter): the only place that names are entered, changed and followed.

The tables are in the database; requests read a snapshot in memory (`names.py`), where an entry is replaced as a whole
on every change, so that a request sees either the old version of a name or the new one.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Self

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.caller import Caller
from loraplex.engines.errors import AdapterChanged, AdapterInUse, EngineError
from loraplex.engines.protocol import Adapter, AdapterResidency, Engine, WeightedAdapter
from loraplex.gateway.adapter_records import SHARED, AdapterRecords, Key, Registered, Target, Version
from loraplex.gateway.arrivals import Arrivals, NoTokens, OtherBase, SourceTokens, Store
from loraplex.gateway.errors import (
    AdapterFailed,
    AdapterNotReady,
    AdapterNotRegistered,
    MalformedRequest,
    ModelNotAllowed,
    ModelNotFound,
    PinsFull,
)
from loraplex.gateway.names import Names, contents, version_of
from loraplex.gateway.pins import PinBudget, PinShares
from loraplex.gateway.upkeep import Upkeep


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model name leads: a base model and perhaps an adapter, or several that are added up."""

    base: str
    adapter: Adapter | None
    composition: tuple[WeightedAdapter, ...] = ()


class Catalogue:
    """The models of one server: its base, the adapters registered for it, and routes between them."""

    def __init__(
        self,
        database: AsyncEngine,
        store: Store,
        engine: Engine,
        base: str,
        *,
        tokens: SourceTokens | None = None,
        other_base: OtherBase | None = None,
        preload: tuple[str, ...] = (),
        pin_shares: PinShares | None = None,
    ) -> None:
        """Adapters that name another base than `other_base` knows are treated as it says; None asks nothing.

        `preload` names shared adapters that are brought to the device at the start.
        """
        self.base = base
        self.store = store
        self._engine = engine
        self._records = AdapterRecords(database)
        self._names = Names(base, {})
        self._reloading = asyncio.Lock()  # or an older reading of the table could replace a newer one
        self._tokens = tokens or NoTokens()
        other_base = other_base or OtherBase(frozenset())
        self._arrivals = Arrivals(self._records, store, engine, self._refresh, self._tokens, other_base)
        self._pin_budget = PinBudget(engine, pin_shares or PinShares())
        self._upkeep = Upkeep(self._records, engine, self, self._pin_budget)
        self._preload = preload

    async def __aenter__(self) -> Self:
        """Read the tables, and take up what a stopped process left."""
        await self.reload()
        self._upkeep.start(self._preload)
        for entry in self.everything():
            for version in entry.versions:
                if version.state in ("registered", "fetching"):
                    self._arrivals.begin(entry.key, version)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop what is under way; the next start takes it up."""
        await self._arrivals.close()
        await self._upkeep.close()

    async def reload(self) -> None:
        """Read the tables anew."""
        async with self._reloading:
            self._names = Names(self.base, {entry.key: entry for entry in await self._records.all()})

    async def route(self, model: str, caller: Caller, *, user: str | None = None) -> Route:
        """`model` is a name, or `name@version`: a number, or the first 8 or more digits of the content's hash.

        Where the name is a weighted route, `user` always takes the same way, nobody in particular any.
        Raises ModelNotFound, also for another tenant's adapter, ModelNotAllowed where the caller's limits leave it
        out, AdapterNotReady, AdapterFailed, or AdapterError if its files cannot be had.
        """
        if model == self.base:
            self._require_allowed(model, model, caller)
            return Route(base=self.base, adapter=None)
        found = self._names.resolve(model, caller.tenant_id)
        if found is None:
            raise ModelNotFound(f"The model {model!r} does not exist or you do not have access to it.", "model")
        entry, version = found
        self._require_allowed(model, entry.name, caller)
        self._upkeep.note_use(entry.key)
        if entry.targets:
            entry, version = self._names.target(entry, user)
        assert version is not None, "only routes are without"
        return Route(base=self.base, adapter=await self._adapter(entry, version))

    def composed(self, parts: tuple[WeightedAdapter, ...]) -> Route:
        """The base with the weighted sum of what these adapters add."""
        return Route(base=self.base, adapter=None, composition=parts)

    def source_of(self, model: str, caller: Caller) -> str | None:
        """The source of an adapter this caller may know of; "" for the base; None where there is no such model."""
        entry = self._names.find(model.partition("@")[0], caller.tenant_id)
        return entry.source if entry is not None else "" if model == self.base else None

    def find(self, model: str, caller: Caller) -> tuple[Registered, Version | None] | None:
        """What `name` or `name@version` stands for, ready or not, if this caller may use it; a route has no version."""
        found = self._names.resolve(model, caller.tenant_id)
        return found if found is not None and self._is_allowed(model, found[0].name, caller) else None

    def visible(self, caller: Caller) -> list[Registered]:
        """What this caller may use beside the base, oldest first."""
        mine = [entry for entry in self.everything() if self._names.find(entry.name, caller.tenant_id) is entry]
        return [entry for entry in mine if entry.is_servable and caller.policy.may_use(entry.name)]

    def everything(self) -> list[Registered]:
        """The adapters and routes of all tenants and those shared, oldest first."""
        return list(self._names.entries.values())

    def num_requests(self, entry: Registered, residency: Mapping[str, AdapterResidency]) -> int:
        """How many requests name this entry right now; not those of others that have the same content."""
        return self._names.num_requests(entry, residency)

    def last_used_at(self, entry: Registered) -> float | None:
        """Seconds since 1970; None for one that no request named so far."""
        return self._upkeep.last_used_at(entry)

    def require_free(self, key: Key) -> None:
        """Raises MalformedRequest or AdapterNameTaken for a name that cannot be registered."""
        self._names.require_free(key)

    def has(self, key: Key) -> bool:
        return key in self._names.entries

    async def has_token(self, tenant_id: str, address: str) -> bool:
        """Whether a tenant keeps credentials for a source."""
        return await self.token_for(tenant_id, address) is not None

    async def token_for(self, tenant_id: str, address: str) -> str | None:
        """The credentials that a tenant keeps for a source, to be used and told to nobody."""
        return await self._tokens.token_for(tenant_id, address)

    def get(self, tenant_id: str, name: str) -> Registered:
        """Raises AdapterNotRegistered."""
        return self._names.get((tenant_id, name))

    async def register(self, name: str, source: str, tenant_id: str = SHARED, *, waits: bool = True) -> Registered:
        """Enter a name, fetch its files and check them against the base; without `waits`, later.

        Raises MalformedRequest, AdapterNameTaken, TenantNotFound or AdapterError; the catalogue is then as it was.
        """
        key = tenant_id, name
        self._names.require_free(key)
        address = await self.store.address(source)
        await self._records.add(key, source=address)
        await self._arrive(key, 1, source, waits)
        return self.get(*key)

    async def update(self, key: Key, source: str | None = None, *, waits: bool = True) -> Registered:
        """A new version from this source, or what the old source has by now; requests go to it once it is ready.

        Raises AdapterNotRegistered or AdapterError; requests then go where they went before.
        """
        entry = self._names.adapter(key)
        address = entry.source if source is None else await self.store.address(source)
        number = await self._records.add_version(key, address)
        if number is None:
            raise AdapterNotRegistered(f"There is no adapter {key[1]!r}.", "name")
        await self._arrive(key, number, source or address, waits)
        return self.get(*key)

    async def validate(self, source: str, tenant_id: str = SHARED) -> Version:
        """What would be registered, without doing it. Raises AdapterError."""
        version = Version(number=0, source=await self.store.address(source), created_at=time.time())
        found = await self._arrivals.examine((tenant_id, "validated"), version, source)
        return msgspec.convert({**msgspec.to_builtins(version), "state": "ready", **found}, Version)

    async def retry(self, key: Key, number: int | None = None) -> Registered:
        """Bring the newest failed version, or that one, once more. Raises AdapterNotRegistered, MalformedRequest."""
        entry = self._names.adapter(key)
        failed = [
            version for version in entry.versions if version.state == "failed" and number in (None, version.number)
        ]
        if not failed:
            raise MalformedRequest("There is no failed version to try again.", "version")
        await self._records.advance(key, failed[-1], "registered")
        await self._refresh(key)
        self._arrivals.begin(key, failed[-1])
        return self.get(*key)

    async def roll_back(self, key: Key, wanted: str | None = None) -> Registered:
        """Send requests to an earlier version, or to the one that is named.

        Raises AdapterNotRegistered, or MalformedRequest where there is none that is ready.
        """
        entry = self._names.adapter(key)
        if wanted is None:
            earlier = [one for one in entry.versions if one.adapter_id and one.number < (entry.current_version or 0)]
            version = earlier[-1] if earlier else None
        else:
            version = version_of(entry, wanted)
        if version is None or not version.adapter_id:
            raise MalformedRequest("There is no such version that was ready.", "version")
        await self._records.point(key, version.number)
        await self._refresh(key)
        await self._upkeep.keep_pins(key)
        return self.get(*key)

    async def pin(self, key: Key, *, pinned: bool) -> Registered:
        """Keep the current version on the device, also after restarts, or let go of it.

        While other entries pin the same content it stays. Raises PinsFull or EngineError; nothing has changed then.
        """
        adapter = await self.servable(key)
        if pinned:
            await self._pin(self.get(*key), adapter)
        else:
            await self._records.change(key, pinned=False)
            await self._refresh(key)
            await self._upkeep.release_pins()
        return self.get(*key)

    async def _pin(self, entry: Registered, adapter: Adapter) -> None:
        await self._pin_budget.require_room(entry, self.everything())
        await self._records.change(entry.key, pinned=True)
        try:
            # of two that are written at once, here or by another gateway, the later reader sees both
            await self.reload()
            await self._pin_budget.require_room(self.get(*entry.key), self.everything())
            await self._engine.pin(adapter, pinned=True)
        except (EngineError, PinsFull):
            await self._records.change(entry.key, pinned=entry.pinned)
            await self._refresh(entry.key)
            await self._upkeep.release_pins()
            raise

    async def servable(self, key: Key) -> Adapter:
        """The current version, its files here. Raises GatewayError or AdapterError."""
        entry = self._names.adapter(key)
        return await self._adapter(entry, entry.shown)

    async def warm(self, key: Key) -> Registered:
        """Bring the current version to the device. Raises EngineError."""
        await self._engine.load(await self.servable(key))
        return self.get(*key)

    async def evict(self, key: Key) -> Registered:
        """Take all versions off device and host; the disk keeps them. What others pin or use stays without a word.

        Raises AdapterInUse while requests name this entry.
        """
        entry = self._names.adapter(key)
        await self._unload(entry, contents(entry) - self._names.pinned_by_others(entry))
        return entry

    async def remove(self, tenant_id: str, name: str, *, drains: bool = False) -> None:
        """Raises AdapterNotRegistered, or AdapterInUse while requests or routes name it.

        With `drains`, requests under way finish, new ones find nothing.
        """
        entry = self.get(tenant_id, name)
        if (route := self._names.route_to(entry)) is not None:
            raise AdapterInUse(f"the route {route.name!r} leads to {name!r}")
        alone = self._names.only_its_own(entry)
        left = alone if drains else await self._unload(entry, alone)
        await self._records.remove(entry.key)
        await self._refresh(entry.key)
        self._upkeep.unload_when_idle(left)
        if entry.pinned:
            await self._upkeep.release_pins()

    async def _unload(self, entry: Registered, adapter_ids: set[str]) -> set[str]:
        """Take contents off device and host; those that stay, because others use them.

        Raises AdapterInUse while requests name this entry: whose content is the same must make no difference.
        """
        await self._require_unused(entry)
        left = set()
        for adapter_id in adapter_ids:
            try:
                await self._engine.unload(adapter_id)
            except AdapterInUse:
                await self._require_unused(entry)  # one may just have come
                left.add(adapter_id)
        return left

    async def _require_unused(self, entry: Registered) -> None:
        if not contents(entry):
            return
        if number := self.num_requests(entry, {one.adapter_id: one for one in await self._engine.residency()}):
            raise AdapterInUse(f"{number} requests use the adapter")

    async def let_go(self, tenant_id: str) -> None:
        """Forget the adapters of a deleted tenant; what is in use ends its requests and leaves the device later."""
        gone = {one for entry in self.everything() if entry.tenant_id == tenant_id for one in contents(entry)}
        await self.reload()
        kept = {one for entry in self.everything() for one in contents(entry)}
        self._upkeep.unload_when_idle(gone - kept)

    async def add_route(self, name: str, targets: tuple[Target, ...], tenant_id: str = SHARED) -> Registered:
        """A name that leads to others by weight. Raises MalformedRequest, AdapterNameTaken, TenantNotFound."""
        key = tenant_id, name
        self._names.require_free(key)
        self._names.check_targets(targets, tenant_id)
        await self._records.add(key, targets=targets)
        await self._refresh(key)
        return self.get(*key)

    async def change_route(self, key: Key, targets: tuple[Target, ...]) -> Registered:
        """Other targets or weights for the next request. Raises MalformedRequest, AdapterNotRegistered."""
        self._names.check_targets(targets, key[0])
        await self._records.change(key, targets=msgspec.to_builtins(targets))
        await self._refresh(key)
        return self.get(*key)

    async def forget_uploads(self, *, older_than_seconds: float) -> None:
        """Remove the files of uploads that no version names; a new one may not be entered so far."""
        named = {version.source for entry in self.everything() for version in entry.versions}
        await self.store.drop_uploads(named, older_than_seconds=older_than_seconds)

    async def _refresh(self, key: Key) -> None:
        """Read one name anew."""
        async with self._reloading:
            entry = await self._records.one(key)
            self._names = self._names.changed(key, entry)

    async def _arrive(self, key: Key, number: int, uri: str, waits: bool) -> None:
        await self._refresh(key)
        version = self.get(*key).version(number)
        if version is None:  # deleted meanwhile
            raise AdapterNotRegistered(f"There is no adapter {key[1]!r}.", "name")
        if not waits:
            self._arrivals.begin(key, version, uri)
            return
        try:
            await self._arrivals.bring(key, version, uri)
        except Exception:  # whatever it was, the name is free again
            await self._records.drop_version(key, version)
            await self._refresh(key)
            raise
        await self._upkeep.keep_pins(key)

    async def _adapter(self, entry: Registered, version: Version) -> Adapter:
        """A version, its files fetched again where this gateway's cache lost them or never had them."""
        shown = f"{entry.name}@{version.number}"
        if version.state == "failed":
            raise AdapterFailed(f"The adapter {shown} is not to be had: {version.reason}", "model")
        if version.state != "ready":
            raise AdapterNotReady(f"The adapter {shown} is being fetched; try again shortly.", "model")
        place = self.store.place(version.adapter_id)
        if not place.is_dir():
            await self._restore(entry, version)
        return Adapter(id=version.adapter_id, name=entry.name, path=str(place))

    async def _restore(self, entry: Registered, version: Version) -> None:
        try:
            await self._arrivals.examine(entry.key, version)
        except AdapterChanged as error:  # any other error is this request's: another one may find it back
            await self._records.set_state(entry.key, version, "failed", str(error))
            await self._refresh(entry.key)
            raise

    def _is_allowed(self, model: str, name: str, caller: Caller) -> bool:
        return caller.policy.may_use(name) or caller.policy.may_use(model)

    def _require_allowed(self, model: str, name: str, caller: Caller) -> None:
        if not self._is_allowed(model, name, caller):
            raise ModelNotAllowed(f"This key may not use the model {model!r}.", "model")
