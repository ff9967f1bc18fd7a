"""One server over HTTP: questions with one answer, and streams. It alone knows the key, and never tells it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from loraplex.config.upstream import UpstreamSettings
from loraplex.engines.errors import EngineDied, EngineUnavailable, GenerationFailed, ModelNotServable
from loraplex.engines.upstream.refusals import Refusal, refusal_of

_QUICK_SECONDS = 10.0
# below the five seconds after which uvicorn closes an idle connection, which is a race otherwise
_KEPT_SECONDS = 4.0
_MOST_BYTES = 64 * 2**20  # of one answer, or one line of a stream


class Refused(Exception):
    """The upstream answered, but not with what was asked for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Server:
    """For one event loop, from `open` to `close`."""

    _client: httpx.AsyncClient | None = None

    def __init__(self, settings: UpstreamSettings, key: str | None) -> None:
        """Raises ModelNotServable where the settings name no server, or certificates that are none."""
        if settings.url is None:
            raise ModelNotServable("upstream.url is to say which server computes")
        self.url = settings.url.rstrip("/")
        self._key = key
        self._connect_seconds = settings.connect_seconds
        try:
            self._tls = ssl.create_default_context(cafile=settings.ca_file) if self.url.startswith("https") else False
        except OSError as error:
            raise ModelNotServable(f"upstream.ca_file: {settings.ca_file} holds no certificates: {error}") from error

    def open(self) -> None:
        headers = {"Accept-Encoding": "identity", "User-Agent": "loraplex"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            verify=self._tls,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_KEPT_SECONDS),
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def get(self, path: str, seconds: float = _QUICK_SECONDS) -> Any:
        """The JSON there, None where the body is empty. Raises Refused, EngineUnavailable, GenerationFailed."""
        return await self._ask("GET", path, None, seconds)

    async def post(self, path: str, body: Any, seconds: float | None = _QUICK_SECONDS) -> Any:
        """The JSON, or the text, that it answers. Raises Refused, EngineUnavailable, EngineDied, GenerationFailed."""
        return await self._ask("POST", path, body, seconds)

    async def _ask(self, method: str, path: str, body: Any, seconds: float | None) -> Any:
        async with self._answer(method, path, body, seconds) as answer:
            raw = await self._whole(answer)
        if not 200 <= answer.status_code < 300:
            raise Refused(self._without_key(refusal_of(answer.status_code, raw)))
        if not answer.headers.get("content-type", "").startswith("application/json"):
            return raw.decode(errors="replace")
        try:
            return msgspec.json.decode(raw) if raw else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise GenerationFailed("the upstream's answer is no JSON") from error

    @asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        """What the server-sent events of an answer say, until `[DONE]`; to leave it is to close the connection.

        Raises Refused or EngineUnavailable at its beginning, EngineDied where the connection breaks.
        """
        async with self._answer("POST", path, body, None) as answer:
            if answer.status_code != 200:
                raise Refused(self._without_key(refusal_of(answer.status_code, await self._whole(answer))))
            yield _events(answer)

    @asynccontextmanager
    async def _answer(self, method: str, path: str, body: Any, seconds: float | None) -> AsyncIterator[httpx.Response]:
        if self._client is None:
            raise EngineUnavailable("the engine is starting; try again shortly")
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        limit = httpx.Timeout(seconds, connect=self._connect_seconds)
        try:
            async with self._client.stream(method, path, content=content, headers=headers, timeout=limit) as answer:
                yield answer
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise EngineUnavailable("the upstream cannot be reached; try again shortly") from error
        except httpx.TimeoutException as error:
            raise EngineUnavailable("the upstream did not answer in time; try again shortly") from error
        except httpx.HTTPError as error:
            raise EngineDied("the connection to the upstream broke off") from error

    async def _whole(self, answer: httpx.Response) -> bytes:
        raw = bytearray()
        async for part in answer.aiter_raw():
            raw += part
            if len(raw) > _MOST_BYTES:
                raise GenerationFailed("the upstream's answer does not end")
        return bytes(raw)

    def _without_key(self, refusal: Refusal) -> Refusal:
        if self._key is None or self._key not in refusal.message:
            return refusal
        return msgspec.structs.replace(refusal, message=refusal.message.replace(self._key, "***"))


async def _events(answer: httpx.Response) -> AsyncGenerator[bytes]:
    rest = b""
    async for part in answer.aiter_raw():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            said = line[5:].strip()
            if said == b"[DONE]":
                return
            yield said
        if len(rest) > _MOST_BYTES:
            raise GenerationFailed("the upstream's answer does not end")
