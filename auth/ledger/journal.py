"""What this process's requests have used so far, in a mapped file that outlives the process.

One slot a request, written before it begins, counted up before each token is given out, and freed when its row is in
the database. A store to mapped memory is the kernel's at once, so whatever ends the process, the file says what was
used. Every process has a file of its own and holds a lock on it; a file that can be locked is a dead process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator
from operator import attrgetter, le
from pathlib import Path
from typing import BinaryIO

import msgspec

from loraplex.auth.errors import UsageUnrecorded
from loraplex.auth.metering import INTERRUPTED, UsageRecord

_SUFFIX = ".slots"
_MAGIC = b"lplx-sl1"  # of the file's first words; another layout of slots takes another name
_SLOT_BYTES = 4096  # what does not change takes at most about 2850: see _LONGEST
_FIRST_SLOTS = 1024
_OUTCOME_BYTES = 32

_LONGEST = {"request_id": 64, "trace_id": 128, "route": 128, "tenant_id": 32, "key_id": 32, "model": 256,
            "adapter_id": 64}  # fmt: skip
_texts = attrgetter(*_LONGEST)

# A slot's words of eight bytes: each is stored at one stroke, so that a kill leaves the old number or the new one.
_WORD = 8
_SLOT_WORDS = _SLOT_BYTES // _WORD
_STATE, _CHECK, _LENGTH, _PROMPT, _CACHED, _COMPLETION, _FIRST_TOKEN_AT, _ENDED_AT = range(8)
_OUTCOME_AT = 8 * _WORD
_BODY_AT = _OUTCOME_AT + _OUTCOME_BYTES

_FREE, _RUNNING, _SETTLED = range(3)


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """What of a record does not change, each text at most as long as its column."""

    request_id: str
    trace_id: str
    route: str
    tenant_id: str
    key_id: str
    model: str
    adapter_id: str
    began_at: float


def fitting(record: UsageRecord) -> UsageRecord:
    """The record as the database can hold it: nothing a client sends may keep its row from being written."""
    texts = _texts(record)
    if _is_plain("".join(texts)) and all(map(le, map(len, texts), _LONGEST.values())):
        return record  # as nearly all are
    changed = {name: text for name, most in _LONGEST.items()
               if (text := _clean(getattr(record, name), most)) != getattr(record, name)}  # fmt: skip
    return msgspec.structs.replace(record, **changed)


def _is_plain(text: str) -> bool:
    return text.isascii() and "\0" not in text


def _clean(text: str, most: int) -> str:
    if _is_plain(text) and len(text) <= most:
        return text
    return text.encode(errors="replace").decode().replace("\0", "")[:most]


class Journal:
    """This process's file in `directory`. Raises OSError where it cannot be made."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._file = _new_file(directory)
        try:
            self._mapped = _mapping(self._file, _FIRST_SLOTS)
        except BaseException:
            self._file.close()
            self._path.unlink(missing_ok=True)
            raise
        self.words = memoryview(self._mapped).cast("Q")
        self._num_slots = _FIRST_SLOTS
        self._free = list(range(_FIRST_SLOTS, 0, -1))  # slot 0 is the header
        self._used: dict[str, int] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def begin(self, record: UsageRecord) -> Slot:
        """A record that is `fitting`. Raises UsageUnrecorded where there is no room on the disk."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        body = self._encoder.encode(_Body(*_texts(record), record.began_at))  # type: ignore[call-arg]
        start = slot * _SLOT_BYTES + _BODY_AT
        self._mapped[start : start + len(body)] = body
        words, at = self.words, slot * _SLOT_WORDS
        words[at + _CHECK] = zlib.crc32(body)
        words[at + _LENGTH] = len(body)
        words[at + _PROMPT] = record.num_prompt_tokens
        words[at + _CACHED] = words[at + _COMPLETION] = words[at + _FIRST_TOKEN_AT] = words[at + _ENDED_AT] = 0
        words[at + _STATE] = _RUNNING  # last: until now the slot is free
        self._used[record.request_id] = slot
        return Slot(self, at)

    def settle(self, record: UsageRecord) -> None:
        """As the record says it was, if this process should end before the row is in the database."""
        slot = self._used[record.request_id]
        start = slot * _SLOT_BYTES + _OUTCOME_AT
        outcome = record.outcome.encode()[:_OUTCOME_BYTES]
        self._mapped[start : start + _OUTCOME_BYTES] = outcome.ljust(_OUTCOME_BYTES, b"\0")
        words, at = self.words, slot * _SLOT_WORDS
        words[at + _PROMPT] = record.num_prompt_tokens
        words[at + _CACHED] = record.num_cached_tokens
        words[at + _COMPLETION] = record.num_completion_tokens
        words[at + _FIRST_TOKEN_AT] = _microseconds(record.first_token_at)
        words[at + _ENDED_AT] = _microseconds(record.ended_at)
        words[at + _STATE] = _SETTLED

    def free(self, request_ids: Iterable[str]) -> None:
        """Their rows are in the database."""
        for request_id in request_ids:
            slot = self._used.pop(request_id)
            self.words[slot * _SLOT_WORDS + _STATE] = _FREE
            self._free.append(slot)

    def close(self) -> None:
        """The file goes, unless it still says what the database does not."""
        self._unmap()
        if not self._used:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _grow(self) -> None:
        old = self._num_slots
        try:
            mapped = _mapping(self._file, 2 * old)
        except OSError as error:
            raise UsageUnrecorded("The server has no room to record what requests use.") from error
        self._unmap()  # both show the same file
        self._mapped = mapped
        self.words = memoryview(mapped).cast("Q")
        self._num_slots = 2 * old
        self._free.extend(range(2 * old, old, -1))

    def _unmap(self) -> None:
        self.words.release()
        self._mapped.close()


class Slot:
    """Implements `Entry`: one request's place in the file, which begins `at` this word."""

    __slots__ = ("_at", "_journal")

    def __init__(self, journal: Journal, at: int) -> None:
        self._journal = journal
        self._at = at

    def progress(self, num_completion_tokens: int, num_cached_tokens: int) -> None:
        words, at = self._journal.words, self._at
        if not words[at + _FIRST_TOKEN_AT]:
            words[at + _FIRST_TOKEN_AT] = _microseconds(time.time())
        words[at + _CACHED] = num_cached_tokens
        words[at + _COMPLETION] = num_completion_tokens


