"""A request of many parts is given to the engine piece by piece, so that it does not fill the engine's queue alone."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from loraplex.config.settings import EngineSettings
from loraplex.engines.errors import DeadlineExceeded
from loraplex.engines.protocol import GenerateRequest


def parts_at_once(settings: EngineSettings) -> int:
    """As many as one step computes, and never so many that the queue refuses what one request brings."""
    return min(settings.max_running, max(settings.max_waiting // 2, 1))


class Turns:
    """Those of one request's parts, in their order."""

    def __init__(self, at_once: int) -> None:
        self._room = asyncio.Semaphore(at_once)
        self._began = time.monotonic()

    @asynccontextmanager
    async def turn(self, part: GenerateRequest) -> AsyncIterator[GenerateRequest]:
        """The part, once there is room for it, with what is left of its time. Raises DeadlineExceeded."""
        has_waited = self._room.locked()
        async with self._room:
            yield self._in_time(part) if has_waited else part

    def _in_time(self, part: GenerateRequest) -> GenerateRequest:
        """The time is the whole request's: a part that waits has less of it."""
        limit = part.timeout_seconds
        if limit is None:
            return part
        left = limit - (time.monotonic() - self._began)
        if left <= 0:
            raise DeadlineExceeded(f"the request was not finished within {limit:g} s")
        return msgspec.structs.replace(part, timeout_seconds=left)
