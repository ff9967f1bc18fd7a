"""The way of a version from `registered` over `fetching` to `ready` or `failed`, whoever waits for it.

What a stopped gateway left unfinished is taken up at the next start of any, perhaps while another still brings it: once
one has made it ready, the others leave it alone. A version that was ready once is its content for ever: files that come
back different make it `failed`.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from loraplex.engines.adapters.recipe import MergeRecipe
from loraplex.engines.errors import (
    AdapterMismatch,
    AdapterNotFound,
    AdapterSourceUnavailable,
    EngineError,
    EngineUnavailable,
)
from loraplex.engines.protocol import Adapter, AdapterCard, Engine
from loraplex.gateway.adapter_records import AdapterRecords, Key, Version
from loraplex.gateway.uploads import Incoming

_log = logging.getLogger("loraplex.gateway")
_ENGINE_PAUSE_SECONDS = 0.2
_MAX_FETCHES = 5


class Stored(Protocol):
    """What a store says of an adapter it fetched."""

    @property
    def adapter(self) -> Adapter: ...
    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


class Store(Protocol):
    """Brings an adapter's files to this machine. Raises AdapterError."""

    async def address(self, uri: str) -> str:
        """The normal form of an address, fit to be shown."""
        ...

    async def fetch(
        self, uri: str, name: str, *, token: str | None = None, content: str = "", revision: str = ""
    ) -> Stored:
        """`content`, if set, is the hash that the files must have, of the revision of that time."""
        ...

    def place(self, adapter_id: str) -> Path:
        """Where an adapter's files lie on this machine, if they are here."""
        ...

    def hold(self, adapter: Adapter) -> AbstractContextManager[Path]:
        """Keep an adapter's files from eviction. Raises AdapterNotFound where they are gone already."""
        ...

    def receive(self) -> AbstractContextManager[Incoming]:
        """An upload, of which nothing stays unless it is kept. Blocks."""
        ...

    async def drop_uploads(self, kept: Collection[str], *, older_than_seconds: float = 0.0) -> None:
        """Remove the uploads whose addresses are not among those `kept`, unless they are new."""
        ...

    async def merge(self, recipe: MergeRecipe, name: str) -> Stored:
        """One adapter out of several that were fetched."""
        ...


class SourceTokens(Protocol):
    """The credentials that a tenant keeps for sources."""

    async def token_for(self, tenant_id: str, address: str) -> str | None: ...


class NoTokens:
    """Every source is read without any."""

    async def token_for(self, tenant_id: str, address: str) -> str | None:
        return None


class OtherBase(msgspec.Struct, frozen=True):
    """What to do with an adapter that says it was made for a base of another name than these."""

    names: frozenset[str]
    action: Literal["warn", "refuse"] = "warn"

    def judge(self, directory: str) -> tuple[str, ...]:
        """Notes for the operator. Raises AdapterMismatch where such an adapter is refused."""
        config = json.loads((Path(directory) / "adapter_config.json").read_bytes())
        made_for = config.get("base_model_name_or_path")
        if not isinstance(made_for, str) or not made_for or not self.names or _short(made_for) in self.names:
            return ()
        told = f"it says it was made for {made_for[:200]!r}, which is no name of this base (adapters.base_names)"
        if self.action == "refuse":
            raise AdapterMismatch(told)
        return (told,)


class Arrivals:
    """Fetches versions, checks them against the base, and enters what they are. For one event loop."""

    def __init__(
        self,
        records: AdapterRecords,
        store: Store,
        engine: Engine,
        on_change: Callable[[Key], Awaitable[None]],
        tokens: SourceTokens,
        other_base: OtherBase,
    ) -> None:
        """`on_change` is called when a version has another state."""
        self._records = records
        self._store = store
        self._engine = engine
        self._on_change = on_change
        self._tokens = tokens
        self._other_base = other_base
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: set[tuple[Key, int, float]] = set()

    async def bring(
        self, key: Key, version: Version, uri: str | None = None, *, waits_for_engine: bool = False
    ) -> None:
        """Fetch a version and enter it as ready, unless it is. Raises EngineError, and then it is left as `fetching`.

        `uri` is its source with what is not kept of it: a query may be a signature.
        """
        own = _identity(key, version)
        self._under_way.add(own)
        try:
            if await self._records.advance(key, version, "fetching"):
                await self._on_change(key)
                found = await self.examine(key, version, uri, waits_for_engine=waits_for_engine)
                await self._records.complete(key, version, found)
        finally:
            self._under_way.discard(own)
        await self._on_change(key)

    async def examine(
        self, key: Key, version: Version, uri: str | None = None, *, waits_for_engine: bool = False
    ) -> dict[str, Any]:
        """What a version is, as columns of its row; enters nothing. Raises EngineError."""
        token = await self._tokens.token_for(key[0], version.source)
        with ExitStack() as held:
            stored = await self._fetch_and_hold(key[1], version, uri or version.source, token, held)
            card = version.card or await self._inspect(stored.adapter, waits_for_engine)
            notes = await asyncio.to_thread(self._other_base.judge, stored.adapter.path)
        return {
            "adapter_id": stored.adapter.id,
            "revision": version.revision or stored.revision,
            "num_bytes": stored.num_bytes,
            "card": msgspec.to_builtins(card),
            "notes": list(notes),
        }

    def begin(self, key: Key, version: Version, uri: str | None = None) -> None:
        """Bring a version while nobody waits; it becomes ready or failed. One that is under way is left alone."""
        if _identity(key, version) not in self._under_way:
            task = asyncio.create_task(self._bring_alone(key, version, uri))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop what is under way; the next start takes it up."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring_alone(self, key: Key, version: Version, uri: str | None) -> None:
        try:
            await self.bring(key, version, uri, waits_for_engine=True)
            return
        except EngineError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  a task that dies unseen would leave it fetching for ever
            _log.exception("adapter %s, version %d could not be brought", key[1], version.number)
            reason = f"an error of the server: {type(error).__name__}"
        _log.warning("adapter %s, version %d failed: %s", key[1], version.number, reason)
        await self._records.advance(key, version, "failed", reason)
        await self._on_change(key)

    async def _fetch_and_hold(
        self, name: str, version: Version, uri: str, token: str | None, held: ExitStack
    ) -> Stored:
        """The files, kept from eviction until `held` ends: other arrivals may need the room before this one is seen."""
        for _ in range(_MAX_FETCHES):
            stored = await self._store.fetch(
                uri, name, token=token, content=version.adapter_id, revision=version.revision
            )
            with suppress(AdapterNotFound):
                held.enter_context(self._store.hold(stored.adapter))
                return stored
        raise AdapterSourceUnavailable("the disk cache is too small for what is fetched now: adapters.disk_bytes")

    async def _inspect(self, adapter: Adapter, waits_for_engine: bool) -> AdapterCard:
        """One that waits does so until it is cancelled: an engine that stops or failed says nothing of the adapter."""
        while True:
            try:
                return await self._engine.inspect(adapter)
            except EngineUnavailable:
                if not waits_for_engine:
                    raise
            await asyncio.sleep(_ENGINE_PAUSE_SECONDS)


def _identity(key: Key, version: Version) -> tuple[Key, int, float]:
    """A name that was deleted and registered again counts from 1 once more."""
    return key, version.number, version.created_at


def _short(name: str) -> str:
    """What two spellings of one model's name have in common: the last part, in small letters."""
    return name.rstrip("/").rpartition("/")[2].lower()


def base_names(*names: str) -> frozenset[str]:
    """These names as `OtherBase` compares them."""
    return frozenset(_short(name) for name in names if name)
