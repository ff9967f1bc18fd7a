"""What every response carries: a request id, and how long the server took until it began to answer."""

import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

Headers: TypeAlias = list[tuple[bytes, bytes]]

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def new_request_id() -> bytes:
    return f"req_{secrets.token_hex(12)}".encode()


def is_request_id(text: str) -> bool:
    """Whether a client may call its request so."""
    return text.isascii() and _ID.fullmatch(text.encode()) is not None


def request_id_of(request: Request[Any, Any, Any]) -> str:
    """What the response's `x-request-id` says, for the log."""
    return request_id_in(request.scope)


def request_id_in(scope: Scope) -> str:
    """The same, where there is a scope alone."""
    return str(scope.get("request_id", "-"))


def name_request(request: Request[Any, Any, Any], request_id: str) -> None:
    """The client's own name for it, from within its body."""
    request.scope["request_id"] = request_id  # type: ignore[typeddict-unknown-key]


def tell_limits(request: Request[Any, Any, Any], headers: Callable[[], Headers]) -> None:
    """These headers, asked for when the response begins, join it, whatever becomes of the request."""
    request.scope["limit_headers"] = headers  # type: ignore[typeddict-unknown-key]


def tell(request: Request[Any, Any, Any], headers: Headers) -> None:
    """These headers join the response too."""
    tell_with(request.scope, headers)


def tell_with(scope: Any, headers: Headers) -> None:
    """The same, where there is a scope alone."""
    scope.setdefault("told_headers", []).extend(headers)


def before_answer(scope: Scope, do: Callable[[int], Awaitable[None]]) -> None:
    """Done with the status before the first byte of the answer."""
    scope["before_answer"] = do  # type: ignore[typeddict-unknown-key]


def identify_requests(app: ASGIApp) -> ASGIApp:
    """Adds `x-request-id` (the client's own, if it sent a sane one), `openai-processing-ms`, and `x-ratelimit-*`.

    HEAD is answered wherever GET is, as HTTP has it: like GET, and the server leaves the body out.
    """

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        began = time.perf_counter()
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _ID.fullmatch(given) else new_request_id()
        scope["request_id"] = request_id.decode()  # type: ignore[typeddict-unknown-key]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                do: Callable[[int], Awaitable[None]] | None = scope.get("before_answer")  # type: ignore[assignment]
                if do is not None:
                    await do(message["status"])
                took = f"{(time.perf_counter() - began) * 1e3:.0f}".encode()
                own = [(b"x-request-id", request_id_in(scope).encode()), (b"openai-processing-ms", took)]
                limits: Callable[[], Headers] = scope.get("limit_headers", list)  # type: ignore[assignment]
                told: Headers = scope.get("told_headers", [])  # type: ignore[assignment]
                message["headers"] = [*message["headers"], *own, *limits(), *told]
            await send(message)

        await app(scope, receive, send_with_headers)

    return middleware
