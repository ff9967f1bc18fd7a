"""One generation request of a client -> its answer, streamed or whole; how it looks on the wire is the route's part."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from litestar import Request
from litestar.types import ASGIApp
from msgspec.structs import replace

from loraplex.auth.metering import Demand
from loraplex.config.settings import Server
from loraplex.engines.errors import EngineOverloaded, InvalidRequest
from loraplex.engines.events import each
from loraplex.engines.protocol import (
    EmbedRequest,
    Engine,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    StopReason,
    TokenEvent,
)
from loraplex.gateway.accounts import Accounts, Meter, fitted
from loraplex.gateway.clients import unless_client_leaves
from loraplex.gateway.guards import caller_of
from loraplex.gateway.holding import DiskTier, holding
from loraplex.gateway.idempotency import tell_meter
from loraplex.gateway.metrics import Metrics, Watch
from loraplex.gateway.middleware import request_id_of, tell_limits
from loraplex.gateway.openai.wire import PromptTokensDetails, Usage
from loraplex.gateway.prompt_log import PromptLog
from loraplex.gateway.prompts import apart
from loraplex.gateway.replies import EncodedJson
from loraplex.gateway.sse import OPENAI, Framing, Generation, Relay, StreamResponse, event_source, together
from loraplex.gateway.turns import Turns

LONG_ANSWER = 1024  # tokens and log-probabilities; fewer are JSON in a few milliseconds, more in a thread


class Asked(Protocol):
    """What any route's body says of its answer as a whole."""

    @property
    def model(self) -> str: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def num_choices(self) -> int:
        """How many answers are generated for each prompt."""
        ...

    @property
    def includes_usage(self) -> bool:
        """Whether a stream tells the usage in a frame of its own."""
        ...

    def complaint(self, reason: str) -> tuple[str, str] | None:
        """The field that said a grammar which the engine cannot follow, and what is wrong with it; None where none did.

        `reason` is the engine's.
        """
        ...


class Wire(Protocol):
    """The JSON of one answer: frames while it streams, or the whole of it."""

    def begin(self, number: int) -> bytes:
        """The frames that open a choice."""
        ...

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        """The frame of an event's text; nothing where it adds nothing."""
        ...

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason) -> bytes: ...

    def usage(self, usage: Usage) -> bytes:
        """The extra frame for `stream_options.include_usage`."""
        ...

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        """The answer at once, as JSON. For any thread."""
        ...


class Stopping(Protocol):
    """Hears one answer's text, and tells where it is over before the engine ends it."""

    @property
    def met(self) -> str | None:
        """The stop string that ended it."""
        ...

    def feed(self, text: str, num_tokens: int) -> object: ...
    def finish(self) -> object: ...


