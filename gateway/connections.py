"""What one connection may take: bounded heads, and bounded time to send a head and a body.

uvicorn waits for ever for a request that has begun, and keeps whatever a client calls a header. A request's head must
be complete within `header_seconds` of its first byte (of the connection, for the first one); its body within
`body_seconds`, and longer only as far as what came by then was at least `_LEAST_RATE`. What a body has beside its
bytes, such as headers behind it, is bounded like a head, and kept nowhere.

A body of unknown length it would send in chunks to a client of HTTP/1.0 as well, which knows none: that one gets it as
it is, up to the connection's end.

It would also lose the body of a request that offers another protocol, as Java's client and curl do by themselves
(`Upgrade: h2c`). The offer is declined instead: such a request is read as one that did not make it (RFC 9110, 7.8).
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from loraplex.config.settings import Server
from loraplex.gateway.middleware import new_request_id

_CONNECTION = "loraplex.connection"
_LEAST_RATE = 16 * 1024  # bytes a second; a phone on a train sends more


class _Refusal(NamedTuple):
    """An answer that no route gives, and the end of its connection."""

    status: str
    code: str
    message: str

    def encoded(self) -> bytes:
        error = {"message": self.message, "type": "invalid_request_error", "param": None, "code": self.code}
        body = msgspec.json.encode({"error": error})
        head = f"HTTP/1.1 {self.status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        own = b"x-request-id: " + new_request_id() + b"\r\nopenai-processing-ms: 0\r\n"
        return head.encode() + own + b"connection: close\r\n\r\n" + body


class Connection:
    """What lies beneath the ASGI scope of a request, an extension of it: see `connection_of`.

    ASGI's own way to write passes every middleware and costs several times as much as the write itself; its own way to
    learn that a client has left is a task that waits.
    """

    __slots__ = ("_transport", "is_full", "watchers")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.is_full = False  # whether more was written than the client has read in time
        self.watchers: set[Callable[[], None]] = set()  # called when the client has left

    def write_at_once(self, body: bytes) -> bool:
        """Write a part of a body of unknown length, between the response's head and its end.

        False where that must wait, or the client has left, and nothing is done.
        """
        if self.is_full or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def watch(self, leave: Callable[[], None]) -> Callable[[], None]:
        """Call `leave` when the client leaves, soon if it has. Returns what ends the watch."""
        if self._transport.is_closing():
            return asyncio.get_running_loop().call_soon(leave).cancel
        self.watchers.add(leave)
        return partial(self.watchers.discard, leave)


def connection_of(scope: Any) -> Connection | None:
    """None where another server, or this process itself, has sent the request."""
    found: Connection | None = scope.get("extensions", {}).get(_CONNECTION, {}).get("it")
    return found


def protocol_for(server: Server) -> type[HttpToolsProtocol]:
    """uvicorn's protocol within the bounds of these settings."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"bounds": server})


class _UnframedCycle(RequestResponseCycle):
    """A response to HTTP/1.0, whose connection uvicorn closes behind it."""

    _has_no_length = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._has_no_length = all(name.lower() != b"content-length" for name, _ in message["headers"])
            self.chunked_encoding = False if self._has_no_length else None
        elif self._has_no_length:
            self.expected_content_length = len(message.get("body", b""))  # else it would be longer than was said
        await super().send(message)


