"""POST /v1/chat/completions, streamed and not."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from loraplex.config.settings import Server
from loraplex.engines.protocol import Engine, GenerateRequest, TokenEvent, Tokenizer
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.metrics import Metrics
from loraplex.gateway.openai.chat_wire import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    ChunkFrames,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from loraplex.gateway.prompts import to_generate_requests
from loraplex.gateway.sse import DONE, Relay, StreamResponse, together, unless_client_leaves

# JSON has no -inf; OpenAI's own answers say this instead.
_LEAST_LOGPROB = -9999.0

_body = Body(ChatRequest)


def chat_routes(engine: Engine, catalogue: Catalogue, metrics: Metrics, server: Server) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/v1/chat/completions", status_code=200, guards=[require_inference])
    async def create_chat_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        body.check()
        caller = caller_of(request)
        route = await catalogue.route(body.model, caller)
        completion_id = f"chatcmpl-{secrets.token_hex(12)}"
        requests = to_generate_requests(body, completion_id, route, caller, engine)
        answer = _Answer(completion_id, body.model, requests, engine, metrics)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            relay = answer.stream(include_usage)
            try:
                await relay.begin(server.keep_alive_seconds)
            except BaseException:
                await relay.close()
                raise
            return StreamResponse(  # type: ignore[return-value]  # an ASGI app of Starlette's types
                relay, keep_alive_seconds=server.keep_alive_seconds, send_timeout_seconds=server.send_timeout_seconds
            )
        completion = await unless_client_leaves(request.receive, answer.complete())
        return Response(msgspec.json.encode(completion), media_type="application/json")  # type: ignore[return-value]

    return [create_chat_completion]


class _Answer:
    """One completion in the making: a request for each choice, and what they have used so far."""

    def __init__(
        self, completion_id: str, model: str, choices: list[GenerateRequest], engine: Engine, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._choices = choices
        self._num_tokens = 0
        self._num_cached = 0

    async def complete(self) -> ChatCompletion:
        """The whole answer at once."""
        choices = await together([self._choice(number) for number in range(len(self._choices))])
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=self._usage()
        )

    def stream(self, include_usage: bool) -> Relay:
        """The answer as frames: for each choice role, texts, finish; then usage if asked for, and [DONE]."""
        frames = ChunkFrames(self._id, self._created, self._model, include_usage=include_usage)
        begun: set[int] = set()

        def encode(number: int, event: TokenEvent) -> bytes:
            self._count(event)
            encoded = b"" if number in begun else frames.role(number)
            begun.add(number)
            logprobs = _logprobs([event], self._engine.tokenizer)
            if event.text or logprobs:
                encoded += frames.text(number, event.text, logprobs)
            if event.finish_reason is not None:
                encoded += frames.finish(number, event.finish_reason)
            return encoded

        def end() -> bytes:
            return (frames.usage(self._usage()) if include_usage else b"") + DONE

        return Relay([self._events(number) for number in range(len(self._choices))], encode, end)

    def _events(self, number: int) -> AsyncIterator[TokenEvent]:
        return self._metrics.watch(self._model, self._engine.generate(self._choices[number]))

    async def _choice(self, number: int) -> Choice:
        events = [event async for event in self._events(number)]
        for event in events:
            self._count(event)
        finish_reason = events[-1].finish_reason
        assert finish_reason is not None, "an engine ends every answer with a reason"
        message = AnswerMessage(content="".join(event.text for event in events))
        logprobs = _logprobs(events, self._engine.tokenizer)
        return Choice(message=message, finish_reason=finish_reason, index=number, logprobs=logprobs)

    def _count(self, event: TokenEvent) -> None:
        self._num_tokens += len(event.token_ids)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)

    def _usage(self) -> Usage:
        prompt = len(self._choices[0].prompt_token_ids)
        details = PromptTokensDetails(cached_tokens=self._num_cached)
        return Usage(prompt, self._num_tokens, prompt + self._num_tokens, details)


def _logprobs(events: list[TokenEvent], tokenizer: Tokenizer) -> ChoiceLogprobs | None:
    """None where the request did not ask. A token that only ended the answer is not part of it."""
    content_events = [event for event in events if event.text or event.finish_reason != "stop"]
    found = [pair for event in content_events for pair in zip(event.token_ids, event.logprobs, strict=False)]
    if not found:
        return None

    def describe(token_id: int, logprob: float) -> TopLogprob:
        raw = tokenizer.token_bytes(token_id)
        return TopLogprob(raw.decode(errors="replace"), max(logprob, _LEAST_LOGPROB), list(raw))

    content = []
    for token_id, logprobs in found:
        own = describe(token_id, logprobs.logprob)
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, [describe(*other) for other in logprobs.top]))
    return ChoiceLogprobs(content)
