"""Token events -> server-sent events.

`Relay` makes frames of an engine's events. Once the response has begun each is written in the very moment in which its
event comes, unless the client reads too slowly: then frames are kept, and written together as soon as it has read.
`StreamResponse` is sse-starlette's response on a shorter path: its iterator yields only what could not be written so.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive as StarletteReceive
from starlette.types import Scope, Send

from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.clients import unless_client_leaves
from loraplex.gateway.connections import connection_of
from loraplex.gateway.errors import ClientLeft
from loraplex.gateway.problems import problem_of, report

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def error_frame(error: Exception) -> bytes:
    """What ends a stream instead of [DONE]; clients raise it."""
    return b"data: " + problem_of(error).body() + b"\n\n"


class Framing(NamedTuple):
    """How an API ends a stream: what follows the last frame, and the frame of an error instead."""

    done: bytes
    error: Callable[[Exception], bytes]


OPENAI = Framing(DONE, error_frame)


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first error cancels the others and is raised as it is."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Generates one choice, and gives each event to the callable.
Generation: TypeAlias = Callable[[Callable[[TokenEvent], None]], Coroutine[Any, Any, None]]


class Relay:
    """One answer's frames, of one choice or several.

    `encode(choice, event)` gives the frames of an event, `end()` those after the last; `request_id` is for the log.
    `before_end` is done between the last frame's making and its sending.
    `on_end` is called when nothing more is generated, with the error that ended it, if any; perhaps twice.
    """

    def __init__(
        self,
        choices: Sequence[Generation],
        encode: Callable[[int, TokenEvent], bytes],
        end: Callable[[], bytes],
        request_id: str = "-",
        on_end: Callable[[BaseException | None], None] = lambda error: None,
        framing: Framing = OPENAI,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._choices = choices
        self._encode = encode
        self._end = end
        self._request_id = request_id
        self._on_end = on_end
        self._framing = framing
        self._before_end = before_end
        self._frames: list[bytes] = []
        self._is_writing = False
        self._news = asyncio.Event()
        self._write_at_once: Callable[[bytes], bool] = _never
        self._loop = asyncio.get_running_loop()
        self._wrote_at = self._loop.time()  # the last time that something was
        self._is_over = False
        self._error: Exception | None = None
        self._task = asyncio.create_task(self._pump())
        self._task.add_done_callback(self._ended)  # a task that is cancelled before its first step runs no `finally`

    async def begin(self, seconds: float) -> None:
        """Wait for the first frame, at most `seconds`. An error that comes before it is raised: no 200 was sent yet."""
        patience = self._loop.call_later(seconds, self._news.set)
        try:
            await self._news.wait()
        finally:
            patience.cancel()
        if self._error is not None and not self._frames:
            raise self._error

    def write_with(self, write_at_once: Callable[[bytes], bool]) -> None:
        """The response has begun; where this returns False nothing was written."""
        self._write_at_once = write_at_once
        if self._frames and write_at_once(b"".join(self._frames)):
            self._frames.clear()
            self._wrote_at = self._loop.time()

    async def frames(self) -> AsyncIterator[bytes]:
        """What was not written at once, as it comes; an error becomes the last frame."""
        while True:
            await self._news.wait()
            self._news.clear()
            is_over = self._is_over
            if self._frames:
                ready = b"".join(self._frames)
                self._frames.clear()
                self._is_writing = True  # what comes meanwhile must not overtake it
                yield ready
                self._is_writing = False
                self._wrote_at = self._loop.time()
            if is_over:
                break
        if self._error is not None:
            report(self._request_id, self._error)
            yield self._framing.error(self._error)

    def fill_silence(self, seconds: float) -> float:
        """Write a comment if nothing was written for so long; returns how long from now nothing need be.

        A client that does not read what it has gets no more of them.
        """
        left = self._wrote_at + seconds - self._loop.time()
        if left > 0:
            return left
        if not self._frames and not self._is_writing:
            self._write(KEEP_ALIVE)
        return seconds

    async def close(self) -> None:
        """Abort the answer, if it is not complete."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _pump(self) -> None:
        try:
            await together([generate(partial(self._take, number)) for number, generate in enumerate(self._choices)])
            self._on_end(None)  # before the client learns of it
            last = self._end()
            if self._before_end is not None:
                await self._before_end()
            self._write(last)
        except Exception as error:  # noqa: BLE001  the edge between engine and client: whatever it is, the client is told
            self._error = error
            self._on_end(error)
        finally:
            self._is_over = True
            self._news.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._on_end(asyncio.CancelledError() if task.cancelled() else None)

    def _take(self, number: int, event: TokenEvent) -> None:
        frames = self._encode(number, event)
        if frames:
            self._write(frames)

    def _write(self, frames: bytes) -> None:
        if not self._frames and not self._is_writing and self._write_at_once(frames):
            self._wrote_at = self._loop.time()
            return
        self._frames.append(frames)
        self._news.set()


def _never(frames: bytes) -> bool:
    return False


class StreamResponse(EventSourceResponse):
    """A relay as a response: comments in silence, a bound on a client that stops reading, abort on disconnect.

    sse-starlette's own runs a task for each of these, and wraps every frame in an event object and a cancel scope.
    Here one task, the request's, waits for what cannot be written at once, and comments are a timer's.
    """

    def __init__(self, relay: Relay, *, keep_alive_seconds: float, send_timeout_seconds: float) -> None:
        super().__init__(relay.frames(), ping=keep_alive_seconds, sep="\n", send_timeout=send_timeout_seconds)
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._next_comment = self._loop.call_later(keep_alive_seconds, self._comment)

    async def __call__(self, scope: Scope, receive: StarletteReceive, send: Send) -> None:
        self._connection = connection_of(scope)
        try:
            await unless_client_leaves(scope, receive, self._stream_response(send))  # type: ignore[arg-type]
        except (ClientLeft, SendTimeoutError):
            return
        finally:
            self._next_comment.cancel()
            await self._relay.close()

    async def _stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._connection is not None:
            self._relay.write_with(self._connection.write_at_once)
        async for frames in self.body_iterator:
            await self._send_with_timeout(send, {"type": "http.response.body", "body": frames, "more_body": True})
        await self._send_with_timeout(send, {"type": "http.response.body", "body": b"", "more_body": False})

    def _comment(self) -> None:
        silence = self._relay.fill_silence(self.ping_interval)
        self._next_comment = self._loop.call_later(silence, self._comment)
