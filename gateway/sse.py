"""Token events -> server-sent events, and a client that leaves -> an aborted request.

`Relay` takes an engine's events in a task of its own. Once the response has begun each frame is written at once, unless
the client reads too slowly: then frames are kept, and written together as soon as it has read. `StreamResponse` is
sse-starlette's response on a shorter path: its generator yields ready bytes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import anyio
from litestar.types import Receive
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.types import Receive as StarletteReceive
from starlette.types import Scope, Send

from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.connections import WRITE_AT_ONCE
from loraplex.gateway.errors import ClientLeft
from loraplex.gateway.problems import problem_of, report

T = TypeVar("T")

_MOMENT_SECONDS = 0.02  # an answer that takes no longer is not worth a task that watches its client
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


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels it when the client disconnects, which no framework does. Raises ClientLeft."""
    task, has_left = asyncio.current_task(), False
    assert task is not None, "requests are answered in tasks"

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watchers: list[asyncio.Task[None]] = []
    timer = asyncio.get_running_loop().call_later(
        _MOMENT_SECONDS, lambda: watchers.append(asyncio.create_task(watch()))
    )
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise ClientLeft("The client closed the connection before its answer was complete.") from None
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()


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
    `write_at_once` may be set once the response has begun; where it returns False nothing was written.
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
        self.write_at_once: Callable[[bytes], bool] | None = None
        self._loop = asyncio.get_running_loop()
        self.wrote_at = self._loop.time()  # the last time that something was
        self._is_over = False
        self._error: Exception | None = None
        self._task = asyncio.create_task(self._pump())
        self._task.add_done_callback(self._ended)  # a task that is cancelled before its first step runs no `finally`

    async def begin(self, seconds: float) -> None:
        """Wait for the first frame, at most `seconds`. An error that comes before it is raised: no 200 was sent yet."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        if self._error is not None and not self._frames:
            raise self._error

    async def frames(self) -> AsyncIterator[bytes]:
        """Everything there is to write, as it comes; an error becomes the last frame."""
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
            if is_over:
                break
        if self._error is not None:
            report(self._request_id, self._error)
            yield self._framing.error(self._error)

    async def close(self) -> None:
        """Abort the answer, if it is not complete."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _pump(self) -> None:
        try:
            await together([generate(partial(self._take, number)) for number, generate in enumerate(self._choices)])
            self._on_end(None)  # before the client learns of it
            last = self._end()
            if self._before_end is not None:
                await self._before_end()
            self._frames.append(last)
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
        if not frames:
            return
        if self.write_at_once is not None and not self._frames and not self._is_writing and self.write_at_once(frames):
            self.wrote_at = self._loop.time()
            return
        self._frames.append(frames)
        self._news.set()


class StreamResponse(EventSourceResponse):
    """A relay as a response: comments in silence, a bound on a client that stops reading, abort on disconnect."""

    def __init__(self, relay: Relay, *, keep_alive_seconds: float, send_timeout_seconds: float) -> None:
        super().__init__(relay.frames(), ping=keep_alive_seconds, sep="\n")
        self._relay = relay
        self._send_timeout = send_timeout_seconds
        self._stalled = anyio.CancelScope()
        self._loop = asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: StarletteReceive, send: Send) -> None:
        self._write_at_once = scope.get("extensions", {}).get(WRITE_AT_ONCE, {}).get("call")
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._relay.close()

    async def _stream_response(self, send: Send) -> None:
        """sse-starlette's own wraps every frame in an event object and a cancel scope, at several times the cost."""
        with self._stalled:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._relay.write_at_once = self._write_at_once
            async for frames in self.body_iterator:
                with self._bounded():
                    await send({"type": "http.response.body", "body": frames, "more_body": True})
                self._relay.wrote_at = self._loop.time()
            with self._bounded():
                async with self._send_lock:
                    self.active = False
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        """sse-starlette's own comments at every interval, between tokens that come in time as well."""
        while self.active:
            silence = self._loop.time() - self._relay.wrote_at
            if silence < self.ping_interval:
                await asyncio.sleep(self.ping_interval - silence)
                continue
            async with self._send_lock:
                if self.active:
                    with self._bounded():
                        await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            self._relay.wrote_at = self._loop.time()

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """One write; the stream is cut if it takes longer than the send timeout."""
        watchdog = self._loop.call_later(self._send_timeout, self._stalled.cancel)
        try:
            yield
        finally:
            watchdog.cancel()


def let_streams_drain() -> None:
    """sse-starlette would cut every open stream half a second after SIGTERM; uvicorn's own grace period is enough."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
