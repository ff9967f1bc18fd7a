"""Files of tenants: a row in the database says what there is, a directory holds the bytes under the file's id.

The bytes are whole and on disk before the row exists, and the row is gone before they are: a row without its bytes
cannot be seen, and bytes without a row are litter that `sweep` removes.
"""

import asyncio
import os
import re
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from loraplex.auth.store.tables import batches
from loraplex.auth.store.tables import files as table
from loraplex.auth.tenants import require_tenant
from loraplex.config.settings import FileSettings
from loraplex.gateway.errors import CannotOpen, FileInUse, FileNotFound, StorageFull

Purpose = Literal["batch", "batch_output", "user_data"]
Order = Literal["asc", "desc"]
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_ID = re.compile(r"file-[0-9a-f]{24}")
_CHUNK = 2**20
_LITTER_SECONDS = 3600.0  # an upload may still be coming for so long


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file. Times are seconds since 1970; one without `expires_at` stays until it is deleted."""

    id: str
    tenant_id: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: float
    expires_at: float | None = None


class FileStore:
    """The files of all tenants; every question names the tenant, and another's files are not found."""

    def __init__(self, database: AsyncEngine, settings: FileSettings) -> None:
        """Raises CannotOpen where there can be no such directory."""
        self._database = database
        self._settings = settings
        self._directory = Path(settings.directory).expanduser()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CannotOpen(f"files.directory: {error}") from error
        self._arriving: Counter[Path] = Counter()  # bytes of the drafts that are open, by where they lie

    @property
    def max_file_bytes(self) -> int:
        return self._settings.max_file_bytes

    async def open_draft(self, tenant_id: str, *, is_bounded: bool = True) -> "Draft":
        """A file to write. Whoever opens it closes it. Raises StorageFull where the tenant, or the disk, has no room.

        What a tenant was promised, its answers, is written without a bound.
        """
        home, room = self._home(tenant_id), sys.maxsize
        if is_bounded:
            async with self._database.connect() as connection:
                room = self._settings.max_tenant_bytes - await _num_bytes(connection, tenant_id)
        if room <= self._arriving[home]:
            raise self._full()
        with _storing():
            return await asyncio.to_thread(Draft, home, room, self._arriving)

    async def keep(
        self, draft: "Draft", tenant_id: str, filename: str, purpose: Purpose, expires_at: float | None
    ) -> StoredFile:
        """The draft becomes a file. Raises StorageFull where others have taken its room, or TenantNotFound."""
        file = await self.seal(draft, tenant_id, filename, purpose, expires_at)
        try:
            async with self._database.begin() as connection:
                await self.enter(connection, file, is_bounded=True)
        except StorageFull:
            await asyncio.to_thread(self.path(tenant_id, file.id).unlink, missing_ok=True)
            raise
        return file

    async def seal(
        self, draft: "Draft", tenant_id: str, filename: str, purpose: Purpose, expires_at: float | None
    ) -> StoredFile:
        """The draft's bytes are on disk for good; it becomes a file when it is entered. Raises StorageFull."""
        file_id = f"file-{secrets.token_hex(12)}"
        await asyncio.to_thread(draft.move_to, self._home(tenant_id) / file_id)
        return StoredFile(
            id=file_id,
            tenant_id=tenant_id,
            filename=filename,
            purpose=purpose,
            num_bytes=draft.num_bytes,
            created_at=time.time(),
            expires_at=expires_at,
        )

    async def enter(self, connection: AsyncConnection, file: StoredFile, *, is_bounded: bool = False) -> None:
        """Make a sealed file known, as part of a transaction. Raises TenantNotFound, or StorageFull beyond a bound."""
        if file.tenant_id:  # it may have been deleted while the bytes came
            await require_tenant(connection, file.tenant_id, is_alone=is_bounded)
        await connection.execute(insert(table).values(**msgspec.structs.asdict(file)))
        # after the insert, which is what keeps SQLite's other writers out
        if is_bounded and await _num_bytes(connection, file.tenant_id) > self._settings.max_tenant_bytes:
            raise self._full()

    async def get(self, tenant_id: str, file_id: str) -> StoredFile:
        """Raises FileNotFound, also for another tenant's file and one that has expired."""
        async with self._database.connect() as connection:
            return await self._find(connection, tenant_id, file_id)

    async def page(
        self, tenant_id: str, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[list[StoredFile], bool]:
        """(files by their time of creation, whether more follow). Raises FileNotFound for a cursor that is none."""
        mine = _living(tenant_id)
        if purpose is not None:
            mine &= table.c.purpose == purpose
        async with self._database.connect() as connection:
            if after is not None:
                mine &= behind(table, await self._find(connection, tenant_id, after), order)
            query = select(table).where(mine).order_by(*ordering(table, order)).limit(limit + 1)
            found = [_stored(row) for row in await connection.execute(query)]
        return found[:limit], len(found) > limit

    async def delete(self, tenant_id: str, file_id: str) -> None:
        """Raises FileNotFound, or FileInUse while a batch reads it."""
        async with self._database.begin() as connection:
            await self._find(connection, tenant_id, file_id)
            if await _is_read(connection, file_id):
                raise FileInUse("A batch that is not over reads this file; cancel it first, or wait.", "file_id")
            await connection.execute(delete(table).where(table.c.id == file_id))
        await asyncio.to_thread(self.path(tenant_id, file_id).unlink, missing_ok=True)

    def path(self, tenant_id: str, file_id: str) -> Path:
        """Where the bytes of a file lie that was found before."""
        return self._home(tenant_id) / file_id

    async def chunks(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Its bytes. Raises FileNotFound where they are lost."""
        try:
            source = await asyncio.to_thread(self.path(file.tenant_id, file.id).open, "rb")
        except FileNotFoundError as error:
            raise FileNotFound(f"The content of {file.id} is lost.", "file_id") from error
        with source:
            while chunk := await asyncio.to_thread(source.read, _CHUNK):
                yield chunk

    async def let_go(self, tenant_id: str) -> None:
        """Remove the bytes of a tenant that was deleted, rows and all."""
        await asyncio.to_thread(shutil.rmtree, self._home(tenant_id), ignore_errors=True)

    async def sweep(self) -> None:
        """Remove what has expired, unless a batch reads it, and bytes that no row knows."""
        async with self._database.begin() as connection:
            query = select(table.c.id).where(table.c.expires_at <= time.time())
            for (file_id,) in (await connection.execute(query)).all():
                if not await _is_read(connection, file_id):
                    await connection.execute(delete(table).where(table.c.id == file_id))
            known = {file_id for (file_id,) in await connection.execute(select(table.c.id))}
        await asyncio.to_thread(_remove_litter, self._directory, known)

    def _home(self, tenant_id: str) -> Path:
        return self._directory / (tenant_id or "admin")

    def _full(self) -> StorageFull:
        return StorageFull(f"The files of a tenant may take at most {self._settings.max_tenant_bytes} bytes.")

    async def _find(self, connection: AsyncConnection, tenant_id: str, file_id: str) -> StoredFile:
        row = None
        if _ID.fullmatch(file_id):  # other text is not asked for: PostgreSQL refuses some of it
            row = (await connection.execute(select(table).where(_living(tenant_id) & (table.c.id == file_id)))).first()
        if row is None:
            raise FileNotFound(f"There is no file {file_id!r}.", "file_id")
        return _stored(row)


class Draft:
    """Bytes on their way into a file; they are litter until they are moved.

    The drafts that are `arriving` in one home have its `room` together.
    """

    def __init__(self, home: Path, room: int, arriving: Counter[Path]) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._home = home
        self._path = home / f"draft-{secrets.token_hex(12)}"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=_CHUNK)
        self._room = room
        self._arriving = arriving
        self.num_bytes = 0

    async def write(self, chunk: bytes) -> None:
        """Raises StorageFull beyond the tenant's room, or where the disk has none."""
        self.num_bytes += len(chunk)
        self._arriving[self._home] += len(chunk)
        if (excess := self._arriving[self._home] - self._room) > 0:
            left = max(self.num_bytes - excess, 0)
            raise StorageFull(f"The file is larger than what is left of the tenant's storage, {left} bytes.")
        with _storing():
            await asyncio.to_thread(self._file.write, chunk)

    def move_to(self, path: Path) -> None:
        """Whole and on disk under its name. Raises StorageFull where the disk has no room for what was held back."""
        with _storing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.rename(path)

    async def close(self) -> None:
        """Whatever was not moved is gone. Once only: its room is others' from then on."""
        self._arriving[self._home] -= self.num_bytes
        if not self._arriving[self._home]:
            del self._arriving[self._home]
        await asyncio.to_thread(self._discard)

    def _discard(self) -> None:
        with suppress(OSError):  # what a full disk refused, it refuses once more
            self._file.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def _storing() -> Iterator[None]:
    """Whatever keeps bytes from the disk is StorageFull."""
    try:
        yield
    except OSError as error:
        raise StorageFull(f"The server cannot store the file: {error.strerror}.") from error


def ordering(table: Any, order: Order) -> list[Any]:
    """By creation, then by id, so that a cursor has one place."""
    columns = (table.c.created_at, table.c.id)
    return [column.asc() if order == "asc" else column.desc() for column in columns]


def behind(table: Any, cursor: Any, order: Order) -> ColumnElement[bool]:
    """Whatever comes after this row in the order."""
    created, place = table.c.created_at, table.c.id
    if order == "asc":
        return or_(created > cursor.created_at, and_(created == cursor.created_at, place > cursor.id))
    return or_(created < cursor.created_at, and_(created == cursor.created_at, place < cursor.id))


def _living(tenant_id: str) -> ColumnElement[bool]:
    return (table.c.tenant_id == tenant_id) & or_(table.c.expires_at.is_(None), table.c.expires_at > time.time())


async def _num_bytes(connection: AsyncConnection, tenant_id: str) -> int:
    query = select(func.coalesce(func.sum(table.c.num_bytes), 0)).where(table.c.tenant_id == tenant_id)
    return int((await connection.execute(query)).scalar_one())


async def _is_read(connection: AsyncConnection, file_id: str) -> bool:
    query = select(batches.c.id).where(batches.c.input_file_id == file_id, batches.c.status.in_(UNFINISHED)).limit(1)
    return (await connection.execute(query)).first() is not None


def _remove_litter(directory: Path, known: set[str]) -> None:
    before = time.time() - _LITTER_SECONDS
    for path in directory.glob("*/*"):
        if path.name not in known and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)


def _stored(row: Any) -> StoredFile:
    return msgspec.convert({str(column): value for column, value in row._mapping.items()}, StoredFile)
