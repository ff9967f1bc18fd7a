"""`Idempotency-Key`: a request that its client sends again is answered from the first one's answer, and billed once.

A key is its tenant's own and stands for one request: path and body. While that is being answered another try gets 409,
later the same answer; under another body 422. The client may leave meanwhile, the answer is generated to its end. What
failed or was cut short is forgotten, so that another try is a request of its own. Answers are kept in this process's
memory alone, for a while and up to a size; of a request there is only a hash.
"""

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, Message, Receive, Scope, Send

from loraplex.auth.caller import Caller
from loraplex.auth.errors import AuthError
from loraplex.auth.tenants import Tenants
from loraplex.config.settings import Settings, UsageSettings
from loraplex.gateway.accounts import Meter
from loraplex.gateway.errors import GatewayError, IdempotencyKeyInUse, IdempotencyKeyReused, MalformedRequest
from loraplex.gateway.guards import identify, refuse_at_guard
from loraplex.gateway.sse import KEEP_ALIVE

_KEY = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_KEPT_HEADERS = (b"content-type", b"cache-control")
Place = tuple[str, bytes]  # whose, and the key


class Answer:
    """A status, its headers and a body."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    async def send(self, send: Send) -> None:
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body)), (b"idempotent-replayed", b"true")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class _Claim:
    """One request under a key, and its answer once there is one."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.answer: Answer | None = None
        self.answered_at = 0.0


class Replays:
    """What was and is being answered under keys."""

    def __init__(self, settings: UsageSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._running: dict[Place, _Claim] = {}
        self._answered: OrderedDict[Place, _Claim] = OrderedDict()  # the oldest first
        self._num_bytes = 0

    def claim(self, place: Place, fingerprint: bytes) -> Answer | None:
        """The answer of an earlier request; None makes the caller the one to `keep` or `release` it.

        Raises IdempotencyKeyInUse or IdempotencyKeyReused.
        """
        self._forget_old()
        known = self._running.get(place) or self._answered.get(place)
        if known is None:
            self._running[place] = _Claim(fingerprint)
            return None
        if known.fingerprint != fingerprint:
            raise IdempotencyKeyReused("This Idempotency-Key was used for another request; take a new one.")
        if known.answer is None:
            raise IdempotencyKeyInUse("A request with this Idempotency-Key is being answered; try again later.")
        return known.answer

    def keep(self, place: Place, answer: Answer) -> None:
        claim = self._running.pop(place)
        claim.answer, claim.answered_at = answer, self._clock()
        self._answered[place] = claim
        self._num_bytes += len(answer.body)
        self._forget_old()

    def release(self, place: Place) -> None:
        """It came to nothing; the next request is the first. Changes nothing once it is kept."""
        self._running.pop(place, None)

    @property
    def max_answer_bytes(self) -> int:
        return self._settings.replay_bytes

    def _forget_old(self) -> None:
        oldest = self._clock() - self._settings.replay_seconds
        while self._answered:
            place, claim = next(iter(self._answered.items()))
            assert claim.answer is not None, "what is answered has one"
            if claim.answered_at > oldest and self._num_bytes <= self._settings.replay_bytes:
                return
            del self._answered[place]
            self._num_bytes -= len(claim.answer.body)


def answer_once(app: ASGIApp, tenants: Tenants, settings: Settings) -> ASGIApp:
    """The application, minding `Idempotency-Key` wherever text is generated."""
    replays = Replays(settings.usage)

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        key = _key(scope)
        if key is None:
            await app(scope, receive, send)
            return
        body = _Body(receive, settings.server.max_body_bytes)
        place, answer = None, None
        try:
            caller = await identify(Request(scope), tenants)
            await body.read()
            if body.is_whole:
                place = _place(caller, key)
                answer = replays.claim(place, hashlib.sha256(scope["path"].encode() + b"\0" + body.data).digest())
        except (AuthError, GatewayError) as error:
            refuse_at_guard(scope, error)
            place = None
        if place is None:
            await app(scope, body.receive, send)
        elif answer is not None:
            await answer.send(send)
        else:
            await _answer(app, scope, body, send, replays, place)

    return middleware


def tell_meter(request: Request[Any, Any, Any], meter: Meter) -> None:
    """What the request uses, and how it ends."""
    request.scope["meter"] = meter  # type: ignore[typeddict-unknown-key]


async def _answer(app: ASGIApp, scope: Scope, body: "_Body", send: Send, replays: Replays, place: Place) -> None:
    recorder = _Recorder(send, replays.max_answer_bytes)
    scope["extensions"] = {}  # nothing may be written past the recorder
    try:
        await app(scope, body.receive_without_end, recorder.send)
        meter: Meter | None = scope.get("meter")  # type: ignore[assignment]
        answer = recorder.answer()
        if answer is not None and meter is not None and meter.is_complete:
            replays.keep(place, answer)
    finally:
        replays.release(place)


class _Body:
    """A request's body, read before the application reads it again."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._read: list[Any] = []
        self.data = b""
        self.is_whole = False

    async def read(self) -> None:
        """All of it, unless it breaks off or is longer than any route takes."""
        num_bytes = 0
        while not self.is_whole and num_bytes <= self._most:
            message = await self._receive()
            self._read.append(message)
            if message["type"] != "http.request":
                return
            num_bytes += len(message["body"])
            self.is_whole = not message["more_body"]
        self.data = b"".join(message["body"] for message in self._read)

    async def receive(self) -> Any:
        """What was read, and what comes after it."""
        return self._read.pop(0) if self._read else await self._receive()

    async def receive_without_end(self) -> Any:
        """What was read, from a client that never leaves."""
        if not self._read:
            await asyncio.Event().wait()
        return self._read.pop(0)


class _Recorder:
    """Passes an answer on and remembers it, unless it is longer than `most` bytes."""

    def __init__(self, send: Send, most: int) -> None:
        self._send = send
        self._most = most
        self._start: HTTPResponseStartEvent | None = None
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._is_over = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            part = message["body"].removeprefix(KEEP_ALIVE)
            self._num_bytes += len(part)
            self._is_over = not message["more_body"]
            self._parts.append(part)
            if self._num_bytes > self._most:
                self._parts.clear()
        await self._send(message)

    def answer(self) -> Answer | None:
        """None where it is incomplete or too long."""
        if self._start is None or not self._is_over or self._num_bytes > self._most:
            return None
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() in _KEPT_HEADERS]
        return Answer(self._start["status"], headers, b"".join(self._parts))


def _key(scope: Scope) -> bytes | None:
    if scope["type"] != ScopeType.HTTP or scope["method"] != "POST" or scope["path"].startswith("/admin/"):
        return None
    return next((value for name, value in scope["headers"] if name == b"idempotency-key"), None)


def _place(caller: Caller, key: bytes) -> Place:
    """Raises MalformedRequest for what is no key."""
    if _KEY.fullmatch(key) is None:
        raise MalformedRequest("The Idempotency-Key must be 1 to 255 printable characters.", "Idempotency-Key")
    return caller.tenant_id or caller.key_id, key
