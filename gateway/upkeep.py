"""What the catalogue does on its own while the server runs: preloads, notes uses, keeps pins, unloads what is gone."""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from sqlalchemy.exc import SQLAlchemyError

from loraplex.auth.errors import AuthError
from loraplex.engines.errors import (
    AdapterInUse,
    AdapterSourceUnavailable,
    DiskCacheFull,
    EngineError,
    EngineUnavailable,
)
from loraplex.engines.protocol import Adapter, Engine
from loraplex.gateway.adapter_records import SHARED, AdapterRecords, Key, Registered
from loraplex.gateway.errors import AdapterNotReady, GatewayError
from loraplex.gateway.pins import PinBudget, pins_of

_log = logging.getLogger("loraplex.gateway")
_ROUND_SECONDS = 1.0
_REPIN_SECONDS = 2.0  # until a pin that failed is tried again; twice as long after every further time
_LONGEST_REPIN_SECONDS = 60.0
_UPLOAD_SECONDS = 3600.0  # how long an upload may be nobody's: another gateway enters it once it is checked
_IDLE_SECONDS = 0.1
_PASSING = (EngineUnavailable, AdapterSourceUnavailable, AdapterNotReady, DiskCacheFull)  # worth another try


class Kept(Protocol):
    """The catalogue, as upkeep sees it."""

    def everything(self) -> list[Registered]: ...

    async def servable(self, key: Key) -> Adapter: ...

    async def warm(self, key: Key) -> Registered: ...

    async def forget_uploads(self, *, older_than_seconds: float) -> None: ...


class Upkeep:
    """One background task, one for what is preloaded, and one for each pin or deletion that waits for something."""

    def __init__(self, records: AdapterRecords, engine: Engine, kept: Kept, pin_budget: PinBudget) -> None:
        self._records = records
        self._engine = engine
        self._kept = kept
        self._pin_budget = pin_budget
        self._pinned: frozenset[str] = frozenset()  # the contents that were to be pinned when that was last seen to
        self._coming: set[str] = set()  # the contents that are being pinned
        self._repin_at = math.inf
        self._repin_seconds = _REPIN_SECONDS
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

    async def release_pins(self) -> None:
        """Let go of what no entry pins any more, and wait for nothing that is to come. Never raises EngineError."""
        with suppress(EngineError):  # a later round
            await self._release(pins_of(self._kept.everything()))

    async def _release(self, entries: Collection[Registered]) -> frozenset[str]:
        """What of these entries' contents is pinned; nothing else is any more."""
        wanted = _contents(entries)
        pinned = {found.adapter_id: found.name for found in await self._engine.residency() if found.pinned}
        for adapter_id in pinned.keys() - wanted:
            await self._engine.pin(Adapter(id=adapter_id, name=pinned[adapter_id], path=""), pinned=False)
        return wanted & pinned.keys()

    async def keep_pins(self, key: Key | None = None) -> None:
        """Have this gateway's engine pin what entries pin, and nothing else; waits for no files.

        With a key, see to that entry alone, and wait until it is done. Never raises EngineError.
        """
        entries = pins_of(self._kept.everything())
        wanted = _contents(entries)
        if not wanted | self._pinned:
            return  # without asking the engine, whose answer grows with what it holds
        try:
            pinned = await self._release(entries)
            kept = [entry for entry in entries if entry.shown.adapter_id in pinned]
            coming = [one for one in entries if one.shown.adapter_id not in pinned and key in (None, one.key)]
            fitting, misfits = await self._pin_budget.fitting(coming, kept)
        except EngineError:
            self._pin_later()
            return
        for name, reason in misfits.items():
            _log.warning("the adapter %s is not kept on the device: %s", name, reason)
        if key is not None:  # the next round sees to the others
            await asyncio.gather(*(self._pin(entry) for entry in fitting))
            return
        self._pinned = wanted
        for entry in fitting:
            if entry.shown.adapter_id not in self._coming:
                self._run(self._pin(entry))  # it may wait for its source, or for room on the device

    async def _pin(self, entry: Registered) -> None:
        """Bring it to the device, and its files here before; where that fails, a later round tries again."""
        adapter_id = entry.shown.adapter_id
        self._coming.add(adapter_id)
        try:
            adapter = await self._kept.servable(entry.key)
            await self._engine.pin(adapter, pinned=True)
        except EngineUnavailable:
            self._pin_later()
        except (EngineError, GatewayError, AuthError, SQLAlchemyError, OSError) as error:
            _log.warning("the pinned adapter %s could not be brought to the device: %s", entry.name, error)
            self._pin_later()
        else:
            self._pinned |= {adapter.id}  # or no round would let go of what is unpinned by now
            self._repin_seconds = _REPIN_SECONDS
        finally:
            self._coming.discard(adapter_id)

    def _pin_later(self) -> None:
        self._repin_at = time.monotonic() + self._repin_seconds

    async def _rounds(self) -> None:
        is_due = True
        pinning: asyncio.Task[None] | None = None
        forgotten_at = -math.inf
        while True:
            is_ready = self._engine.health().state == "ready"
            is_due |= not is_ready or _contents(pins_of(self._kept.everything())) != self._pinned
            if time.monotonic() >= self._repin_at:
                is_due, self._repin_at = True, math.inf
                self._repin_seconds = min(2 * self._repin_seconds, _LONGEST_REPIN_SECONDS)
            if is_ready and is_due and (pinning is None or pinning.done()):
                pinning, is_due = self._run(self.keep_pins()), False
            await self._write_uses()
            if time.monotonic() - forgotten_at > _UPLOAD_SECONDS:
                forgotten_at = time.monotonic()
                await self._forget_uploads()
            await asyncio.sleep(_ROUND_SECONDS)

    async def _forget_uploads(self) -> None:
        try:
            await self._kept.forget_uploads(older_than_seconds=_UPLOAD_SECONDS)
        except OSError as error:
            _log.warning("uploads that no version names could not be removed: %s", error)

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
        except (*_PASSING, SQLAlchemyError, OSError):
            return False
        except (EngineError, GatewayError, AuthError) as error:
            _log.warning("adapters.preload: %s: %s", name, error)
        return True

    async def _write_uses(self) -> None:
        """What cannot be written now, or is cut off, stays for a later round."""
        times = {key: self._used[key] for key in self._unwritten}
        if not times:
            return
        try:
            await self._records.used(times)
        except (SQLAlchemyError, OSError) as error:
            _log.warning("when adapters were last used could not be written: %s", type(error).__name__)
        else:
            self._unwritten -= {key for key, when in times.items() if self._used[key] == when}

    async def _unload(self, adapter_id: str) -> None:
        """As soon as nobody uses it, unless some entry leads to it by then."""
        pause = _IDLE_SECONDS
        while not any(one.adapter_id == adapter_id for entry in self._kept.everything() for one in entry.versions):
            try:
                await self._engine.unload(adapter_id)
            except AdapterInUse:
                await asyncio.sleep(pause)
                pause = min(1.5 * pause, _ROUND_SECONDS)  # the look at all entries is not for nothing
            except EngineError:
                return  # whatever engine comes next does not know it
            else:
                return

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _contents(entries: Collection[Registered]) -> frozenset[str]:
    """The current ones."""
    return frozenset(entry.shown.adapter_id for entry in entries)
