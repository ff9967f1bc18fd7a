"""Which pages of other origins may use the server from a browser, as the Fetch standard has it (CORS).

A key is the page's own to send, never the browser's: what a browser keeps, such as cookies, is not asked for. So a page
can do here what the key that it was given can. What administers the server answers no page of another origin; nor does
what the server may tell without a key beyond that it is there, its metrics.
"""

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from loraplex.gateway.middleware import Headers, tell_with

_ANY = "*"
_CLOSED = ("/admin", "/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/organization")
_METHODS = b"GET, HEAD, POST, DELETE"
_KEPT_SECONDS = b"7200"  # for which a browser asks no second time; Chromium takes no more


def allow_origins(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """The application, open to pages of these origins; to be called within `identify_requests`, which tells it them.

    Every answer that comes from within says so, whatever it is; a preflight is answered here, for it has no key.
    """
    if not origins:
        return app
    known = frozenset(origin.encode() for origin in origins)
    takes_any = _ANY in origins

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or scope["path"].startswith(_CLOSED):
            await app(scope, receive, send)
            return
        sent = {name: value for name, value in scope["headers"] if name.startswith((b"origin", b"access-control"))}
        origin = sent.get(b"origin")
        if not takes_any:
            tell_with(scope, [(b"vary", b"origin")])
        if origin is None or not (takes_any or origin in known):
            await app(scope, receive, send)
            return
        tell_with(scope, [(b"access-control-allow-origin", b"*" if takes_any else origin)])
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in sent:
            await _answer_preflight(sent.get(b"access-control-request-headers"), send)
            return
        tell_with(scope, [(b"access-control-expose-headers", b"*")])
        await app(scope, receive, send)

    return middleware


async def _answer_preflight(wanted: bytes | None, send: Send) -> None:
    """A browser reads no `*` as leave to send an Authorization, so that the headers it asks for are named."""
    headers: Headers = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", _KEPT_SECONDS),
        (b"vary", b"access-control-request-headers"),
    ]
    if wanted is not None:
        headers.append((b"access-control-allow-headers", wanted))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
