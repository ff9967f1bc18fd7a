"""Relays: frames that are ready together, the first error, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from loraplex.engines.errors import EngineDied
from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.clients import unless_client_leaves
from loraplex.gateway.errors import ClientLeft
from loraplex.gateway.sse import Generation, Relay, together


def event(text: str) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=(1,), text=text, step=1)


async def events(texts: Sequence[str], error: Exception | None = None) -> AsyncIterator[TokenEvent]:
    for text in texts:
        yield event(text)
    if error is not None:
        raise error


def generation(events: AsyncIterator[TokenEvent]) -> Generation:
    async def generate(number: int, take: Callable[[int, TokenEvent], None]) -> None:
        async for event in events:
            take(number, event)

    return generate


def relay_of(*choices: AsyncIterator[TokenEvent]) -> Relay:
    return Relay(
        [generation(choice) for choice in choices],
        lambda number, event: f"{number}{event.text};".encode(),
        lambda: b"end",
    )


async def test_frames_that_are_ready_together_come_together() -> None:
    relay = relay_of(events(["a", "b", "c"]))
    await relay.begin(1.0)
    await asyncio.sleep(0.01)
    assert await relay.unwritten() == (b"0a;0b;0c;end", True)


async def test_begin_error_before_the_first_frame_is_raised() -> None:
    relay = relay_of(events([], EngineDied("gone")))
    with pytest.raises(EngineDied):
        await relay.begin(1.0)


async def test_error_after_frames_is_the_last_frame() -> None:
    relay = relay_of(events(["a"], EngineDied("gone")))
    await relay.begin(1.0)
    frames, is_last = await relay.unwritten()
    assert frames.startswith(b"0a;data: ")
    assert b'"code":"engine_died"' in frames
    assert b"end" not in frames
    assert is_last


async def test_begin_waits_no_longer_than_told() -> None:
    async def silent() -> AsyncIterator[TokenEvent]:
        await asyncio.sleep(30)
        yield event("late")

    relay = relay_of(silent())
    await relay.begin(0.05)
    await relay.close()


async def test_together_first_error_cancels_the_others() -> None:
    cancelled = []

    async def endless() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise EngineDied("gone")

    with pytest.raises(EngineDied):
        await together([endless(), fails()])
    assert cancelled == [True]


async def test_unless_client_leaves_cancels_the_work() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeft):
        await unless_client_leaves({}, receive, asyncio.sleep(30))  # type: ignore[arg-type]
