"""Events on their way from an engine to whoever asked."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loraplex.engines.errors import EngineDied, EngineUnavailable
from loraplex.engines.events import Events, Mailbox, each
from loraplex.engines.protocol import TokenEvent


def event(text: str, *, is_last: bool = False) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=(1,), text=text, step=1, finish_reason="stop" if is_last else None)


class Request:
    """One request of an engine whose events come when the test says so."""

    def __init__(self) -> None:
        self.mailbox: Mailbox | None = None
        self.is_left = False

    @asynccontextmanager
    async def running(self, mailbox: Mailbox) -> AsyncIterator[None]:
        self.mailbox = mailbox
        try:
            yield
        finally:
            self.is_left = True

    def put(self, text: str, *, is_last: bool = False) -> None:
        assert self.mailbox is not None
        self.mailbox.put(event(text, is_last=is_last))


async def begun(request: Request) -> None:
    while request.mailbox is None:
        await asyncio.sleep(0)


async def test_iterating_gives_all_events_and_then_leaves() -> None:
    request = Request()
    events = Events(request.running)
    first = asyncio.create_task(anext(events))
    await begun(request)
    request.put("a")
    request.put("b")
    request.put("c", is_last=True)
    assert [(await first).text, *[each.text async for each in events]] == ["a", "b", "c"]
    assert request.is_left
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_each_is_given_the_event_in_the_moment_it_comes() -> None:
    request, seen = Request(), list[str]()
    giving = asyncio.create_task(each(Events(request.running), lambda one: not seen.append(one.text)))  # type: ignore[func-returns-value]
    await begun(request)
    await asyncio.sleep(0)
    request.put("a")
    assert seen == ["a"]
    request.put("b", is_last=True)
    assert seen == ["a", "b"]
    assert await giving is None
    assert request.is_left


async def test_event_that_is_not_taken_is_given_back_and_none_is_lost() -> None:
    request, seen = Request(), list[str]()
    events = Events(request.running)

    def take(one: TokenEvent) -> bool:
        if one.text == "b" or len(seen) == 3:
            return False
        seen.append(one.text)
        return True

    giving = asyncio.create_task(each(events, take))
    await begun(request)
    await asyncio.sleep(0)
    for text in "abcd":
        request.put(text)
    request.put("e", is_last=True)
    assert seen == ["a"]
    refused = await giving
    assert refused is not None
    assert refused.text == "b"
    refused = await each(events, take)
    assert refused is not None
    assert (seen, refused.text) == (["a", "c", "d"], "e")
    assert await each(events, take) is None
    assert request.is_left


async def test_error_of_the_engine_comes_after_what_it_made() -> None:
    request = Request()
    events = Events(request.running)
    first = asyncio.create_task(anext(events))
    await begun(request)
    request.put("a")
    request.put("b")
    assert request.mailbox is not None
    request.mailbox.fail(EngineDied("gone"))
    assert (await first).text == "a"
    assert (await anext(events)).text == "b"
    with pytest.raises(EngineDied):
        await anext(events)
    assert request.is_left


async def test_error_of_the_taker_is_its_own_and_not_the_engines() -> None:
    request = Request()

    def take(one: TokenEvent) -> bool:
        raise ValueError("cannot be told")

    giving = asyncio.create_task(each(Events(request.running), take))
    await begun(request)
    await asyncio.sleep(0)
    request.put("a")
    with pytest.raises(ValueError, match="cannot be told"):
        await giving
    assert request.is_left


async def test_error_at_the_begin_is_raised_and_nothing_is_left() -> None:
    @asynccontextmanager
    async def refused(mailbox: Mailbox) -> AsyncIterator[None]:
        raise EngineUnavailable("not now")
        yield

    events = Events(refused)
    with pytest.raises(EngineUnavailable):
        await anext(events)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


@pytest.mark.parametrize("how", ["close", "cancel", "forget"])
async def test_request_that_is_not_read_to_its_end_is_aborted(how: str) -> None:
    request = Request()
    events = Events(request.running)
    first = asyncio.create_task(anext(events))
    await begun(request)
    if how == "cancel":
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await events.aclose()
    else:
        request.put("a")
        await first
    if how == "close":
        await events.aclose()
    del events, first
    gc.collect()
    await asyncio.sleep(0.01)
    assert request.is_left


async def test_events_that_are_closed_before_they_begin_never_do() -> None:
    request = Request()
    events = Events(request.running)
    await events.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    assert request.mailbox is None


async def test_each_takes_any_engines_iterator() -> None:
    async def generate() -> AsyncIterator[TokenEvent]:
        for text in "ab":
            yield event(text)
        yield event("c", is_last=True)

    seen: list[str] = []

    def take(one: TokenEvent) -> bool:
        seen.append(one.text)
        return one.text != "b"

    events = generate()
    refused = await each(events, take)
    assert refused is not None
    assert refused.text == "b"
    assert await each(events, take) is None
    assert seen == ["a", "b", "c"]
