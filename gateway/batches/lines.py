"""The input of a batch: one request a line, checked as a whole before the first one runs."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from loraplex.gateway.batches.records import BatchProblem, Endpoint

MAX_LINES = 50_000  # OpenAI's
_MAX_PROBLEMS = 100
_PAGE = 64


class RequestLine(msgspec.Struct, forbid_unknown_fields=True):
    """One request as the client wrote it."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Glance(msgspec.Struct):
    """All that is read of a body before its route reads it."""

    stream: bool | None = None


class Line(msgspec.Struct, frozen=True):
    """A request and its place in the file; lines count from 1."""

    number: int
    custom_id: str
    body: bytes


_line = msgspec.json.Decoder(RequestLine)
_glance = msgspec.json.Decoder(_Glance)


class InputInvalid(Exception):
    """The input cannot be worked on; `problems` says what is wrong in which line."""

    def __init__(self, problems: list[BatchProblem]) -> None:
        super().__init__(problems[0].message)
        self.problems = problems


def count_checked(path: Path, endpoint: Endpoint, max_bytes: int) -> int:
    """How many requests a file holds. Raises InputInvalid with the first hundred problems."""
    seen: set[str] = set()
    problems: list[BatchProblem] = []
    for number, raw in _raw_lines(path, max_bytes):
        if len(seen) >= MAX_LINES:
            problems.append(
                BatchProblem("too_many_requests", f"A batch has at most {MAX_LINES} requests.", line=number)
            )
            break
        try:
            seen.add(_checked(number, raw, endpoint, max_bytes, seen))
        except InputInvalid as error:
            problems += error.problems
        if len(problems) >= _MAX_PROBLEMS:
            break
    if not seen and not problems:
        problems.append(BatchProblem("empty_file", "The input file holds no request."))
    if problems:
        raise InputInvalid(problems)
    return len(seen)


async def requests(path: Path) -> AsyncIterator[Line]:
    """The requests of a file that was checked."""
    lines = _raw_lines(path, 0)
    while page := await asyncio.to_thread(_page, lines):
        for line in page:
            yield line


def _page(lines: Iterator[tuple[int, bytes]]) -> list[Line]:
    found = []
    for number, raw in lines:
        line = _line.decode(raw)
        found.append(Line(number, line.custom_id, bytes(line.body)))
        if len(found) == _PAGE:
            break
    return found


def _raw_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of lines that are not blank, no longer than one byte more than the bound; 0 bounds nothing."""
    with path.open("rb") as source:
        number = 0
        while raw := source.readline(max_bytes + 1 if max_bytes else -1):
            number += 1
            while max_bytes and len(raw) > max_bytes and not raw.endswith(b"\n"):
                rest = source.readline(max_bytes)
                if not rest or rest.endswith(b"\n"):
                    break
            if raw.strip():
                yield number, raw


def _checked(number: int, raw: bytes, endpoint: Endpoint, max_bytes: int, seen: set[str]) -> str:
    """The line's custom_id. Raises InputInvalid."""

    def problem(code: str, message: str, param: str | None = None) -> InputInvalid:
        return InputInvalid([BatchProblem(code, message, param, number)])

    if len(raw) > max_bytes:
        raise problem("request_too_large", f"A request has at most {max_bytes} bytes.")
    try:
        line = _line.decode(raw)
        text = bytes(line.body)
        if not text.lstrip().startswith(b"{"):
            raise problem("invalid_json_line", "The body is not a JSON object.", "body")
        streams = _glance.decode(text).stream
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise problem("invalid_json_line", f"The line is not a request: {error}") from error
    if line.url != endpoint:
        raise problem("mismatched_url", f"The batch is for {endpoint}, this request for {line.url[:128]!r}.", "url")
    if streams:
        raise problem("stream_not_possible", "The answers of a batch cannot stream.", "body.stream")
    if line.custom_id in seen:
        raise problem("duplicate_custom_id", f"The custom_id {line.custom_id!r} is there before.", "custom_id")
    return line.custom_id
