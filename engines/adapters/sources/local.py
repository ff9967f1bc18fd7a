"""Adapters on this machine, below the directories the operator named. Files are copied, never served in place.

A path is resolved first and judged after. Each file is then opened component by component without following links,
so that swapping a directory for a link between the two leads nowhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from loraplex.engines.adapters.sources.base import Address, Listing, RemoteFile, Transfer, Workspace, pieces, receive
from loraplex.engines.adapters.sources.selection import select
from loraplex.engines.errors import AdapterInvalid, AdapterNotFound, AdapterSourceForbidden

_NO_ADDRESS = "this is not a local file address; write file:///absolute/path"


class LocalSource:
    """`/absolute`, `file:///absolute` or `relative`: below one of the roots, or below the working directory in one."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = tuple(Path(root).expanduser().resolve() for root in roots)

    def parse(self, uri: str) -> Address:
        path = _path_of(uri)
        try:
            resolved = next((real for real in self._candidates(path) if self._root_of(real)), None)
        except (OSError, RuntimeError) as error:  # too long a name, a circle of links
            raise AdapterNotFound("the path leads nowhere") from error
        if resolved is None:
            raise AdapterSourceForbidden(f"{path} is not below one of the directories in adapters.local_roots")
        return Address(uri=f"file://{resolved}", shown=f"file://{resolved}")

    def at(self, address: Address, revision: str) -> Address:
        return address

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        if token is not None:
            raise AdapterInvalid("a local path takes no token")
        directory = Path(address.uri.removeprefix("file://"))
        try:
            names = os.listdir(directory)
        except FileNotFoundError as error:
            raise AdapterNotFound("there is no such directory") from error
        except NotADirectoryError as error:
            raise AdapterNotFound("this is not a directory; name the one that holds the adapter's files") from error
        except PermissionError as error:
            raise AdapterNotFound("the directory may not be read by this process") from error
        files = []
        for name in select(names):
            with self._open(directory / name) as file:
                files.append(RemoteFile(name=name, num_bytes=os.fstat(file.fileno()).st_size))
        return Listing(revision=None, files=tuple(files))

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        directory = Path(address.uri.removeprefix("file://"))
        for file in listing.files:
            with self._open(directory / file.name) as stream:
                receive(pieces(stream), file, workspace, transfer)

    def _candidates(self, path: Path) -> Iterator[Path]:
        """Where a path may lead: below a root that has it, else as the working directory sees it."""
        if not path.is_absolute():
            yield from (real for root in self._roots if (real := (root / path).resolve()).exists())
        yield path.resolve()

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self._roots if path == root or root in path.parents), None)

    @contextmanager
    def _open(self, path: Path) -> Iterator[BinaryIO]:
        """A regular file below a root, opened for reading. Raises AdapterSourceForbidden, AdapterNotFound."""
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise AdapterNotFound(f"{path.name} leads nowhere") from error
        root = self._root_of(resolved)
        if root is None:
            raise AdapterSourceForbidden(f"{path.name} is a link out of adapters.local_roots")
        try:
            descriptor = _open_beneath(root, resolved.relative_to(root).parts)
        except OSError as error:
            raise AdapterNotFound(f"{path.name} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise AdapterSourceForbidden(f"{path.name} is not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            yield file


def _path_of(uri: str) -> Path:
    if not uri.startswith("file:"):
        return Path(uri)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise AdapterInvalid(_NO_ADDRESS) from error
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path.startswith("/"):
        raise AdapterInvalid(_NO_ADDRESS)
    path = unquote(parts.path)
    if not path.isprintable():
        raise AdapterInvalid("the path holds control characters, or a NUL byte")
    return Path(path)


def _open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open `root/parts...` without following any link below the root. Raises OSError."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = inner
        # O_NONBLOCK: opening a FIFO returns at once, to be refused for what it is.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    finally:
        os.close(directory)
