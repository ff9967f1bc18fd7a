"""A request that this process makes of itself: the same application, the same handlers, without a socket.

The caller comes along in the scope, where the guards find it; nothing that arrives from outside can put one there.
"""

import asyncio
from typing import Any

import msgspec
from litestar.types import ASGIApp

from loraplex.auth.caller import Caller


class Reply(msgspec.Struct, frozen=True):
    """A whole response. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes, caller: Caller, request_id: str) -> Reply:
    """POST a JSON body as this caller. Being cancelled is what a client that leaves is."""
    exchange = _Exchange(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [*headers, (b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
        "state": {"caller": caller},
    }
    await app(scope, exchange.receive, exchange.send)
    return exchange.reply()


class _Exchange:
    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 500
        self._headers: dict[str, str] = {}
        self._answer = bytearray()

    async def receive(self) -> Any:
        if self._body is None:
            await asyncio.Event().wait()  # nobody leaves
        message = {"type": "http.request", "body": self._body, "more_body": False}
        self._body = None
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self._answer += message.get("body", b"")

    def reply(self) -> Reply:
        return Reply(self._status, self._headers, bytes(self._answer))
