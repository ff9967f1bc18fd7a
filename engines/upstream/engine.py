"""Another server's engine: whatever speaks vLLM's dialect of OpenAI's API computes, this process says what.

Prompts go there as token ids and come back as such, so that texts, stop strings and counts are made here. An adapter is
loaded there under the hash of its content, from the directory where it lies here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from loraplex.config.settings import Settings, environment
from loraplex.engines.adapters.tokenizers import AdapterTokenizers
from loraplex.engines.ends import all_ends, named_ends, with_own_ends
from loraplex.engines.errors import EngineDied, EngineError, EngineUnavailable, ModelNotServable
from loraplex.engines.events import Events, Mailbox
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.protocol import (
    Adapter,
    AdapterCard,
    AdapterResidency,
    Embedding,
    EmbedRequest,
    EngineInfo,
    GenerateRequest,
    Health,
    HealthState,
    Progress,
)
from loraplex.engines.stats import EngineStats
from loraplex.engines.tokenizer import HubTokenizer, TemplatedTokenizer
from loraplex.engines.upstream.adapters import LoadedAdapters
from loraplex.engines.upstream.answer import Answer
from loraplex.engines.upstream.card import card_of
from loraplex.engines.upstream.description import eos_token_ids, refuse_without_effect
from loraplex.engines.upstream.generation import answer_from
from loraplex.engines.upstream.in_flight import Flight, InFlight
from loraplex.engines.upstream.refusals import UnknownModel
from loraplex.engines.upstream.server import Server
from loraplex.engines.upstream.upstream import Upstream
from loraplex.engines.upstream.wire import completion_body

_log = logging.getLogger("loraplex.engine")

T = TypeVar("T")


class UpstreamEngine:
    """Implements the engine protocol over one server."""

    tokenizer: HubTokenizer
    _tokenizers: AdapterTokenizers | None = None
    _watching: asyncio.Task[None] | None = None

    def __init__(self, settings: Settings) -> None:
        """Raises ModelNotServable where the settings cannot be meant for this engine."""
        refuse_without_effect(settings)
        self._settings = settings
        self._server = Server(settings.upstream, environment(settings.upstream.api_key_env))
        self._upstream = Upstream(self._server, settings)
        self._adapters = LoadedAdapters(self._upstream.load, self._upstream.unload, settings.upstream.max_adapters)
        self._in_flight = InFlight(settings.engine)
        self._mailboxes: set[Mailbox] = set()
        self._state: HealthState = "starting"
        self._detail = ""
        self._num_restarts = 0

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        self._server.open()
        on_progress(Progress(stage=f"waiting for {self._server.url}", fraction=0.0))
        try:
            while (detail := await self._upstream.ailment()) is not None:
                self._detail = detail
                await asyncio.sleep(self._settings.upstream.poll_seconds)
            on_progress(Progress(stage="reading the tokenizer", fraction=0.5))
            await self._take_up(await self._read_tokenizer())
        except EngineError as error:
            self._state, self._detail = "failed", str(error)
            raise error if isinstance(error, ModelNotServable) else ModelNotServable(str(error)) from error
        self._watching = asyncio.create_task(self._watch())
        on_progress(Progress(stage="ready", fraction=1.0))
        return self.info()

    async def tokenizer_of(self, adapter: Adapter | None) -> TemplatedTokenizer:
        self._require_ready()
        if adapter is None or self._tokenizers is None:
            return self.tokenizer
        return await self._tokenizers.of(adapter)

    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: GenerateRequest) -> Events:
        return Events(partial(self._answering, request))

    @asynccontextmanager
    async def _answering(self, request: GenerateRequest, mailbox: Mailbox) -> AsyncIterator[None]:
        tokenizer = await self.tokenizer_of(request.adapter)
        self._require_ready()
        request = with_own_ends(request, tokenizer.own_ends)
        with self._in_flight.counted(request) as flight:
            running = asyncio.create_task(self._generate(flight, request, mailbox, tokenizer))
            self._mailboxes.add(mailbox)
            try:
                yield
            finally:
                self._mailboxes.remove(mailbox)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                if mailbox.is_over:
                    flight.outcome = "finished" if flight.outcome == "finished" else "failed"

    async def _generate(
        self, flight: Flight, request: GenerateRequest, mailbox: Mailbox, tokenizer: TemplatedTokenizer
    ) -> None:
        """Every error is told: whoever waits at the mailbox would wait for ever."""
        try:
            answer = self._answer(request, mailbox, tokenizer)
            await self._in_flight.within(flight, partial(self._ask, request, answer, tokenizer))
            self._in_flight.total_cached_prompt_tokens += answer.num_cached_tokens
        except Exception as error:  # noqa: BLE001
            flight.outcome = "failed"
            mailbox.fail(error)
            return
        flight.outcome = "finished"

    def _answer(self, request: GenerateRequest, mailbox: Mailbox, tokenizer: TemplatedTokenizer) -> Answer:
        sampling = request.sampling
        eos = self.tokenizer.eos_token_ids
        detokenizer = Detokenizer(
            tokenizer.stream(skip_special_tokens=sampling.skip_special_tokens),
            sampling.stop,
            includes_stop=sampling.includes_stop,
            min_tokens=sampling.min_tokens,
        )
        return Answer(request, mailbox, detokenizer, all_ends(sampling, eos), named_ends(sampling, eos))

    async def _ask(
        self, request: GenerateRequest, answer: Answer, tokenizer: TemplatedTokenizer, on_part: Callable[[], None]
    ) -> None:
        adapter = request.adapter
        body = completion_body(
            request,
            self._upstream.base if adapter is None else adapter.id,
            partial(tokenizer.decode, skip_special_tokens=False),
            sends_stops=tokenizer is self.tokenizer,  # of another its texts would be others
            sends_priority=self._settings.upstream.sends_priority,
        )
        try:
            await self._with(adapter, partial(answer_from, self._server, body, request, answer, on_part))
        finally:
            self._in_flight.total_generated_tokens += answer.num_tokens

    async def _with(self, adapter: Adapter | None, ask: Callable[[], Awaitable[T]]) -> T:
        """What the upstream answers, once the adapter is loaded there. Raises what it raises."""
        try:
            if adapter is None:
                return await ask()
            async with self._adapters.held(adapter):
                try:
                    return await ask()
                except UnknownModel:  # it has forgotten the adapter, or another gateway had it unloaded
                    self._adapters.forget(adapter.id)
                    await self._adapters.bring(adapter)
                    return await ask()
        except UnknownModel as error:
            raise EngineUnavailable(str(error)) from error

    async def embed(self, request: EmbedRequest) -> Embedding:
        self._require_ready()
        with self._in_flight.counted(request) as flight:
            flight.outcome = "failed"
            try:
                embedding = await self._in_flight.within(flight, partial(self._embed, request))
            except asyncio.CancelledError:
                flight.outcome = "aborted"
                raise
            flight.outcome = "finished"
            return embedding

    async def _embed(self, request: EmbedRequest, on_part: Callable[[], None]) -> Embedding:
        ask = partial(self._upstream.embedding, request, self._info, on_part)
        return await self._with(request.adapter, ask)

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        await self.tokenizer_of(adapter)
        return await asyncio.to_thread(card_of, adapter, self._settings.adapters.max_rank)

    async def load(self, adapter: Adapter) -> None:
        self._require_ready()
        await self._adapters.bring(adapter)

    async def unload(self, adapter_id: str) -> None:
        self._require_ready()
        await self._adapters.remove(adapter_id)

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        self._require_ready()
        await self._adapters.pin(adapter, pinned=pinned)

    async def residency(self) -> list[AdapterResidency]:
        return self._adapters.residency(self._in_flight.uses(), self._in_flight.running())

    async def stats(self) -> EngineStats:
        """As far as this process knows; of steps, blocks and preemptions only the upstream does."""
        requests = self._in_flight
        return EngineStats(
            num_steps=requests.num_parts,
            num_running=len(requests) - requests.num_waiting,
            num_waiting=requests.num_waiting,
            num_kv_blocks_used=0,
            num_kv_blocks=0,
            num_adapters_on_device=len(self._adapters),
            total_prompt_tokens=requests.total_prompt_tokens,
            total_cached_prompt_tokens=requests.total_cached_prompt_tokens,
            total_generated_tokens=requests.total_generated_tokens,
            total_finished=requests.total("finished"),
            total_aborted=requests.total("aborted"),
            total_failed=requests.total("failed"),
            total_preemptions=0,
            num_restarts=self._num_restarts,
        )

    def health(self) -> Health:
        return Health(state=self._state, detail=self._detail)

    async def reload(self) -> EngineInfo:
        """Read anew what the upstream serves, and the tokenizer here."""
        self._require_ready()
        await self._take_up(await self._read_tokenizer())
        return self.info()

    async def close(self, drain_seconds: float = 0.0) -> None:
        if self._state != "starting":
            self._state = "draining"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while len(self._in_flight):
                    await asyncio.sleep(0.01)
        for mailbox in self._mailboxes:
            mailbox.fail(EngineDied("the engine has stopped"))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._tokenizers is not None:
            await self._tokenizers.close()
        await self._adapters.close()
        await self._server.close()

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}; try again shortly")

    async def _read_tokenizer(self) -> HubTokenizer:
        directory = self._settings.model.directory
        return await asyncio.to_thread(lambda: HubTokenizer(directory, eos_token_ids(directory)))

    async def _take_up(self, tokenizer: HubTokenizer) -> None:
        """Serve what the upstream does now. Raises ModelNotServable or EngineUnavailable."""
        self._info, served = await self._upstream.look()
        if self._tokenizers is None or self.tokenizer is not tokenizer:
            replaced, self._tokenizers = self._tokenizers, AdapterTokenizers(tokenizer, self._info.vocab_size)
            self.tokenizer = tokenizer
            if replaced is not None:
                await replaced.close()
        self._num_restarts += self._state == "restarting"
        self._state, self._detail = "ready", ""
        for error in await self._adapters.settle(served):
            _log.warning("a pinned adapter could not be loaded again: %s", error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.upstream.poll_seconds)
            detail = await self._upstream.ailment()
            if detail is None and self._state == "restarting":
                try:
                    await self._take_up(self.tokenizer)
                except EngineError as error:
                    detail = str(error)
            if detail is not None and self._state in ("ready", "restarting"):
                if self._state == "ready":
                    _log.error("%s", detail)
                self._state, self._detail = "restarting", detail
