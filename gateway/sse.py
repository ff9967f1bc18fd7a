"""Token events -> server-sent events.

`Relay` makes frames of an engine's events. Once the response has begun each is written in the very moment in which its
event comes, unless the client reads too slowly: then frames are kept, and written together as soon as it has read.
`StreamResponse` sends what could not be written so, and the end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from litestar.types import Message, Receive, Scope, Send
from sse_starlette import EventSourceResponse

from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.clients import unless_client_leaves
from loraplex.gateway.connections import Connection, connection_of
from loraplex.gateway.errors import ClientLeft
from loraplex.gateway.problems import problem_of, report

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_TICKS = 4


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


# Generates the choice of this number, and gives each event with it to the callable.
Generation: TypeAlias = Callable[[int, Callable[[int, TokenEvent], None]], Coroutine[Any, Any, None]]


class Relay:
    """One answer's frames, of one choice or several.

    `encode(choice, event)` gives the frames of an event, `end()` those after the last; `request_id` is for the log.
    `before_end` is done between the last frame's making and its sending.
    `on_end` is called when nothing more is generated, with the error that ended it, if any; perhaps twice.
    """

    # Slots, as in all that a token passes: of many streams each has them in memory of its own, far from the processor.
    __slots__ = (
        "_before_end", "_choices", "_connection", "_encode", "_end", "_error", "_frames", "_framing", "_is_behind",
        "_is_over", "_loop", "_news", "_on_end", "_request_id", "_silence", "_task",
    )  # fmt: skip

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
        self._is_behind = False  # whether frames are kept or being written; what comes later must not overtake them
        self._news = asyncio.Event()
        self._connection: Connection | None = None
        self._loop = asyncio.get_running_loop()
        self._silence = 0  # ticks since something was written
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
        if not self._frames:
            if self._error is not None:
                raise self._error
            self._silence = _TICKS

    def write_to(self, connection: Connection) -> None:
        """The response has begun."""
        self._connection = connection
        if self._frames and connection.write_at_once(b"".join(self._frames)):
            self._frames.clear()
            self.written()

    async def unwritten(self) -> tuple[bytes, bool]:
        """Wait for frames that were not written at once, or for the end: the frames, and whether they are the last.

        An error becomes the last frame. Nothing overtakes them until `written` is called.
        """
        while not self._frames and not self._is_over:
            self._news.clear()
            await self._news.wait()
        if self._is_over and self._error is not None:
            report(self._request_id, self._error)
            self._frames.append(self._framing.error(self._error))
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames, self._is_over

    def written(self) -> None:
        """What was waited for is on its way."""
        self._is_behind = bool(self._frames)
        self._silence = 0

    def fill_silence(self) -> None:
        """Called `_TICKS` times within each silence that is allowed: write a comment where it was one.

        A client that does not read what it has gets no more of them.
        """
        self._silence += 1
        if self._silence > _TICKS and not self._is_behind:
            self._write(KEEP_ALIVE)

    async def close(self) -> None:
        """Abort the answer, if it is not complete."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _pump(self) -> None:
        try:
            await together([generate(number, self._take) for number, generate in enumerate(self._choices)])
            self._on_end(None)  # before the client learns of it
            last = self._end()
            if self._before_end is not None:
                await self._before_end()
            self._keep(last)  # one write with the response's end
        except Exception as error:  # noqa: BLE001  the edge between engine and client: whatever it is, the client is told
            self._error = error
            self._on_end(error)
        finally:
            self._is_over = True
            self._news.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._on_end(asyncio.CancelledError() if task.cancelled() else None)

    def _take(self, number: int, event: TokenEvent) -> None:
        self._write(self._encode(number, event))

    def _write(self, frames: bytes) -> None:
        if not frames:
            return
        connection = self._connection
        if connection is not None and not self._is_behind and connection.write_at_once(frames):
            self._silence = 0
            return
        self._keep(frames)
        self._news.set()

    def _keep(self, frames: bytes) -> None:
        self._frames.append(frames)
        self._is_behind = True


def event_source(*, keep_alive_seconds: float, send_timeout_seconds: float) -> EventSourceResponse:
    """What all streams have in common: headers, and times that make sense. Raises ValueError where they do not."""
    common = EventSourceResponse(iter(()), ping=keep_alive_seconds, sep="\n", send_timeout=send_timeout_seconds)
    del common.headers["connection"]  # the server's to say: it may be about to close it
    return common


class StreamResponse:
    """A relay as a response: comments in silence, a bound on a client that stops reading, abort on disconnect.

    sse-starlette's own runs a task for each of these, wraps every frame in an event object and a cancel scope, and
    makes its headers anew. Here `common` is its response, made once; one task, the request's, waits for what cannot be
    written at once, and comments are a timer's.
    """

    __slots__ = ("_common", "_connection", "_loop", "_next_tick", "_relay")

    def __init__(self, relay: Relay, common: EventSourceResponse) -> None:
        self._relay = relay
        self._common = common
        self._loop = asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = connection_of(scope)
        self._next_tick = self._loop.call_later(self._common.ping_interval / _TICKS, self._tick)
        try:
            await unless_client_leaves(scope, receive, self._respond(send))
        except (ClientLeft, TimeoutError):
            return
        finally:
            self._next_tick.cancel()
            await self._relay.close()

    async def _respond(self, send: Send) -> None:
        headers = self._common.raw_headers
        await send({"type": "http.response.start", "status": self._common.status_code, "headers": headers})
        if self._connection is not None:
            self._relay.write_to(self._connection)
        is_last = False
        while not is_last:
            frames, is_last = await self._relay.unwritten()
            await self._send_in_time(send, {"type": "http.response.body", "body": frames, "more_body": not is_last})
            self._relay.written()

    async def _send_in_time(self, send: Send, message: Message) -> None:
        """No clock where nothing is waited for: it is cheaper."""
        if self._connection is not None and not self._connection.is_full:
            await send(message)
            return
        async with asyncio.timeout(self._common.send_timeout):
            await send(message)

    def _tick(self) -> None:
        self._relay.fill_silence()
        self._next_tick = self._loop.call_later(self._common.ping_interval / _TICKS, self._tick)
