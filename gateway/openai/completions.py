"""POST /v1/completions: text continues, without a chat template."""

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import Engine, FinishReason, TokenEvent, Tokenizer
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import caller_of, require_inference
from loraplex.gateway.openai.answers import Answers, told_tokens
from loraplex.gateway.openai.wire import LEAST_LOGPROB, GenerationFields, Usage
from loraplex.gateway.prompts import completion_requests


class CompletionRequest(GenerationFields, forbid_unknown_fields=True, kw_only=True):
    """`prompt` is a text, a list of texts, the token ids of one prompt, or a list of those."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # known, not offered
    best_of: Raw | UnsetType = UNSET
    echo: Raw | UnsetType = UNSET
    suffix: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    def num_logprobs(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(Struct):
    """One entry a token; `text_offset` counts characters from the answer's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Struct, omit_defaults=True):
    """An answer, or a chunk of one. `created` in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET


_body = Body(CompletionRequest)


def completion_routes(engine: Engine, catalogue: Catalogue, answers: Answers) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/v1/completions", status_code=200, guards=[require_inference])
    async def create_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _body.of(request)
        body.check()
        caller = caller_of(request)
        route = await catalogue.route(body.model, caller)
        completion_id = f"cmpl-{secrets.token_hex(12)}"
        choices = await completion_requests(body, body.prompt, completion_id, route, caller, engine)
        return await answers.respond(request, body, choices, _CompletionWire(completion_id, body, engine.tokenizer))

    return [create_completion]


class _CompletionWire:
    """Implements `Wire`."""

    def __init__(self, completion_id: str, body: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._id = completion_id
        self._model = body.model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._null_usage: UnsetType | None = None if body.includes_usage else UNSET
        self._offsets: dict[int, int] = {}

    def begin(self, number: int) -> bytes:
        return b""

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        logprobs = self._logprobs(number, [event])
        if not event.text and logprobs is None:
            return b""
        return self._frame([CompletionChoice(event.text, number, logprobs, None)], self._null_usage)

    def finish(self, number: int, reason: FinishReason) -> bytes:
        return self._frame([CompletionChoice("", number, None, reason)], self._null_usage)

    def usage(self, usage: Usage) -> bytes:
        return self._frame([], usage)

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [
            CompletionChoice(
                "".join(event.text for event in events),
                number,
                self._logprobs(number, events),
                events[-1].finish_reason,
            )
            for number, events in enumerate(choices)
        ]
        return self._encode(answers, usage)

    def _frame(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return b"data: " + self._encode(choices, usage) + b"\n\n"

    def _encode(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return msgspec.json.encode(
            Completion(self._id, self._created, self._model, choices, object="text_completion", usage=usage)
        )

    def _logprobs(self, number: int, events: Sequence[TokenEvent]) -> CompletionLogprobs | None:
        """None where the request did not ask."""
        described = CompletionLogprobs([], [], [], [])
        for event in told_tokens(events):
            offset = self._offsets.get(number, 0)
            for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=False):
                described.tokens.append(self._text(token_id))
                described.token_logprobs.append(max(logprobs.logprob, LEAST_LOGPROB))
                described.top_logprobs.append(
                    {self._text(other): max(logprob, LEAST_LOGPROB) for other, logprob in logprobs.top}
                )
                described.text_offset.append(offset)
            self._offsets[number] = offset + len(event.text)
        return described if described.tokens else None

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
