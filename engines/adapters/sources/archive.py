"""An adapter out of a .tar.gz or .zip that nobody vouches for.

Only plain files with wanted names are written, under those names alone, so no path in the archive is ever used.
Everything read is counted: entries, bytes of each, bytes of all, and how much one read may take into memory.
"""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from loraplex.engines.adapters.sources.base import CHUNK_BYTES, Transfer, Workspace
from loraplex.engines.adapters.sources.selection import WANTED, select
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge

MAX_ENTRIES = 1000
MAX_NAME_CHARACTERS = 1024
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # LZMA may ask for gigabytes of dictionary
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, struct.error)
_ODD = (ValueError, OverflowError, RecursionError, NotImplementedError, RuntimeError, LookupError)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One plain file of an archive; `num_bytes` as the archive claims, `stream` its bytes."""

    path: PurePosixPath
    num_bytes: int
    stream: IO[bytes]


def unpack(archive: Path, workspace: Workspace, transfer: Transfer) -> None:
    """Write the wanted files to `workspace.files`. Raises AdapterInvalid, AdapterTooLarge, TransferStopped."""
    try:
        with archive.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"\x1f\x8b":
                _unpack(_tar_entries(file, transfer), workspace, transfer)
            elif magic[:2] == b"PK":
                _unpack(_zip_entries(file, transfer), workspace, transfer)
            else:
                raise AdapterInvalid("the file is neither a .tar.gz nor a .zip")
    except _BROKEN as error:
        raise AdapterInvalid(f"the archive is damaged: {ascii(str(error))[1:-1][:200]}") from error
    except _ODD as error:
        raise AdapterInvalid(f"the archive cannot be read ({type(error).__name__})") from error


def _unpack(entries: Iterator[_Entry], workspace: Workspace, transfer: Transfer) -> None:
    directory: PurePosixPath | None = None
    seen: set[str] = set()
    total = 0
    for entry in entries:
        total += entry.num_bytes
        if total > transfer.max_bytes:
            raise AdapterTooLarge(f"the archive unpacks to more than adapters.max_bytes = {transfer.max_bytes}")
        seen.add(entry.path.name)
        if entry.path.name not in WANTED:
            continue
        if directory not in (None, entry.path.parent):
            raise AdapterInvalid(f"the archive holds several adapters, in {directory} and {entry.path.parent}")
        directory = entry.path.parent
        _write(entry, workspace.files / entry.path.name, transfer)
    select(seen)


def _write(entry: _Entry, path: Path, transfer: Transfer) -> None:
    limit = WANTED[path.name]
    if limit is not None and entry.num_bytes > limit:
        raise AdapterTooLarge(f"{path.name} has {entry.num_bytes} bytes; at most {limit} are read")
    if path.exists():
        raise AdapterInvalid(f"the archive holds {path.name} twice")
    num_bytes = 0
    with path.open("wb") as sink:
        while chunk := entry.stream.read(CHUNK_BYTES):
            transfer.check()
            num_bytes += len(chunk)
            if num_bytes > entry.num_bytes:
                raise AdapterInvalid(f"{path.name} is longer than the archive says")
            sink.write(chunk)
    if num_bytes < entry.num_bytes:
        raise AdapterInvalid(f"{path.name} is shorter than the archive says")


def _tar_entries(file: IO[bytes], transfer: Transfer) -> Iterator[_Entry]:
    # Room for headers and padding beside the files themselves: 4 KiB an entry.
    limit = transfer.max_bytes + MAX_ENTRIES * 4096
    with gzip.GzipFile(fileobj=file) as plain:
        bounded = _BoundedReader(plain, transfer, max_position=limit)
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for number, member in enumerate(archive, 1):
                path = _path(member.name, number)
                if member.isdir():
                    continue
                if member.issym() or member.islnk():
                    raise AdapterInvalid(f"the archive holds a link, {ascii(member.name)[:200]}")
                if not member.isreg() or member.issparse():
                    raise AdapterInvalid(f"the archive holds something not a plain file, {ascii(member.name)[:200]}")
                stream = archive.extractfile(member)
                if stream is not None:
                    yield _Entry(path, member.size, stream)


def _zip_entries(file: IO[bytes], transfer: Transfer) -> Iterator[_Entry]:
    with zipfile.ZipFile(_BoundedReader(file, transfer)) as archive:
        for number, member in enumerate(archive.infolist(), 1):
            path = _path(member.orig_filename, number)
            mode = member.external_attr >> 16
            if member.is_dir():
                continue
            if stat.S_ISLNK(mode):
                raise AdapterInvalid(f"the archive holds a link, {ascii(member.filename)[:200]}")
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise AdapterInvalid(f"the archive holds something not a plain file, {ascii(member.filename)[:200]}")
            if member.flag_bits & 1:
                raise AdapterInvalid("the archive is encrypted")
            if member.compress_type not in _ZIP_METHODS:
                raise AdapterInvalid("the archive is compressed by another method than deflate")
            with archive.open(member) as stream:
                yield _Entry(path, member.file_size, stream)


def _path(name: str, number: int) -> PurePosixPath:
    """The path of an entry. Raises AdapterInvalid for too many entries, or one that points out of the archive."""
    if number > MAX_ENTRIES:
        raise AdapterInvalid(f"the archive holds more than {MAX_ENTRIES} entries")
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable() or "\\" in name:
        raise AdapterInvalid(f"the archive holds the impossible name {ascii(name)[:200]}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise AdapterInvalid(f"the archive holds {ascii(name)[:200]}, which points out of it")
    return path


class _BoundedReader(io.RawIOBase):
    """A stream whose reader is not trusted to ask modestly: archives say how much their reader is to load at once."""

    def __init__(self, inner: Any, transfer: Transfer, max_position: int | None = None) -> None:
        self._inner = inner
        self._transfer = transfer
        self._max_position = max_position

    def read(self, size: int | None = -1) -> bytes:
        self._transfer.check()
        if size is None or size < 0 or size > CHUNK_BYTES:
            return self._read_small(size)
        self._bound(self._inner.tell() + size)
        data: bytes = self._inner.read(size)
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            if position < 0:  # a lie in the archive; an OSError would be taken for the disk's
                raise ValueError("a place before the beginning")
            self._bound(position)
        reached: int = self._inner.seek(position, whence)
        return reached

    def tell(self) -> int:
        position: int = self._inner.tell()
        return position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _read_small(self, size: int | None) -> bytes:
        """What remains, if it is little: zipfile asks for the rest of a file to find its directory."""
        data: bytes = self._inner.read(CHUNK_BYTES + 1)
        if len(data) > CHUNK_BYTES:
            raise AdapterInvalid(f"the archive's directory or a header in it exceeds {CHUNK_BYTES} bytes")
        return data

    def _bound(self, position: int) -> None:
        if self._max_position is not None and position > self._max_position:
            raise AdapterTooLarge(f"the archive unpacks to more than {self._max_position} bytes")
