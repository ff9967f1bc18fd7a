"""What a source of adapters is: it lists an adapter's files with their sizes, then downloads them. It judges no bytes.

Everything here blocks and runs in the store's threads; a source looks at `Transfer.check` between pieces, so that
a fetch nobody waits for any more ends within one socket timeout. A socket's timeout is for each piece of the network's,
however small, so a connection to a server that may be anyone's is watched by its transfer.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from loraplex.engines.errors import AdapterSourceUnavailable

CHUNK_BYTES = 2**20
SOCKET_TIMEOUT_SECONDS = 10.0


class TransferStopped(Exception):
    """Nobody waits for this fetch any more; ends its thread and reaches no caller."""


class Transfer:
    """One fetch under way: how many bytes it may bring (`max_bytes`), and whether anybody still waits for it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._watched: socket.socket | None = None

    def stop(self) -> None:
        self._stopped.set()
        with self._guard:
            if self._watched is not None:
                with suppress(OSError):  # the other side has ended it
                    self._watched.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises TransferStopped once `stop` was called."""
        if self._stopped.is_set():
            raise TransferStopped

    def watch(self, connection: socket.socket) -> None:
        """Have `stop` end this connection, which wakes whoever reads from it. Raises TransferStopped.

        One at a time: the one before is watched no longer.
        """
        self._exchange(connection.dup())  # TLS takes over the original
        self.check()

    def unwatch(self) -> None:
        self._exchange(None)

    def _exchange(self, watched: socket.socket | None) -> None:
        with self._guard:
            before, self._watched = self._watched, watched
        if before is not None:
            before.close()

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until `stop`. Raises TransferStopped."""
        self._stopped.wait(seconds)
        self.check()


@dataclass(frozen=True, slots=True)
class Address:
    """A normalised URI. `shown` is what errors, logs and results say: the query is left out, it may be a signature."""

    uri: str
    shown: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter as its source lists it: a plain name without directories, and its size in bytes.

    `version` is whatever the source needs to get exactly these bytes again (an ETag, a version id).
    """

    name: str
    num_bytes: int
    version: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source will send. `revision` names these bytes for ever; None where only their content can."""

    revision: str | None
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Two directories on the cache's file system: `files` takes complete files, `scratch` whatever is unfinished.

    Both outlive a failed attempt, so that the next one resumes. `digests` are the sha256 of those complete files that
    were hashed as they came.
    """

    files: Path
    scratch: Path
    digests: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """One kind of place adapters come from."""

    def parse(self, uri: str) -> Address:
        """The normal form of a URI. Raises AdapterInvalid, AdapterSourceForbidden."""
        ...

    def at(self, address: Address, revision: str) -> Address:
        """The address of what it meant when `revision` was told, where the source can still say so."""
        ...

    def list(self, address: Address, token: str | None, transfer: Transfer) -> Listing:
        """The wanted files there are. Raises AdapterError; AdapterSourceUnavailable means: try again."""
        ...

    def download(
        self, address: Address, listing: Listing, token: str | None, workspace: Workspace, transfer: Transfer
    ) -> None:
        """Put the listed files into `workspace.files`. Raises AdapterError, TransferStopped."""
        ...


def receive(
    chunks: Iterable[bytes], file: RemoteFile, workspace: Workspace, transfer: Transfer, *, resume_at: int = 0
) -> None:
    """Append to the partial file from byte `resume_at`; once complete, move it to `workspace.files`.

    Raises AdapterSourceUnavailable where there are more or fewer bytes than listed.
    """
    partial = workspace.scratch / file.name
    num_bytes = resume_at
    digest = hashlib.sha256()
    with partial.open("r+b" if resume_at else "wb") as sink:
        for begin in range(0, resume_at, CHUNK_BYTES):
            digest.update(sink.read(min(CHUNK_BYTES, resume_at - begin)))
        sink.seek(resume_at)
        sink.truncate()
        for chunk in chunks:
            transfer.check()
            digest.update(chunk)
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                raise AdapterSourceUnavailable(f"{file.name} is longer than the {file.num_bytes} bytes announced")
            sink.write(chunk)
    if num_bytes < file.num_bytes:
        raise AdapterSourceUnavailable(f"{file.name} broke off after {num_bytes} of {file.num_bytes} bytes")
    os.replace(partial, workspace.files / file.name)
    workspace.digests[file.name] = digest.hexdigest()


def num_received(file: RemoteFile, workspace: Workspace) -> int:
    """Bytes of a file that an earlier attempt left in the scratch directory."""
    try:
        return (workspace.scratch / file.name).stat().st_size
    except FileNotFoundError:
        return 0


def missing(listing: Listing, workspace: Workspace) -> Sequence[RemoteFile]:
    """The listed files that are not complete yet."""
    return [file for file in listing.files if not (workspace.files / file.name).exists()]


def pieces(stream: BinaryIO, size: int = CHUNK_BYTES) -> Iterable[bytes]:
    """The rest of a stream, `size` bytes at a time."""
    while chunk := stream.read(size):
        yield chunk