class Answers:
    """Answers generation requests of any route over one engine."""

    def __init__(
        self,
        engine: Engine,
        store: DiskTier,
        metrics: Metrics,
        accounts: Accounts,
        server: Server,
        prompt_log: PromptLog,
        at_once: int,
    ) -> None:
        """Of one request's choices the engine has `at_once` at a time."""
        self._engine = engine
        self._store = store
        self._accounts = accounts
        self._metrics = metrics
        self._server = server
        self._prompt_log = prompt_log
        self._at_once = at_once
        self._event_source = event_source(
            keep_alive_seconds=server.keep_alive_seconds, send_timeout_seconds=server.send_timeout_seconds
        )

    async def respond(
        self,
        request: Request[Any, Any, Any],
        body: Asked,
        choices: list[GenerateRequest],
        wire: Wire,
        framing: Framing = OPENAI,
        on_event: Callable[[int, TokenEvent], None] | None = None,
        before_end: Callable[[], Awaitable[None]] | None = None,
        stopping: Callable[[], Stopping | None] = lambda: None,
        label: str | None = None,
    ) -> ASGIApp:
        """The response; `on_event` sees every event of each choice as it comes.

        `before_end` is done when the answer is complete, before the client learns that it is. `stopping` gives, for
        each choice, what hears its text and may end it. `label` is what metrics and books call the model, where it is
        not the body's name for it.

        Raises what the engine raises before its first token, and ClientLeft.
        """
        caller = caller_of(request)
        choices = fitted(caller, choices, is_open_ended=_is_open_ended(body))
        label = label or body.model
        demand = _demand(request, body, choices, label)
        meter = await self._accounts.open(caller, demand, partial(tell_limits, request))
        tell_meter(request, meter)
        try:
            witnesses = () if on_event is None else (on_event,)
            if caller.policy.logs_prompts:
                tokenizer = await self._engine.tokenizer_of(choices[0].adapter)
                record = self._prompt_log.record(caller, demand, choices, body.num_choices, tokenizer)
                meter.at_end(record.end)
                witnesses = (*witnesses, record.saw)
            answer = _Answer(wire, meter, witnesses, before_end)
            turns = Turns(self._at_once)
            generations = [partial(self._generate, label, choice, meter, turns, stopping()) for choice in choices]
            if body.stream:
                return await self._stream(request, answer, generations, body, framing)
            collected = await unless_client_leaves(request.scope, request.receive, answer.collect(request, generations))
        except BaseException as error:
            if isinstance(error, EngineOverloaded):
                meter.forget_answer()
            meter.settle(error)
            _name_as_asked(error, body)
            raise
        meter.settle()
        return EncodedJson(collected)

    async def _generate(
        self,
        model: str,
        choice: GenerateRequest,
        meter: Meter,
        turns: Turns,
        stopping: Stopping | None,
        number: int,
        take: Callable[[int, TokenEvent], None],
    ) -> None:
        """One choice's events, when it is its turn, each given to `take` with its number once it is counted.

        Where the budget is spent the last event is an empty one of the reason `length`, and the meter says why.
        """
        with meter.working(), holding(self._store, choice.parts):
            async with turns.turn(choice) as choice:
                with self._metrics.watching(model, choice) as watch:
                    counting = _Counting(watch, meter, number, take)
                    heard = self._events(choice)
                    if stopping is not None:
                        heard = _until_stopped(heard, stopping)
                    async with aclosing(heard) as events:  # type: ignore[type-var]
                        while (event := await each(events, counting.take)) is not None:
                            if not await meter.reserves(event):
                                take(number, _cut(event))
                                return
                            take(number, event)

    def _events(self, choice: GenerateRequest) -> AsyncIterator[TokenEvent]:
        return self._engine.generate(choice) if choice.sampling.max_tokens else _of_prompt_alone(self._engine, choice)

    async def _stream(
        self,
        request: Request[Any, Any, Any],
        answer: "_Answer",
        generations: Sequence[Generation],
        body: Asked,
        framing: Framing,
    ) -> ASGIApp:
        relay = answer.relay(generations, request_id_of(request), framing, include_usage=body.includes_usage)
        try:
            await unless_client_leaves(request.scope, request.receive, relay.begin(self._server.keep_alive_seconds))
        except BaseException:
            await relay.close()
            raise
        return StreamResponse(relay, self._event_source)


async def _of_prompt_alone(engine: Engine, choice: GenerateRequest) -> AsyncIterator[TokenEvent]:
    """An engine computes a prompt for its first token, which is nobody's here: neither told nor counted."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=choice.sampling.num_prompt_logprobs)
    async with aclosing(engine.generate(replace(choice, sampling=sampling))) as events:  # type: ignore[type-var]
        async for event in events:
            yield replace(event, token_ids=(), text="", finish_reason="length")


async def _until_stopped(events: AsyncIterator[TokenEvent], stopping: Stopping) -> AsyncIterator[TokenEvent]:
    """The events up to the one whose text completes a stop string; what the engine would make beyond it is aborted."""
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            stopping.feed(event.text, len(event.token_ids))
            if event.finish_reason is not None:
                stopping.finish()
            if stopping.met is None:
                yield event
                continue
            yield replace(event, finish_reason="stop", stop_reason=stopping.met)
            return


def _cut(event: TokenEvent) -> TokenEvent:
    """What is told instead of an event that the budget does not cover."""
    return TokenEvent(request_id=event.request_id, token_ids=(), text="", step=event.step, finish_reason="length")


def _name_as_asked(error: BaseException, body: Asked) -> None:
    """Let an engine's complaint of a grammar name the field that said it."""
    if isinstance(error, InvalidRequest) and error.param == "grammar" and (said := body.complaint(str(error))):
        error.param, message = said
        error.args = (message,)


