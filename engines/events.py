"""The events of one request on their way from an engine to whoever asked, without a task or a queue in between.

An engine puts each event into the request's `Mailbox` in the step that made it. Whoever gave `Events.each` a callable
has it in that same moment; whoever iterates finds it there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Self, TypeAlias

from loraplex.engines.protocol import TokenEvent

# Whether the event was taken. One that was not is given back, and nothing more comes until it is asked for.
Take: TypeAlias = Callable[[TokenEvent], bool]


async def each(events: AsyncIterator[TokenEvent], take: Take) -> TokenEvent | None:
    """Give events to `take` until it does not take one, which is returned; None once the last one was taken.

    Raises what the iterator raises, and what `take` raises.
    """
    if isinstance(events, Events):
        return await events.each(take)
    async for event in events:
        if not take(event):
            return event
    return None


class Mailbox:
    """Where an engine puts a request's events. After the one with a `finish_reason`, or an error, comes nothing."""

    __slots__ = ("_news", "error", "is_over", "kept", "take")

    def __init__(self) -> None:
        self.kept: deque[TokenEvent] = deque()  # what nobody has taken
        self.take: Take | None = None
        self.is_over = False
        self.error: Exception | None = None
        self._news: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self.is_over = event.finish_reason is not None
        try:
            if self.take is not None and self.take(event):
                if self.is_over:
                    self._tell()
                return
            self.kept.append(event)
        except Exception as error:  # noqa: BLE001  the taker's own: raised where it waits, not in the engine's step
            self.error = error
        self.take = None
        self._tell()

    def fail(self, error: Exception) -> None:
        self.is_over = True
        self.error = error
        self._tell()

    async def news(self) -> None:
        """Wait until an event is kept, or nothing more comes."""
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class Events:
    """What an engine's `generate` returns: an async iterator that can also hand over each event as it is made.

    `running` is entered with the first question, and left when all was given or this is closed; to leave it is to
    abort what still runs.
    """

    def __init__(self, running: Callable[[Mailbox], AbstractAsyncContextManager[None]]) -> None:
        self._mailbox = Mailbox()
        self._running: AbstractAsyncContextManager[None] | None = running(self._mailbox)
        self._is_begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        await self._begin()
        mailbox = self._mailbox
        if not mailbox.kept and not mailbox.is_over and self._running is not None:
            await mailbox.news()
        if mailbox.kept:
            return mailbox.kept.popleft()
        await self._end()
        raise StopAsyncIteration

    async def each(self, take: Take) -> TokenEvent | None:
        """As the function of this name; `take` is called from the engine's own step, and must not wait."""
        await self._begin()
        mailbox = self._mailbox
        while mailbox.kept:
            event = mailbox.kept.popleft()
            if not take(event):
                return event
        if not mailbox.is_over and self._running is not None:
            mailbox.take = take
            try:
                await mailbox.news()
            finally:
                mailbox.take = None
        if mailbox.kept:
            return mailbox.kept.popleft()
        await self._end()
        return None

    async def aclose(self) -> None:
        running, self._running = self._running, None
        if running is not None and self._is_begun:
            await running.__aexit__(None, None, None)

    async def _begin(self) -> None:
        if not self._is_begun and self._running is not None:
            self._is_begun = True
            try:
                await self._running.__aenter__()
            except BaseException:
                self._running = None
                raise

    async def _end(self) -> None:
        """Raises the error that ended it, once."""
        error, self._mailbox.error = self._mailbox.error, None
        await self.aclose()
        if error is not None:
            raise error
