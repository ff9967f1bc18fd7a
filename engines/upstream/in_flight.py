"""The requests that this process has at an upstream: how long each may take, and what became of those before."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from loraplex.config.settings import EngineSettings
from loraplex.engines.errors import DeadlineExceeded, EngineDied, EngineOverloaded
from loraplex.engines.protocol import AdapterUse, EmbedRequest, GenerateRequest
from loraplex.engines.uses import uses_of

T = TypeVar("T")


@dataclass(eq=False)
class Flight:
    """One request; it waits until the first part of its answer has come."""

    request: GenerateRequest | EmbedRequest
    is_begun: bool = False
    outcome: Literal["finished", "failed", "aborted"] = "aborted"


class InFlight:
    """For one event loop."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._flights: set[Flight] = set()
        self._outcomes: Counter[str] = Counter()
        self.num_parts = 0  # of all answers
        self.total_prompt_tokens = self.total_cached_prompt_tokens = self.total_generated_tokens = 0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        return sum(not flight.is_begun for flight in self._flights)

    def total(self, outcome: Literal["finished", "failed", "aborted"]) -> int:
        return self._outcomes[outcome]

    def uses(self) -> dict[str, tuple[AdapterUse, ...]]:
        return uses_of(flight.request for flight in self._flights)

    def running(self) -> dict[str, int]:
        """How many requests of each adapter have begun."""
        begun = (flight.request for flight in self._flights if flight.is_begun)
        return Counter(part.adapter.id for request in begun for part in request.parts)

    @contextmanager
    def counted(self, request: GenerateRequest | EmbedRequest) -> Iterator[Flight]:
        """While the block runs. Raises EngineOverloaded where too many wait already."""
        if self.num_waiting >= self._settings.max_waiting:
            raise EngineOverloaded(f"{self._settings.max_waiting} requests wait already; try again shortly")
        flight = Flight(request)
        self._flights.add(flight)
        self.total_prompt_tokens += len(request.prompt_token_ids)
        try:
            yield flight
        finally:
            self._flights.remove(flight)
            self._outcomes[flight.outcome] += 1

    async def within(self, flight: Flight, work: Callable[[Callable[[], None]], Awaitable[T]]) -> T:
        """What the work gives, which calls what it is given whenever a part of the answer has come.

        Raises what the work raises; EngineOverloaded where the first part is too long in coming, EngineDied where
        another is, DeadlineExceeded.
        """
        loop, settings = asyncio.get_running_loop(), self._settings
        seconds = flight.request.timeout_seconds
        deadline = math.inf if seconds is None else loop.time() + seconds

        def on_part() -> None:
            flight.is_begun = True
            self.num_parts += 1
            limit.reschedule(min(deadline, loop.time() + settings.unresponsive_seconds))

        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + settings.max_wait_seconds)) as limit:
                return await work(on_part)
        except TimeoutError:
            if loop.time() >= deadline:
                raise DeadlineExceeded(f"the request was not finished within {seconds} s") from None
            if flight.is_begun:
                raise EngineDied(f"the upstream said nothing for {settings.unresponsive_seconds} s") from None
            raise EngineOverloaded(f"the upstream did not begin within {settings.max_wait_seconds} s") from None