def _demand(request: Request[Any, Any, Any], body: Asked, choices: Sequence[GenerateRequest], label: str) -> Demand:
    """All choices together; the choices of one prompt stand together, and count it once."""
    return Demand(
        request_id=choices[0].request_id.removesuffix("-0-0"),
        trace_id=request_id_of(request),
        route=request.scope["path"],
        model=label,
        adapter_id=computed_with(choices[0]),
        num_prompt_tokens=sum(len(choice.prompt_token_ids) for choice in choices[:: body.num_choices]),
        max_completion_tokens=sum(choice.sampling.max_tokens for choice in choices),
        is_open_ended=_is_open_ended(body),
    )


def computed_with(request: GenerateRequest | EmbedRequest) -> str:
    """The content hash of what it is computed with: of a composition, the hash of its parts and weights."""
    if request.adapter is not None or not request.composition:
        return request.adapter.id if request.adapter else ""
    parts = sorted(f"{part.adapter.id} {part.weight!r}" for part in request.composition)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_open_ended(body: Asked) -> bool:
    """Whether the client named no limit."""
    return body.max_tokens is None and getattr(body, "max_completion_tokens", None) is None


class _Counting:
    """Counts each event of a choice before it is passed on; one that the meter does not take is not."""

    __slots__ = ("_meter", "_number", "_take", "_watch")

    def __init__(self, watch: Watch, meter: Meter, number: int, take: Callable[[int, TokenEvent], None]) -> None:
        self._watch = watch
        self._meter = meter
        self._number = number
        self._take = take

    def take(self, event: TokenEvent) -> bool:
        self._watch.saw(event)
        if not self._meter.takes(event):
            return False
        self._take(self._number, event)
        return True


class _Answer:
    """One answer in the making."""

    __slots__ = ("_before_end", "_begun", "_meter", "_wire", "_witnesses")

    def __init__(
        self,
        wire: Wire,
        meter: Meter,
        witnesses: Sequence[Callable[[int, TokenEvent], None]],
        before_end: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """`witnesses` see each event of a choice before the client does."""
        self._wire = wire
        self._meter = meter
        self._witnesses = witnesses
        self._before_end = before_end
        self._begun: set[int] = set()

    async def collect(self, request: Request[Any, Any, Any], generations: Sequence[Generation]) -> bytes:
        """The whole answer at once; a long one is encoded in a thread."""
        choices: list[list[TokenEvent]] = [[] for _ in generations]

        def take(number: int, event: TokenEvent) -> None:
            for saw in self._witnesses:
                saw(number, event)
            choices[number].append(event)

        await together([generate(number, take) for number, generate in enumerate(generations)])
        encode, is_long = partial(self._wire.whole, choices, self._usage()), _is_long(choices)
        whole = await apart(request, encode, is_long=is_long, is_counted=False)  # it is already
        if self._before_end is not None:
            await self._before_end()
        return whole

    def relay(
        self, generations: Sequence[Generation], request_id: str, framing: Framing, *, include_usage: bool
    ) -> Relay:
        """The answer as frames, and at its end what the API ends it with, or why it was cut short."""

        def end() -> bytes:
            usage = self._wire.usage(self._usage()) if include_usage else b""
            refusal = self._meter.refusal
            return usage + (framing.done if refusal is None else framing.error(refusal))

        return Relay(generations, self._encode, end, request_id, self._meter.settle, framing, self._before_end)

    def _encode(self, number: int, event: TokenEvent) -> bytes:
        for saw in self._witnesses:
            saw(number, event)
        if number in self._begun:
            encoded = self._wire.chunk(number, event)
        else:
            self._begun.add(number)
            encoded = self._wire.begin(number) + self._wire.chunk(number, event)
        if event.finish_reason is not None:
            encoded += self._wire.finish(number, event.finish_reason, event.stop_reason)
        return encoded

    def _usage(self) -> Usage:
        meter = self._meter
        details = PromptTokensDetails(cached_tokens=meter.num_cached_tokens)
        total = meter.num_prompt_tokens + meter.num_completion_tokens
        return Usage(meter.num_prompt_tokens, meter.num_completion_tokens, total, details)


def _is_long(choices: Sequence[Sequence[TokenEvent]]) -> bool:
    return sum(_num_told(event) for events in choices for event in events) > LONG_ANSWER


def _num_told(event: TokenEvent) -> int:
    """Tokens, and log-probabilities beside them."""
    described = (*event.logprobs, *event.prompt_logprobs)
    return len(event.token_ids) + sum(1 + len(one.top) for one in described if one is not None)


def told_tokens(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """The events whose tokens are part of the text: one that only ended the answer is not."""
    return [event for event in events if not event.is_end and (event.text or event.finish_reason != "stop")]
