"""An engine that can be computed by hand: it answers with the prompt's own bytes.

One token is one UTF-8 byte. With an adapter the answer begins with the adapter's name and a colon, with several with
their names and weights. A grammar is only checked: what is not of it, the echo refuses to say. Every step gives each
running request one token, so interleaving, aborts and counts can be predicted exactly. The hidden state of a token is
its byte's eight bits, lowest first, then the sum of the bytes of the adapters' names, times their weights. Three words
in a prompt make faults on demand: `<fail>` fails this request after four tokens, `<die>` ends every request in flight
as a crash would, `<slow>` gives this request steps of its own, of 50 ms; an embedding is one step.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper

from loraplex.config.settings import Settings
from loraplex.engines.echo_speech import EOS, EchoTokenizer, Speech, composed
from loraplex.engines.errors import (
    AdapterInUse,
    AdapterInvalid,
    EngineDied,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
)
from loraplex.engines.events import Events, Mailbox
from loraplex.engines.matching import match
from loraplex.engines.protocol import (
    Adapter,
    AdapterCard,
    AdapterResidency,
    Embedding,
    EmbedRequest,
    EngineInfo,
    GenerateRequest,
    Grammar,
    Health,
    HealthState,
    Progress,
    TokenEvent,
)
from loraplex.engines.stats import EngineStats
from loraplex.engines.uses import uses_of

FAULT_AFTER = 4
EMBEDDING_WIDTH = 9


class EchoEngine:
    """Implements the whole protocol; `step_seconds` is the pause before each token."""

    def __init__(self, settings: Settings, step_seconds: float = 0.0) -> None:
        self._info = _described(settings)
        self._step_seconds = step_seconds
        self._state: HealthState = "starting"
        self._in_flight: dict[str, GenerateRequest | EmbedRequest] = {}
        self._adapters: dict[str, Adapter] = {}
        self._pinned: set[str] = set()
        self._deaths = 0
        self._in_step: list[Speech] = []
        self._is_in_step = False
        self._step_over = asyncio.Event()
        self._steps = self._prompt_tokens = self._generated = self._finished = self._aborted = self._failed = 0
        self.tokenizer = EchoTokenizer()
        self._matching: LLTokenizer | None = None

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        on_progress(Progress(stage="ready", fraction=1.0))
        self._state = "ready"
        return self.info()

    async def tokenizer_of(self, adapter: Adapter | None) -> EchoTokenizer:
        return self.tokenizer

    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        return Events(partial(self._answering, request))

    @asynccontextmanager
    async def _answering(self, request: GenerateRequest, mailbox: Mailbox) -> AsyncIterator[None]:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}")
        room = self.info().max_model_len - len(request.prompt_token_ids)
        if room < 1:
            raise PromptTooLong(f"the prompt has {len(request.prompt_token_ids)} tokens; no room is left", "messages")
        for part in request.parts:
            await self.load(part.adapter)
        if request.sampling.grammar is not None:
            self._require_form(request, request.sampling.grammar)
        self._in_flight[request.request_id] = request
        self._prompt_tokens += len(request.prompt_token_ids)
        speech = Speech(request, room, mailbox, self._deaths)
        try:
            self._go_on(speech)
            yield
        finally:
            speech.is_left = True
            del self._in_flight[request.request_id]
            self._finished += speech.is_over
            self._aborted += not speech.is_over

    def _require_form(self, request: GenerateRequest, grammar: Grammar) -> None:
        """The echo says what it says: where that is not of the grammar it refuses. Raises InvalidRequest."""
        if self._matching is None:
            self._matching = LLTokenizer(TokenizerWrapper(_ByteTokens()))
        matcher = match(grammar, self._matching)
        said = [*(f"{composed(request)}: ".encode() if request.parts else b""), *request.prompt_token_ids]
        if matcher.validate_tokens(said) < len(said) or not matcher.consume_tokens(said) or not matcher.is_accepting():
            raise InvalidRequest("the echo engine follows no grammar, and would say what is not of this one", "grammar")

    def _say(self, speech: Speech) -> None:
        if speech.is_left:
            return
        self._steps += 1
        if speech.num_said == FAULT_AFTER and speech.is_faulty:
            if speech.fails:
                self._failed += 1
                speech.is_over = True
                speech.mailbox.fail(GenerationFailed("this request was asked to fail"))
                return
            self._deaths += 1
        if self._deaths != speech.deaths:
            speech.mailbox.fail(EngineDied("the engine process ended; it is being restarted"))
            return
        self._generated += 1
        event = speech.say(self._steps)
        if not speech.is_over:
            self._go_on(speech)
        speech.mailbox.put(event)

    def _go_on(self, speech: Speech) -> None:
        """With the next token, at the end of the next step."""
        if speech.is_slow:
            asyncio.get_running_loop().call_later(self._slow_seconds, self._say, speech)
        else:
            self._in_step.append(speech)
            self._begin_step()

    def _begin_step(self) -> None:
        """The step that every running request shares, unless it has begun."""
        if self._is_in_step:
            return
        self._is_in_step = True
        loop = asyncio.get_running_loop()
        if self._step_seconds > 0:
            loop.call_later(self._step_seconds, self._end_step)
        else:
            loop.call_soon(self._end_step)

    def _end_step(self) -> None:
        self._is_in_step = False
        speeches, self._in_step = self._in_step, []
        self._step_over.set()
        self._step_over = asyncio.Event()
        for speech in speeches:
            self._say(speech)

    async def _step(self, *, is_slow: bool) -> None:
        if is_slow:
            await asyncio.sleep(self._slow_seconds)
            return
        self._begin_step()
        await self._step_over.wait()

    @property
    def _slow_seconds(self) -> float:
        return max(self._step_seconds, 0.05)

    async def embed(self, request: EmbedRequest) -> Embedding:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}")
        length, limit = len(request.prompt_token_ids), self.info().max_model_len
        if length > limit:
            raise PromptTooLong(f"the prompt has {length} tokens; at most {limit} fit", "input")
        if not length:
            raise InvalidRequest("the prompt has no tokens", "prompt")
        for part in request.parts:
            await self.load(part.adapter)
        self._in_flight[request.request_id] = request
        self._prompt_tokens += length
        deaths = self._deaths
        prompt = self.tokenizer.decode(request.prompt_token_ids)
        finished = False
        try:
            await self._step(is_slow="<slow>" in prompt)
            self._steps += 1
            self._deaths += "<die>" in prompt
            if self._deaths != deaths:
                raise EngineDied("the engine process ended; it is being restarted")
            finished = True
            if "<fail>" in prompt:
                raise GenerationFailed("this request was asked to fail")
            return Embedding(request_id=request.request_id, values=_pooled(request))
        except GenerationFailed:
            self._failed += 1
            raise
        finally:
            del self._in_flight[request.request_id]
            self._finished += finished
            self._aborted += not finished

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        try:
            config = json.loads((Path(adapter.path) / "adapter_config.json").read_text())
            rank = int(config["r"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterInvalid(f"adapter_config.json: {error!r}") from error
        return AdapterCard(
            adapter_id=adapter.id,
            rank=rank,
            variant="lora",
            target_modules=(),
            num_modules=0,
            num_parameters=0,
            num_bytes=0,
        )

    async def load(self, adapter: Adapter) -> None:
        self._adapters[adapter.id] = adapter

    async def unload(self, adapter_id: str) -> None:
        if self._num_naming(adapter_id):
            raise AdapterInUse(f"adapter {adapter_id} serves requests")
        self._adapters.pop(adapter_id, None)
        self._pinned.discard(adapter_id)

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        if pinned:
            await self.load(adapter)
        (self._pinned.add if pinned else self._pinned.discard)(adapter.id)

    async def residency(self) -> list[AdapterResidency]:
        uses = uses_of(self._in_flight.values())
        return [
            AdapterResidency(
                adapter_id=adapter.id,
                name=adapter.name,
                tier="device",
                pinned=adapter.id in self._pinned,
                num_bytes=0,
                num_requests=self._num_naming(adapter.id),
                num_running=self._num_naming(adapter.id),
                uses=uses.get(adapter.id, ()),
            )
            for adapter in self._adapters.values()
        ]

    def _num_naming(self, adapter_id: str) -> int:
        requests = self._in_flight.values()
        return sum(any(part.adapter.id == adapter_id for part in request.parts) for request in requests)

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self._steps,
            num_running=len(self._in_flight),
            num_waiting=0,
            num_kv_blocks_used=sum(len(request.prompt_token_ids) for request in self._in_flight.values()),
            num_kv_blocks=0,
            num_adapters_on_device=len(self._adapters),
            total_prompt_tokens=self._prompt_tokens,
            total_cached_prompt_tokens=0,
            total_generated_tokens=self._generated,
            total_finished=self._finished,
            total_aborted=self._aborted,
            total_failed=self._failed,
            total_preemptions=0,
            num_restarts=self._deaths,
        )

    async def reload(self) -> EngineInfo:
        return self.info()

    def health(self) -> Health:
        return Health(state=self._state)

    async def close(self, drain_seconds: float = 0.0) -> None:
        self._state = "draining"
        deadline = asyncio.get_running_loop().time() + drain_seconds
        while self._in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self._deaths += 1


def _described(settings: Settings) -> EngineInfo:
    return EngineInfo(
        engine="echo",
        base_model=settings.model.name,
        architecture="echo",
        dtype="uint8",
        device="cpu",
        vocab_size=EOS + 1,
        max_model_len=settings.model.max_model_len or 4096,
        num_parameters=0,
        kv_block_size=1,
        num_kv_blocks=0,
        embedding_width=EMBEDDING_WIDTH,
    )


class _ByteTokens:
    """The echo's vocabulary, as llguidance asks for it."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(EOS)), b"<eos>")
    special_token_ids = (EOS,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _pooled(request: EmbedRequest) -> tuple[float, ...]:
    """The hidden states, pooled and normalised as asked for."""
    name = sum(sum(part.adapter.name.encode()) * part.weight for part in request.parts)
    hidden = [[float(token >> bit & 1) for bit in range(EMBEDDING_WIDTH - 1)] + [name]
              for token in request.prompt_token_ids]  # fmt: skip
    chosen = {"mean": hidden, "last": hidden[-1:], "cls": hidden[:1]}[request.pooling]
    mean = [sum(column) / len(chosen) for column in zip(*chosen, strict=True)]
    length = math.hypot(*mean) if request.normalize else 1.0
    return tuple(value / (length or 1.0) for value in mean)
