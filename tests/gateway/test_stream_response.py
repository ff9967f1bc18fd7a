"""The response that writes a relay to a client, against an ASGI server that is computed by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from loraplex.engines.errors import EngineDied
from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.connections import Connection
from loraplex.gateway.sse import DONE, Relay, StreamResponse, event_source

SCOPE: Any = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Wire:
    """What a server would see; writing `stall_at` waits for ever, as a client that does not read makes it."""

    def __init__(self, *, stall_at: bytes | None = None) -> None:
        self.messages: list[Any] = []
        self.stall_at = stall_at
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        if self.stall_at is not None and message.get("body") == self.stall_at:
            await asyncio.sleep(3600)

    @property
    def writes(self) -> list[bytes]:
        return [message["body"] for message in self.messages if message["type"] == "http.response.body"]


class Tap:
    """One choice whose tokens come when the test says so."""

    def __init__(self) -> None:
        self.texts: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.was_closed = False

    async def generate(self, number: int, take: Callable[[int, TokenEvent], None]) -> None:
        try:
            while (text := await self.texts.get()) is not None:
                if isinstance(text, Exception):
                    raise text
                take(number, TokenEvent(request_id="r", token_ids=(1,), text=text, step=1))
        finally:
            self.was_closed = True


def response_of(tap: Tap, *, keep_alive: float = 3600, send_timeout: float = 3600) -> StreamResponse:
    relay = Relay([tap.generate], lambda number, event: f"data: {event.text}\n\n".encode(), lambda: DONE)
    return StreamResponse(relay, event_source(keep_alive_seconds=keep_alive, send_timeout_seconds=send_timeout))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_tokens_that_are_there_together_are_one_write_and_later_ones_another() -> None:
    tap, wire = Tap(), Wire()
    answering = asyncio.create_task(response_of(tap)(SCOPE, wire.receive, wire.send))
    for text in "abc":
        tap.texts.put_nowait(text)
    await settle()
    assert wire.writes == [b"data: a\n\ndata: b\n\ndata: c\n\n"]
    tap.texts.put_nowait("d")
    await settle()
    assert wire.writes[1:] == [b"data: d\n\n"]
    tap.texts.put_nowait(None)
    await answering
    assert wire.writes[2:] == [DONE]
    assert [message.get("more_body") for message in wire.messages[1:]] == [True, True, False]


async def test_head_says_event_stream_and_comes_first() -> None:
    tap, wire = Tap(), Wire()
    tap.texts.put_nowait(None)
    await response_of(tap)(SCOPE, wire.receive, wire.send)
    head = wire.messages[0]
    assert (head["type"], head["status"]) == ("http.response.start", 200)
    headers = dict(head["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers


async def test_silence_is_filled_with_comments_until_the_next_token() -> None:
    tap, wire = Tap(), Wire()
    answering = asyncio.create_task(response_of(tap, keep_alive=0.02)(SCOPE, wire.receive, wire.send))
    async with asyncio.timeout(5):
        while len(wire.writes) < 3:
            await asyncio.sleep(0.01)
    assert set(wire.writes) == {b": keep-alive\n\n"}
    tap.texts.put_nowait(None)
    await answering


async def test_client_that_leaves_closes_the_choice() -> None:
    tap, wire = Tap(), Wire()
    tap.texts.put_nowait("a")
    answering = asyncio.create_task(response_of(tap)(SCOPE, wire.receive, wire.send))
    await settle()
    assert not tap.was_closed
    wire.gone.set()
    await asyncio.wait_for(answering, 1)
    assert tap.was_closed
    assert wire.messages[-1]["more_body"] is True


async def test_client_that_stalls_closes_the_choice_after_the_timeout() -> None:
    tap, wire = Tap(), Wire(stall_at=b"data: a\n\n")
    tap.texts.put_nowait("a")
    answering = asyncio.create_task(response_of(tap, send_timeout=0.05)(SCOPE, wire.receive, wire.send))
    await asyncio.sleep(0.02)
    assert not answering.done()
    await asyncio.wait_for(answering, 1)
    assert tap.was_closed
    assert wire.writes == [b"data: a\n\n"]


async def test_client_that_stalls_at_a_comment_closes_the_choice_after_the_timeout() -> None:
    tap, wire = Tap(), Wire(stall_at=b": keep-alive\n\n")
    answering = asyncio.create_task(
        response_of(tap, keep_alive=0.02, send_timeout=0.05)(SCOPE, wire.receive, wire.send)
    )
    await asyncio.sleep(0.04)
    tap.texts.put_nowait(None)
    await asyncio.wait_for(answering, 1)
    assert tap.was_closed
    assert wire.messages[-1]["more_body"] is True


async def test_client_that_stalls_at_the_end_is_let_go_after_the_timeout() -> None:
    tap, wire = Tap(), Wire(stall_at=DONE)
    answering = asyncio.create_task(response_of(tap, send_timeout=0.05)(SCOPE, wire.receive, wire.send))
    tap.texts.put_nowait("a")
    await settle()
    assert wire.writes == [b"data: a\n\n"]
    tap.texts.put_nowait(None)
    await asyncio.wait_for(answering, 1)
    assert wire.writes[-1] == DONE


async def test_error_is_the_last_frame_and_the_response_ends_properly() -> None:
    tap, wire = Tap(), Wire()
    tap.texts.put_nowait("a")
    tap.texts.put_nowait(EngineDied("gone"))
    await response_of(tap)(SCOPE, wire.receive, wire.send)
    assert wire.writes[-1].startswith(b'data: a\n\ndata: {"error":{"message":"gone"')
    assert wire.messages[-1]["more_body"] is False


async def test_tokens_that_come_in_time_need_no_comment() -> None:
    tap, wire = Tap(), Wire()
    answering = asyncio.create_task(response_of(tap, keep_alive=0.2)(SCOPE, wire.receive, wire.send))
    for _ in range(25):
        tap.texts.put_nowait("a")
        await asyncio.sleep(0.02)
    assert b": keep-alive\n\n" not in wire.writes
    async with asyncio.timeout(5):
        while b": keep-alive\n\n" not in wire.writes:
            await asyncio.sleep(0.02)
    tap.texts.put_nowait(None)
    await answering


async def test_client_that_stalls_in_silence_is_cut_after_the_timeout() -> None:
    """No token comes to notice it; the comment does."""
    tap, wire = Tap(), Wire(stall_at=b": keep-alive\n\n")
    answering = asyncio.create_task(
        response_of(tap, keep_alive=0.02, send_timeout=0.05)(SCOPE, wire.receive, wire.send)
    )
    await asyncio.wait_for(answering, 2)
    assert tap.was_closed


class FastWire(Connection, Wire):
    """Lets frames be written at once, unless `is_full`; what is sent waits while it is."""

    def __init__(self) -> None:
        Wire.__init__(self)
        self.watchers: set[Callable[[], None]] = set()
        self.is_full = False
        self.was_read = asyncio.Event()
        self.written: list[bytes] = []  # in the order in which the client sees it
        self.scope: Any = {**SCOPE, "extensions": {"loraplex.connection": {"it": self}}}

    def write_at_once(self, body: bytes) -> bool:
        if not self.is_full:
            self.written.append(body)
        return not self.is_full

    def watch(self, leave: Callable[[], None]) -> Callable[[], None]:
        self.watchers.add(leave)
        return lambda: self.watchers.discard(leave)

    async def send(self, message: Any) -> None:
        if self.is_full:
            await self.was_read.wait()
            await asyncio.sleep(0)  # as a server's own task goes on later than the connection does
        if message["type"] == "http.response.body":
            self.written.append(message["body"])
        await super().send(message)


async def test_frames_are_written_at_once_when_the_server_can() -> None:
    tap, wire = Tap(), FastWire()
    answering = asyncio.create_task(response_of(tap)(wire.scope, wire.receive, wire.send))
    await settle()
    for text in "ab":
        tap.texts.put_nowait(text)
    await settle()
    assert wire.written == [b"data: a\n\n", b"data: b\n\n"]
    assert wire.writes == []
    tap.texts.put_nowait(None)
    await answering
    assert wire.written == [b"data: a\n\n", b"data: b\n\n", DONE]
    assert wire.writes == [DONE]
    assert not wire.watchers


async def test_client_that_leaves_a_server_that_says_so_closes_the_choice() -> None:
    tap, wire = Tap(), FastWire()
    answering = asyncio.create_task(response_of(tap)(wire.scope, wire.receive, wire.send))
    await settle()
    assert not tap.was_closed
    for leave in tuple(wire.watchers):
        leave()
    await asyncio.wait_for(answering, 1)
    assert tap.was_closed
    assert b"" not in wire.writes


async def test_frames_for_a_slow_reader_wait_and_none_overtakes_another() -> None:
    tap, wire = Tap(), FastWire()
    answering = asyncio.create_task(response_of(tap)(wire.scope, wire.receive, wire.send))
    await settle()
    wire.is_full = True
    for text in "abc":
        tap.texts.put_nowait(text)
        await settle()
    assert wire.written == []
    wire.is_full = False
    wire.was_read.set()
    for text in "de":
        tap.texts.put_nowait(text)
    tap.texts.put_nowait(None)
    await answering
    assert b"".join(wire.written) == b"".join(b"data: %c\n\n" % letter for letter in b"abcde") + DONE


async def test_frames_written_at_once_need_no_comment() -> None:
    tap, wire = Tap(), FastWire()
    answering = asyncio.create_task(response_of(tap, keep_alive=0.2)(wire.scope, wire.receive, wire.send))
    await settle()
    for _ in range(25):
        tap.texts.put_nowait("a")
        await asyncio.sleep(0.02)
    assert set(wire.written) == {b"data: a\n\n"}
    tap.texts.put_nowait(None)
    await answering
