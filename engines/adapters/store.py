"""The way of an adapter's files from where they lie to a content-addressed directory on this machine.

Fetching blocks, so each fetch runs in one thread of a small pool, from the listing to the rename into the cache;
the event loop only waits, shares and gives up.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import logging
import random
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from loraplex.config.settings import Adapters
from loraplex.engines.adapters.disk import DiskCache, StoredObject, writing
from loraplex.engines.adapters.flights import SingleFlight
from loraplex.engines.adapters.merging import merge_in_process
from loraplex.engines.adapters.recipe import MergeRecipe
from loraplex.engines.adapters.screening import screen
from loraplex.engines.adapters.sources.base import Address, Listing, Source, Transfer, TransferStopped, Workspace
from loraplex.engines.adapters.sources.registry import Sources
from loraplex.engines.adapters.sources.selection import check_sizes
from loraplex.engines.adapters.upload import Upload
from loraplex.engines.errors import AdapterChanged, AdapterError, AdapterInvalid, AdapterSourceUnavailable
from loraplex.engines.figures import TierFigures
from loraplex.engines.protocol import Adapter
from loraplex.engines.stats import OTHERS, AdapterTierStats, TierStats

MAX_TOKEN_CHARACTERS = 8192
_MERGED = "merged"
_REMOTE = ("hf://", "s3://", "https://")
_MAX_NAMES = 4096
_logger = logging.getLogger(__name__)


class StoredAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter on this machine. `adapter.id` is the hash of its content.

    `source` is the normalised address without any query. `revision` is what the address meant when it was fetched:
    a commit, S3 version ids, or the content hash where the source knows no revisions. `num_bytes` counts all files.
    """

    adapter: Adapter
    source: str
    revision: str
    num_bytes: int


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How a source that is unavailable is tried again: pauses double, up to the longest."""

    num_attempts: int = 5
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 8.0

    def pause_seconds(self, attempt: int) -> float:
        """The pause after attempt 1, 2, …; the upper half is chance, so that many waiters do not return together."""
        pause = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** (attempt - 1))
        return pause * random.uniform(0.5, 1.0)


DEFAULT_RETRIES = Retries()


class _Fetched(msgspec.Struct, frozen=True):
    """`seconds` the transfer took; None where there was none."""

    stored: StoredObject
    revision: str
    seconds: float | None = None


class AdapterStore:
    """Fetches adapters into the disk cache. One event loop; several processes may share `settings.cache_dir`."""

    def __init__(self, settings: Adapters, *, retries: Retries = DEFAULT_RETRIES) -> None:
        """Raises OSError, naming the setting, where a directory cannot be made."""
        self._settings = settings
        self._retries = retries
        with _naming("adapters.cache_dir"):
            place = Path(settings.cache_dir).expanduser().absolute()
            self._disk = DiskCache(place, settings.disk_bytes, self._count_eviction)
        with _naming("adapters.upload_dir"):
            self._uploads = DiskCache(_upload_dir(settings), settings.upload_bytes, for_good=True)
        self._sources = Sources(settings, self._uploads)
        self._figures = TierFigures("disk", settings.max_names_in_figures)
        self._names: OrderedDict[str, str] = OrderedDict()  # of the adapters served last, for the figures
        self._pool = ThreadPoolExecutor(settings.max_fetches, thread_name_prefix="adapter-fetch")
        self._flights: SingleFlight[tuple[str, str], _Fetched] = SingleFlight()
        self._is_closed = False

    async def fetch(
        self, uri: str, name: str, *, token: str | None = None, content: str = "", revision: str = ""
    ) -> StoredAdapter:
        """Bring an adapter to this machine, or find it here. Raises AdapterError; the message names the address.

        A token authorises this fetch at its source and is kept nowhere. Fetches of the same address with the same
        token at the same time share one transfer. `content` asks for exactly these files, known by their hash, as the
        source had them at `revision`; where it has others by now, the error is AdapterChanged.
        """
        if self._is_closed:
            raise AdapterSourceUnavailable("the adapter store is closed")
        if token is not None and not _is_token(token):
            raise AdapterInvalid(f"a token is 1 to {MAX_TOKEN_CHARACTERS} printable ASCII characters without spaces")
        source, address = await self._find(uri)
        shown = address.shown
        if content:
            if (known := await asyncio.to_thread(self._disk.find, content)) is not None:
                return _stored(known, name, shown, revision or known.id)
            address = source.at(address, revision)
        key = address.uri, hashlib.sha256(token.encode()).hexdigest() if token is not None else ""
        try:
            fetched = await self._flights.join(key, functools.partial(self._fly, source, address, token))
        except AdapterError as error:
            raise type(error)(f"{address.shown}: {error}") from error
        self._remember_name(fetched.stored.id, name)
        if fetched.seconds is not None:
            self._figures.found(name, is_hit=False)
            self._figures.loaded(name, fetched.seconds)
        if content and fetched.stored.id != content:
            raise AdapterChanged(f"{shown}: the source has other files by now; those registered are {content[:12]}…")
        return _stored(fetched.stored, name, shown, fetched.revision)

    async def address(self, uri: str) -> str:
        """The normal form of an address, without any query. Raises AdapterInvalid, AdapterSourceForbidden."""
        return (await self._find(uri))[1].shown

    @contextmanager
    def receive(self) -> Iterator[Upload]:
        """An upload, of which nothing stays unless it is kept. Blocks."""
        with ExitStack() as stack:
            with writing("the upload"):
                workspace = stack.enter_context(self._uploads.stage())
            upload = Upload(self._uploads, workspace, self._settings.max_bytes)
            try:
                yield upload
            finally:
                upload.end()

    async def drop_uploads(self, kept: Collection[str], *, older_than_seconds: float = 0.0) -> None:
        """Remove the uploads whose addresses are not among those `kept`, unless they are new."""
        await asyncio.to_thread(self._drop_uploads, frozenset(kept), time.time() - older_than_seconds)

    async def merge(self, recipe: MergeRecipe, name: str) -> StoredAdapter:
        """One adapter out of several that are here, computed in a process of its own, or found. Raises AdapterError.

        The parts are kept from eviction meanwhile; AdapterNotFound means that one was gone already.
        """
        if self._is_closed:
            raise AdapterSourceUnavailable("the adapter store is closed")
        fetched = await self._flights.join((_MERGED, recipe.id), functools.partial(self._fly_merge, recipe))
        return _stored(fetched.stored, name, _MERGED, fetched.revision)

    def place(self, adapter_id: str) -> Path:
        """Where an adapter's files lie on this machine, if they are here."""
        return self._disk.place(adapter_id)

    @contextmanager
    def hold(self, adapter: Adapter) -> Iterator[Path]:
        """Keep an adapter's files from eviction, now the most recently used.

        Raises AdapterNotFound where they are gone; fetch again then.
        """
        with self._disk.hold(adapter.id) as path:
            self._remember_name(adapter.id, adapter.name)
            self._figures.found(adapter.name, is_hit=True)
            yield path

    async def stats(self) -> tuple[TierStats, list[AdapterTierStats]]:
        """The disk tier's figures. A hit is a request that finds the files here, a miss one transfer."""
        num_adapters, num_bytes = await asyncio.to_thread(self._disk.usage)
        return self._figures.stats(num_adapters, num_bytes, self._settings.disk_bytes), [*self._figures.by_adapter()]

    async def close(self) -> None:
        """Give up what is under way; returns when no thread works any more."""
        self._is_closed = True
        await self._flights.cancel_all()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    async def _find(self, uri: str) -> tuple[Source, Address]:
        """As `Sources.find` does; for an address that is a path, which is looked for, in a thread."""
        if uri.startswith(_REMOTE):
            return self._sources.find(uri)
        return await asyncio.to_thread(self._sources.find, uri)

    def _remember_name(self, adapter_id: str, name: str) -> None:
        self._names[adapter_id] = name
        self._names.move_to_end(adapter_id)
        if len(self._names) > _MAX_NAMES:
            self._names.popitem(last=False)

    def _count_eviction(self, adapter_id: str) -> None:
        self._figures.evicted(self._names.get(adapter_id, OTHERS))

    async def _fly(self, source: Source, address: Address, token: str | None) -> _Fetched:
        transfer = Transfer(self._settings.max_bytes)
        return await self._in_thread(functools.partial(self._fetch, source, address, token, transfer), transfer)

    async def _fly_merge(self, recipe: MergeRecipe) -> _Fetched:
        transfer = Transfer(self._settings.max_bytes)
        return await self._in_thread(functools.partial(self._merge, recipe, transfer), transfer)

    async def _in_thread(self, work: Callable[[], _Fetched], transfer: Transfer) -> _Fetched:
        """One piece of work in a thread, until it is done, the deadline is over or nobody waits."""
        seconds = self._settings.fetch_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError as error:
            raise AdapterSourceUnavailable(f"not done within {seconds:g} s") from error
        finally:
            transfer.stop()

    def _drop_uploads(self, kept: frozenset[str], before: float) -> None:
        for object_id in self._uploads.ids(before):
            if f"upload://{object_id}" not in kept:
                self._uploads.drop(object_id)

    def _fetch(self, source: Source, address: Address, token: str | None, transfer: Transfer) -> _Fetched:
        """Attempts in one workspace, so that each resumes what the last one left."""
        last: Listing | None = None
        with writing("the disk cache"), self._disk.stage() as workspace:
            for attempt in itertools.count(1):
                transfer.check()
                try:
                    listing = source.list(address, token, transfer)
                    check_sizes(listing.files, self._settings.max_bytes)
                    if last not in (None, listing):
                        _empty(workspace)
                    last = listing
                    return self._bring(source, address, listing, token, workspace, transfer)
                except AdapterSourceUnavailable as error:
                    if attempt == self._retries.num_attempts:
                        raise
                    _logger.info("%s: attempt %d failed: %s", address.shown, attempt, error)
                transfer.sleep(self._retries.pause_seconds(attempt))
        raise TransferStopped

    def _bring(
        self,
        source: Source,
        address: Address,
        listing: Listing,
        token: str | None,
        workspace: Workspace,
        transfer: Transfer,
    ) -> _Fetched:
        """One attempt: known already, or downloaded, screened and renamed into the cache."""
        revision = listing.revision
        if revision is not None and (known := self._disk.recall(address.uri, revision)) is not None:
            return _Fetched(known, revision)
        began = time.monotonic()
        source.download(address, listing, token, workspace, transfer)
        screen(workspace.files, self._settings.max_bytes)
        transfer.check()
        stored = self._disk.commit(workspace)
        if revision is not None:
            self._disk.remember(address.uri, revision, stored.id, workspace)
        return _Fetched(stored, revision or stored.id, time.monotonic() - began)

    def _merge(self, recipe: MergeRecipe, transfer: Transfer) -> _Fetched:
        if (known := self._disk.recall(_MERGED, recipe.id)) is not None:
            return _Fetched(known, recipe.id)
        with ExitStack() as held, self._disk.stage() as workspace:
            for part in recipe.parts:
                held.enter_context(self._disk.hold(part.adapter_id))
            merge_in_process(recipe, workspace.files, transfer)
            screen(workspace.files, self._settings.max_bytes)
            stored = self._disk.commit(workspace)
            self._disk.remember(_MERGED, recipe.id, stored.id, workspace)
        return _Fetched(stored, recipe.id)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{setting}: {error}") from error


def _upload_dir(settings: Adapters) -> Path:
    """Beside the cache, which may be emptied at any time, unless the settings say where."""
    cache = Path(settings.cache_dir).expanduser().absolute()
    if settings.upload_dir is None:
        return cache.with_name(f"{cache.name}-uploads")
    return Path(settings.upload_dir).expanduser().absolute()


def _stored(found: StoredObject, name: str, source: str, revision: str) -> StoredAdapter:
    adapter = Adapter(id=found.id, name=name, path=found.path)
    return StoredAdapter(adapter=adapter, source=source, revision=revision, num_bytes=found.num_bytes)


def _is_token(token: str) -> bool:
    """Whether a token can stand in a header; libraries quote one that cannot in their errors."""
    return token.isascii() and token.isprintable() and " " not in token and 0 < len(token) <= MAX_TOKEN_CHARACTERS


def _empty(workspace: Workspace) -> None:
    workspace.digests.clear()
    for directory in (workspace.files, workspace.scratch):
        shutil.rmtree(directory)
        directory.mkdir()
