"""One adapter on its way in: written file by file, bounded as it comes, screened before it is kept."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import BinaryIO

from loraplex.engines.adapters.disk import DiskCache, writing
from loraplex.engines.adapters.screening import screen
from loraplex.engines.adapters.sources.base import Workspace
from loraplex.engines.adapters.sources.selection import WANTED, refuse_shards
from loraplex.engines.errors import AdapterInvalid, AdapterTooLarge


class Upload:
    """Files in a staging directory. All methods block, and raise AdapterSourceUnavailable where the disk is full."""

    def __init__(self, kept: DiskCache, workspace: Workspace, max_bytes: int) -> None:
        self._kept = kept
        self._workspace = workspace
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._file: BinaryIO | None = None
        self._name = ""
        self._num_bytes_of_file = 0
        self._held = ExitStack()

    def open(self, name: str) -> None:
        """What comes next is of this file. Raises AdapterError for one that is no adapter's, or comes twice."""
        if name not in WANTED:
            refuse_shards([name])
            raise AdapterInvalid(f"{name[:200]!r} is no file of an adapter; those are {', '.join(WANTED)}")
        with writing("the upload"):
            self._close()
            try:
                self._file = (self._workspace.files / name).open("xb")
            except FileExistsError as error:
                raise AdapterInvalid(f"{name} was sent twice") from error
        self._name, self._num_bytes_of_file = name, 0

    def write(self, data: bytes) -> None:
        """Raises AdapterTooLarge as soon as there is too much."""
        assert self._file is not None, "a file was opened"
        self._num_bytes += len(data)
        self._num_bytes_of_file += len(data)
        limit = WANTED[self._name]
        if limit is not None and self._num_bytes_of_file > limit:
            raise AdapterTooLarge(f"{self._name} has more than {limit} bytes")
        if self._num_bytes > self._max_bytes:
            raise AdapterTooLarge(f"the files have more than adapters.max_bytes = {self._max_bytes} together")
        with writing("the upload"):
            self._file.write(data)

    def keep(self) -> str:
        """The address of what was sent, from now on kept for good. Raises AdapterError for what is no adapter."""
        with writing("the upload"):
            self._close()
            screen(self._workspace.files, self._max_bytes)
            stored = self._kept.commit(self._workspace)
        self._held.enter_context(self._kept.hold(stored.id))
        return f"upload://{stored.id}"

    def end(self) -> None:
        """From now on it is kept for those who name it by its address."""
        self._held.close()
        with suppress(OSError):  # what a full disk refused, it refuses once more
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