class _BoundedProtocol(HttpToolsProtocol):
    bounds: ClassVar[Server]
    _deadline: asyncio.TimerHandle | None = None
    _is_in_head = True
    _has_passed_head = False  # by what came last
    _is_refused = False
    _offers_upgrade = False
    _num_head_bytes = 0  # of a head that is not complete
    _num_idle_bytes = 0  # within a body, since the last of its own bytes
    _num_body_bytes = 0
    _connection: Connection
    _body_began_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport)
        self._within(self.bounds.header_timeout_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()  # uvicorn's own leaves it, and so the connection, where the client reset it
        super().connection_lost(exc)
        for leave in tuple(self._connection.watchers):
            leave()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connection.is_full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connection.is_full = False

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._has_passed_head = False
        self._unset_keepalive_if_required()
        num_body_bytes = self._num_body_bytes
        self._feed(data)
        if self._is_refused:
            return
        self._expect_rest()
        # the parser keeps an endless header without a word; what holds the end of a head or a body is not all header
        if self._has_passed_head:
            return
        if self._is_in_head:
            self._num_head_bytes += len(data)
            self._check_head(self._num_head_bytes)
        else:
            self._num_idle_bytes = self._num_idle_bytes + len(data) if num_body_bytes == self._num_body_bytes else 0
            self._check_head(self._num_idle_bytes, "What stands behind a body or between its chunks")

    def _expect_rest(self) -> None:
        """Nearly every request comes in one piece, and needs no deadline."""
        if self._deadline is not None:
            return
        if not self._is_in_head:
            self._within(self.bounds.body_timeout_seconds, self._body_is_late)
        elif not self._has_passed_head:
            self._within(self.bounds.header_timeout_seconds, self._head_is_late)

    def _feed(self, data: bytes) -> None:
        while not self._is_refused:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._declined_upgrade() + data[upgrade.args[0] :]
            except httptools.HttpParserError:
                message = "This is not an HTTP request that can be read."
                self._refuse(_Refusal("400 Bad Request", "invalid_request", message))

    def _declined_upgrade(self) -> bytes:
        """The head of the request that was read last, without its offer, and a parser that has read nothing."""
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        return b"\r\n".join([line, *headers, b"", b""])

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # nobody reads what is behind a body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        self._has_passed_head = True
        self._num_head_bytes = self._num_body_bytes = self._num_idle_bytes = 0
        self._check_head(len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers))
        self._check_line()
        self._offers_upgrade = self.parser.should_upgrade()
        if self._is_refused or self._offers_upgrade:
            return
        self._is_in_head = False
        self._body_began_at = self.loop.time()
        super().on_headers_complete()
        if self.cycle is None or self.cycle.scope is not self.scope:
            return
        if self.parser.get_http_version() == "1.0":
            self.cycle.__class__ = _UnframedCycle  # it has only just been made, and nobody has a part to say which
        else:
            self.scope["extensions"] = {_CONNECTION: {"it": self._connection}}

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            self._num_body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        self._is_in_head = self._has_passed_head = True  # the next one's
        if not self._is_refused and not self._offers_upgrade:  # one that offers it is read again
            super().on_message_complete()

    def _check_line(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            message = "This server speaks HTTP/1.1 and HTTP/1.0."
            self._refuse(_Refusal("505 HTTP Version Not Supported", "invalid_request", message))
        elif self.parser.get_method() == b"CONNECT":
            message = "This server is no proxy: it opens no tunnels."
            self._refuse(_Refusal("405 Method Not Allowed", "method_not_allowed", message))

    def _check_head(self, num_bytes: int, what: str = "The request's line and headers together") -> None:
        most = self.bounds.max_header_bytes
        if num_bytes > most:
            message = f"{what} may have {most} bytes."
            self._refuse(_Refusal("431 Request Header Fields Too Large", "headers_too_large", message))

    def _head_is_late(self) -> None:
        seconds = self.bounds.header_timeout_seconds
        message = f"The request's headers were not complete after {seconds:g} s."
        self._refuse(_Refusal("408 Request Timeout", "request_timeout", message))

    def _body_is_late(self) -> None:
        """Unless it is the server that does not read, or what came by now has earned more time."""
        earned = self._num_body_bytes / _LEAST_RATE - (self.loop.time() - self._body_began_at)
        if self.flow.read_paused:
            earned = max(earned, 1.0)
        if earned > 0:
            self._within(earned + 0.1, self._body_is_late)
            return
        if self.cycle is not None and self.cycle.response_started:
            self.transport.abort()  # the answer has come before the request was complete
            return
        message = f"The request's body was not complete after {self.bounds.body_timeout_seconds:g} s."
        self._refuse(_Refusal("408 Request Timeout", "request_timeout", message))

    def _refuse(self, refusal: _Refusal) -> None:
        self._disarm()
        self._is_refused = True
        if not self.transport.is_closing():
            cycle = self.cycle  # of the request before, where this one's head is not complete
            if cycle is None or not cycle.response_started or (cycle.response_complete and self._is_in_head):
                self.transport.write(refusal.encoded())
            self.transport.close()

    def _within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, otherwise)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