class Leftover:
    """The file of a process that is dead, locked until it is closed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    def records(self) -> tuple[list[UsageRecord], int]:
        """What it says was used, and how many slots cannot be read. Raises ValueError where nothing can."""
        data = self._file.read()
        if not data.startswith(_MAGIC):
            if not data.strip(b"\0"):
                return [], 0  # its process died before it had written anything
            raise ValueError("its layout is not this version's")
        found, num_damaged = [], 0
        for start in range(_SLOT_BYTES, len(data) - _SLOT_BYTES + 1, _SLOT_BYTES):
            slot = memoryview(data)[start : start + _SLOT_BYTES]
            if slot[:_WORD].cast("Q")[0] == _FREE:
                continue
            try:
                found.append(_record(slot))
            except ValueError:
                num_damaged += 1
        return found, num_damaged

    def remove(self) -> None:
        """All of it is in the database."""
        self.path.unlink(missing_ok=True)

    def set_aside(self) -> Path:
        """Keep it under a name that nobody looks for. Returns the new path."""
        return self.path.rename(self.path.with_suffix(".unreadable"))


def leftovers(directory: Path) -> Iterator[Leftover]:
    """The files of dead processes, one after another; nobody else has them meanwhile."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                continue
            if _lock(file) and os.fstat(file.fileno()).st_nlink:
                yield Leftover(path, file)


def _record(slot: memoryview) -> UsageRecord:
    """Raises ValueError where the slot is damaged."""
    words = slot[:_OUTCOME_AT].cast("Q")
    body = bytes(slot[_BODY_AT : _BODY_AT + words[_LENGTH]])
    if zlib.crc32(body) != words[_CHECK]:
        raise ValueError("the slot is damaged")
    is_settled = words[_STATE] == _SETTLED
    outcome = bytes(slot[_OUTCOME_AT:_BODY_AT]).rstrip(b"\0").decode() if is_settled else INTERRUPTED
    # as for every failure: what gave its client nothing costs nothing
    num_prompt = words[_PROMPT] if is_settled or words[_COMPLETION] else 0
    return UsageRecord(
        **msgspec.structs.asdict(msgspec.msgpack.decode(body, type=_Body)),
        num_prompt_tokens=num_prompt,
        num_cached_tokens=words[_CACHED],
        num_completion_tokens=words[_COMPLETION],
        first_token_at=_seconds(words[_FIRST_TOKEN_AT]),
        ended_at=_seconds(words[_ENDED_AT]) if is_settled else None,
        outcome=outcome,
    )


def _new_file(directory: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = directory / f"{secrets.token_hex(8)}{_SUFFIX}"
        file = path.open("x+b")
        if _lock(file) and os.fstat(file.fileno()).st_nlink:  # else someone took it for a leftover just now
            return path, file
        file.close()


def _mapping(file: BinaryIO, num_slots: int) -> mmap.mmap:
    """The file, made so large. Raises OSError."""
    size = (num_slots + 1) * _SLOT_BYTES
    if hasattr(os, "posix_fallocate"):  # a hole that the disk cannot fill would be a fatal signal at the first store
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
    mapped = mmap.mmap(file.fileno(), size)
    mapped[: len(_MAGIC)] = _MAGIC
    return mapped


def _lock(file: BinaryIO) -> bool:
    """Whether it could be had; the kernel lets go of it when the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _microseconds(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1e6)


def _seconds(microseconds: int) -> float | None:
    return microseconds / 1e6 if microseconds else None
