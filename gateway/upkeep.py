"""What the catalogue does on its own while the server runs: preloads, notes uses, keeps pins, unloads what is gone."""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Coroutine
from typing import Any, Protocol

from sqlalchemy.exc import SQLAlchemyError

from loraplex.engines.errors import AdapterInUse, AdapterSourceUnavailable, EngineError, EngineUnavailable
from loraplex.engines.protocol import Engine
from loraplex.gateway.adapter_records import SHARED, AdapterRecords, Key, Registered
from loraplex.gateway.errors import AdapterNotReady, GatewayError

_log = logging.getLogger("loraplex.gateway")
_ROUND_SECONDS = 1.0
_UPLOAD_SECONDS = 3600.0  # how long an upload may be nobody's: another gateway enters it once it is checked
_IDLE_SECONDS = 0.1


class Kept(Protocol):
    """The catalogue, as upkeep sees it."""

    def everything(self) -> list[Registered]: ...

    async def warm(self, key: Key) -> Registered: ...

    async def forget_uploads(self, *, older_than_seconds: float) -> None: ...


class Upkeep:
    """One background task, one for what is preloaded, and one for each deletion that waits for its requests."""

    def __init__(self, records: AdapterRecords, engine: Engine, kept: Kept) -> None:
        self._records = records
        self._engine = engine
        self._kept = kept
        self._used: dict[Key, float] = {}
        self._unwritten: set[Key] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, preload: Collection[str] = ()) -> None:
        """`preload` names shared adapters that are brought to the device as soon as both are ready."""
        self._run(self._rounds())
        self._run(self._preload(preload))

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._write_uses()

    def note_use(self, key: Key) -> None:
        """A request names it now."""
        self._used[key] = time.time()
        self._unwritten.add(key)

    def last_used_at(self, entry: Registered) -> float | None:
        return self._used.get(entry.key, entry.last_used_at)

    def unload_when_idle(self, adapter_ids: Collection[str]) -> None:
        """Take contents off the device as soon as no request uses them."""
        for adapter_id in adapter_ids:
            self._run(self._unload(adapter_id))

    async def keep_pins(self) -> None:
        """Pin what is to be pinned and is not, and let go of its earlier versions. Never raises EngineError."""
        pinned_entries = [entry for entry in self._kept.everything() if entry.pinned and entry.current_version]
        if not pinned_entries:
            return  # without asking the engine, whose answer grows with what it holds
        try:
            pinned = {found.adapter_id for found in await self._engine.residency() if found.pinned}
            for entry in pinned_entries:
                for version in entry.versions:
                    if version.number != entry.current_version and version.adapter_id in pinned:
                        await self._engine.pin(entry.adapter(version.number), pinned=False)
                if entry.shown.adapter_id not in pinned:
                    await self._engine.pin(entry.adapter(), pinned=True)
        except EngineUnavailable:
            return  # a later round
        except EngineError as error:
            _log.warning("a pinned adapter could not be brought to the device: %s", error)

    async def _rounds(self) -> None:
        was_ready = False
        forgotten_at = -math.inf
        while True:
            is_ready = self._engine.health().state == "ready"
            if is_ready and not was_ready:
                await self.keep_pins()
            was_ready = is_ready
            try:
                await self._write_uses()
            except (SQLAlchemyError, OSError) as error:
                _log.warning("when adapters were last used could not be written: %s", type(error).__name__)
            if time.monotonic() - forgotten_at > _UPLOAD_SECONDS:
                forgotten_at = time.monotonic()
                await self._kept.forget_uploads(older_than_seconds=_UPLOAD_SECONDS)
            await asyncio.sleep(_ROUND_SECONDS)

    async def _preload(self, names: Collection[str]) -> None:
        while names:
            names = [name for name in names if not await self._has_preloaded(name)]
            await asyncio.sleep(_ROUND_SECONDS)

    async def _has_preloaded(self, name: str) -> bool:
        """Whether it is on the device, or will not come; False where it is worth another try."""
        if self._engine.health().state != "ready":
            return False
        try:
            await self._kept.warm((SHARED, name))
        except (EngineUnavailable, AdapterSourceUnavailable, AdapterNotReady):
            return False
        except (EngineError, GatewayError) as error:
            _log.warning("adapters.preload: %s: %s", name, error)
        return True

    async def _write_uses(self) -> None:
        if self._unwritten:
            unwritten, self._unwritten = self._unwritten, set()
            await self._records.used({key: self._used[key] for key in unwritten})

    async def _unload(self, adapter_id: str) -> None:
        while True:
            try:
                return await self._engine.unload(adapter_id)
            except AdapterInUse:
                await asyncio.sleep(_IDLE_SECONDS)
            except EngineError:
                return None  # whatever engine comes next does not know it

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
