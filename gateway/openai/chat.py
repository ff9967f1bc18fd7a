"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from loraplex.engines.protocol import Engine, FinishReason, TokenEvent, Tokenizer
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.openai.answers import Answers, told_tokens
from loraplex.gateway.openai.chat_wire import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    TokenLogprob,
    TopLogprob,
)
from loraplex.gateway.openai.routing import route_of
from loraplex.gateway.openai.wire import LEAST_LOGPROB, Usage
from loraplex.gateway.prompts import chat_requests

_body = Body(ChatRequest)


def chat_routes(engine: Engine, catalogue: Catalogue, answers: Answers) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/v1/chat/completions", status_code=200, guards=[require_inference])
    async def create_chat_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        body.check()
        caller = caller_of(request)
        route = await route_of(body, caller, catalogue)
        completion_id = f"chatcmpl-{secrets.token_hex(12)}"
        choices = await chat_requests(body, completion_id, route, caller, engine)
        return await answers.respond(request, body, choices, _ChatWire(completion_id, body, engine.tokenizer))

    return [create_chat_completion]


class _ChatWire:
    """Implements `Wire`; what does not change from chunk to chunk is encoded once."""

    def __init__(self, completion_id: str, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self._id = completion_id
        self._model = body.model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = b"]" + (b',"usage":null' if body.includes_usage else b"") + b"}\n\n"

    def begin(self, number: int) -> bytes:
        return self._frame(number, b'{"role":"assistant","content":""}')

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        logprobs = self._logprobs([event])
        if not event.text and logprobs is None:
            return b""
        described = b"null" if logprobs is None else msgspec.json.encode(logprobs)
        return self._frame(number, b'{"content":' + msgspec.json.encode(event.text) + b"}", described)

    def finish(self, number: int, reason: FinishReason) -> bytes:
        return self._frame(number, b"{}", finish=b'"' + reason.encode() + b'"')

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(number, events) for number, events in enumerate(choices)]
        return msgspec.json.encode(
            ChatCompletion(id=self._id, created=self._created, model=self._model, choices=answers, usage=usage)
        )

    def _frame(self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)
        return self._head + choice + self._tail

    def _choice(self, number: int, events: Sequence[TokenEvent]) -> Choice:
        finish_reason = events[-1].finish_reason
        assert finish_reason is not None, "an engine ends every answer with a reason"
        message = AnswerMessage(content="".join(event.text for event in events))
        return Choice(message, finish_reason, number, self._logprobs(events))

    def _logprobs(self, events: Sequence[TokenEvent]) -> ChoiceLogprobs | None:
        """None where the request did not ask."""
        told = told_tokens(events)
        found = [pair for event in told for pair in zip(event.token_ids, event.logprobs, strict=False)]
        if not found:
            return None
        content = []
        for token_id, logprobs in found:
            own = self._describe(token_id, logprobs.logprob)
            top = [self._describe(*other) for other in logprobs.top]
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
        return ChoiceLogprobs(content)

    def _describe(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self._tokenizer.token_bytes(token_id)
        return TopLogprob(raw.decode(errors="replace"), max(logprob, LEAST_LOGPROB), list(raw))
