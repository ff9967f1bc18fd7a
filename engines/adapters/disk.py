"""The disk tier: adapters by the hash of their content, written once, bounded in size, shared by processes.

    objects/<id[:2]>/<id>/   the files, read-only, with a manifest.json; appears and leaves by one rename
    staging/<random>/        what is being fetched or removed; its owner holds a lock on it, so the dead are known
    refs/<hash>              (source, revision) -> id, so that a known revision is not fetched again

Whoever uses an object holds a shared lock on its directory; eviction needs the exclusive one. The kernel drops the
locks of a killed process. The cache must lie on a local file system: NFS does not lock directories.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from loraplex.engines.adapters.locks import flock, try_flock
from loraplex.engines.adapters.manifest import check, sync, write_manifest
from loraplex.engines.adapters.sources.base import Workspace
from loraplex.engines.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterSourceUnavailable,
    AdapterTooLarge,
    DiskCacheFull,
)

_ID = re.compile(r"[0-9a-f]{64}")


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter in the cache; `num_bytes` without the manifest."""

    id: str
    path: str
    num_bytes: int


class DiskCache:
    """A content-addressed directory of at most `max_bytes`. All methods block and may be called from any thread.

    The least recently used leave it when it is full; where it is `for_good`, what is new is refused instead.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        on_evict: Callable[[str], None] = lambda object_id: None,
        *,
        for_good: bool = False,
    ) -> None:
        """`on_evict` is told the id of each object that leaves, in the thread that removes it."""
        self._on_evict = on_evict
        self._for_good = for_good
        self._objects, self._staging, self._refs = root / "objects", root / "staging", root / "refs"
        self._directories = (root, self._objects, self._staging, self._refs)
        self._max_bytes = max_bytes
        self._guard = threading.Lock()
        self._holds: dict[str, tuple[int, int]] = {}  # id -> (descriptor with the shared lock, holders)
        self._verified: set[str] = set()
        self._sizes: dict[str, int] = {}  # of those seen at the last look: an object never changes
        self._make_directories()
        self._sweep()

    @contextmanager
    def stage(self) -> Iterator[Workspace]:
        """Two empty directories on the cache's file system, gone afterwards."""
        self._make_directories()  # someone may have emptied the cache
        path, descriptor = self._claim()
        try:
            workspace = Workspace(files=path / "files", scratch=path / "scratch")
            workspace.files.mkdir()
            workspace.scratch.mkdir()
            yield workspace
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def commit(self, workspace: Workspace) -> StoredObject:
        """Move staged files into the cache, making room. Raises AdapterTooLarge, and DiskCacheFull where there would be
        room without what is held.

        What can be fetched again is not forced to the disk, for which its request would wait longer than for all else
        here: after a loss of power, `find` removes what is not whole.
        """
        manifest = write_manifest(workspace.files, workspace.digests, durable=self._for_good)
        if (known := self.find(manifest.id)) is not None:
            return known
        place = self.place(manifest.id)
        with flock(self._objects):  # one process at a time counts and adds, so the bound is strict
            if not place.exists():
                self._make_room(_size(workspace.files))
                place.parent.mkdir(mode=0o700, exist_ok=True)
                os.rename(workspace.files, place)
                if self._for_good:
                    sync(place.parent)
                    sync(self._objects)
        self._touch(place)
        with self._guard:
            self._verified.add(manifest.id)
        return StoredObject(id=manifest.id, path=str(place), num_bytes=manifest.num_bytes)

    def place(self, object_id: str) -> Path:
        """Where an object lies if it is here. Raises AdapterNotFound for what cannot be an id."""
        if not _ID.fullmatch(object_id):
            raise AdapterNotFound(f"{object_id!r} is not the id of an adapter")
        return self._objects / object_id[:2] / object_id

    def find(self, object_id: str) -> StoredObject | None:
        """An object, now the most recently used; None where there is none. A damaged one is removed.

        Its bytes are hashed once in the life of this process.
        """
        place = self.place(object_id)
        try:
            manifest = check(place, read_bytes=object_id not in self._verified)
        except FileNotFoundError:
            return None
        except AdapterInvalid:
            self._remove_damaged(place)
            return None
        with self._guard:
            self._verified.add(object_id)
        self._touch(place)
        return StoredObject(id=object_id, path=str(place), num_bytes=manifest.num_bytes)

    def verify(self, object_id: str) -> None:
        """Hash an object again. Raises AdapterNotFound; AdapterInvalid naming the file that changed."""
        try:
            check(self.place(object_id), read_bytes=True)
        except FileNotFoundError as error:
            raise AdapterNotFound(f"the disk cache does not hold {object_id}") from error

    @contextmanager
    def hold(self, object_id: str) -> Iterator[Path]:
        """Keep an object from eviction, by any process. Raises AdapterNotFound where it is gone already."""
        with self._guard:
            descriptor, holders = self._holds.get(object_id) or (self._lock_shared(object_id), 0)
            self._holds[object_id] = descriptor, holders + 1
        place = self.place(object_id)
        try:
            self._touch(place)
            yield place
        finally:
            with self._guard:
                descriptor, holders = self._holds.pop(object_id)
                if holders > 1:
                    self._holds[object_id] = descriptor, holders - 1
                else:
                    os.close(descriptor)

    def remember(self, source: str, revision: str, object_id: str, workspace: Workspace) -> None:
        """Note that this revision of this source is that object. The source must never reuse a revision."""
        draft = workspace.scratch / "ref"
        draft.write_text(object_id)
        os.replace(draft, self._refs / _ref(source, revision))

    def recall(self, source: str, revision: str) -> StoredObject | None:
        """The object that this revision was, if it is still here."""
        try:
            object_id = (self._refs / _ref(source, revision)).read_text()
        except FileNotFoundError:
            return None
        return self.find(object_id) if _ID.fullmatch(object_id) else None

    def usage(self) -> tuple[int, int]:
        """(objects, bytes on disk) right now, of all processes that share the cache."""
        sizes = self._look()
        return len(sizes), sum(sizes.values())

    def ids(self, before: float = math.inf) -> list[str]:
        """Every object last used before a time, in seconds since 1970; the least recently used first."""
        return [object_id for used_at, object_id, _ in self._by_last_use() if used_at / 1e9 < before]

    def drop(self, object_id: str) -> bool:
        """Remove an object unless someone holds it; whether it is gone."""
        with flock(self._objects):
            return not self.place(object_id).exists() or self._evict(object_id)

    def _make_directories(self) -> None:
        for directory in self._directories:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _look(self) -> dict[str, int]:
        """id -> bytes on disk of every object. There may be thousands, so only those that are new are measured."""
        known, found = self._sizes, {}
        for shelf in os.listdir(self._objects) if self._objects.exists() else ():
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(self._objects / shelf):
                    with suppress(FileNotFoundError, NotADirectoryError):  # another process evicts
                        if _ID.fullmatch(name):
                            found[name] = known.get(name) or _size(self._objects / shelf / name)
        self._sizes = found
        return found

    def _by_last_use(self) -> list[tuple[int, str, int]]:
        """(last use in ns, id, bytes on disk) of every object, sorted."""
        found = []
        for object_id, size in self._look().items():
            with suppress(FileNotFoundError):
                found.append((self.place(object_id).stat().st_mtime_ns, object_id, size))
        return sorted(found)

    def _make_room(self, num_bytes: int) -> None:
        misfit = f"{num_bytes} bytes do not fit the disk cache: adapters.disk_bytes = {self._max_bytes}"
        if num_bytes > self._max_bytes:
            raise AdapterTooLarge(misfit)
        excess = sum(self._look().values()) + num_bytes - self._max_bytes
        if excess <= 0:
            return
        if self._for_good:
            raise AdapterTooLarge(f"{num_bytes} bytes more do not fit the uploads: adapters.upload_bytes")
        for _, object_id, size in self._by_last_use():
            if excess <= 0:
                return
            if self._evict(object_id):
                excess -= size
        if excess > 0:
            raise DiskCacheFull(f"{misfit}, and what it holds is in use")

    def _evict(self, object_id: str) -> bool:
        """Remove an object unless someone holds it."""
        place = self.place(object_id)
        descriptor = try_flock(place, exclusive=True)
        if descriptor is None:
            return False
        try:
            self._discard(place)
        finally:
            os.close(descriptor)
        self._on_evict(object_id)
        return True

    def _remove_damaged(self, place: Path) -> None:
        """Look again where nobody adds or evicts: what seemed damaged may have been leaving, or be new by now."""
        with flock(self._objects):
            try:
                check(place, read_bytes=True)
            except AdapterInvalid:
                self._discard(place)
            except FileNotFoundError:
                return

    def _discard(self, place: Path) -> None:
        """Take an object out of sight by one rename, then delete it."""
        trash = self._staging / secrets.token_hex(8)
        with suppress(FileNotFoundError):
            os.rename(place, trash)
        shutil.rmtree(trash, ignore_errors=True)
        with self._guard:
            self._verified.discard(place.name)

    def _lock_shared(self, object_id: str) -> int:
        place = self.place(object_id)
        descriptor = try_flock(place, exclusive=False)
        if descriptor is None:
            raise AdapterNotFound(f"the disk cache does not hold {object_id}")
        return descriptor

    def _claim(self) -> tuple[Path, int]:
        """A new staging directory and its lock; another one, where a sweeper took it for a dead process's."""
        while True:
            path = self._staging / secrets.token_hex(8)
            path.mkdir(mode=0o700)
            if (descriptor := try_flock(path, exclusive=True)) is not None:
                return path, descriptor

    def _sweep(self) -> None:
        """Remove what killed processes left in staging, and references to objects that are gone."""
        for path in self._staging.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)
            descriptor = try_flock(path, exclusive=True)
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)
        for ref in self._refs.iterdir():
            with suppress(FileNotFoundError):
                object_id = ref.read_text()
                if not _ID.fullmatch(object_id) or not self.place(object_id).is_dir():
                    ref.unlink()

    def _touch(self, place: Path) -> None:
        now = time.time_ns()
        with suppress(FileNotFoundError):
            os.utime(place, ns=(now, now))


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A disk that is full, or refuses otherwise, is AdapterSourceUnavailable: a later try may find it emptier."""
    try:
        yield
    except OSError as error:
        raise AdapterSourceUnavailable(f"{what} cannot be written: {error.strerror}") from error


def _ref(source: str, revision: str) -> str:
    return hashlib.sha256(f"{source}\0{revision}".encode()).hexdigest()


def _size(directory: Path) -> int:
    with os.scandir(directory) as entries:
        return sum(entry.stat().st_size for entry in entries)
