"""POST /v1/completions: text continues, without a chat template."""

import math
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from litestar import Request
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import Engine, FinishReason, GenerateRequest, StopReason, TokenEvent, TokenLogprobs
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of, inference_post
from loraplex.gateway.middleware import name_request
from loraplex.gateway.openai.answers import Answers, told_tokens
from loraplex.gateway.openai.completion_logprobs import CompletionLogprobs, EchoedPrompt, TokensAsIds, Written
from loraplex.gateway.openai.prompt_logprobs import PromptLogprobs, described_prompt
from loraplex.gateway.openai.routing import composed_route_of
from loraplex.gateway.openai.wire import GenerationFields, Natural, Usage
from loraplex.gateway.prompts import checked, completion_requests, tokenizer_for
from loraplex.gateway.request_adapters import RequestAdapters


class CompletionRequest(GenerationFields, forbid_unknown_fields=True, kw_only=True):
    """`prompt` is a text, a list of texts, the token ids of one prompt, or a list of those."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Natural | None = None  # none at all: the prompt alone is told, or scored
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # vLLM's: log-probabilities name tokens `token_id:5`
    # known, not offered
    suffix: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {**GenerationFields.not_offered, "suffix": ("",)}

    def check(self) -> None:
        super().check()
        if self.num_choices < (self.n or 1):
            raise MalformedRequest("best_of must be at least n.", "best_of")
        if self.is_contest and self.stream:
            raise MalformedRequest("best_of is not possible with stream: the best is known at the end.", "best_of")
        if self.echo and self.logprobs is not None and self.prompt_logprobs not in (None, self.logprobs):
            raise MalformedRequest("The prompt is echoed with as many as logprobs asks for.", "prompt_logprobs")

    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.is_contest else self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs

    @property
    def num_choices(self) -> int:
        return self.best_of or self.n or 1

    @property
    def is_contest(self) -> bool:
        """Whether more answers are generated than told."""
        return self.num_choices > (self.n or 1)


class CompletionChoice(Struct):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, omit_defaults=True):
    """An answer, or a chunk of one. `created` in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET


_body = Body(CompletionRequest)


def completion_routes(engine: Engine, adapters: RequestAdapters, answers: Answers) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @inference_post("/v1/completions")
    async def create_completion(request: Request[Any, Any, Any]) -> ASGIApp:
        body, _ = await checked(_body, request)
        caller = caller_of(request)
        route = await composed_route_of(body, caller, adapters)
        completion_id = told_id = f"cmpl-{secrets.token_hex(12)}"
        if body.request_id is not None:
            name_request(request, body.request_id)
            told_id = f"cmpl-{body.request_id}"
        choices = await completion_requests(
            request,
            body,
            body.prompt,
            completion_id,
            route,
            engine,
            add_special_tokens=body.add_special_tokens is not False,
        )
        wire = _CompletionWire(told_id, body, choices, await tokenizer_for(route, engine))
        return await answers.respond(request, body, choices, wire, label=adapters.label(body.model, caller))

    return [create_completion]


class _CompletionWire:
    """Implements `Wire`."""

    def __init__(
        self, completion_id: str, body: CompletionRequest, choices: Sequence[GenerateRequest], tokenizer: Tokenizer
    ) -> None:
        self._id = completion_id
        self._body = body
        self._asked = choices
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._written: Written = TokensAsIds() if body.return_tokens_as_token_ids else tokenizer
        self._chunk_usage: Usage | UnsetType | None = None if body.includes_usage else UNSET
        self._running_usage = body.running_usage()
        self._echoes = _echoes(body, choices, tokenizer) if body.echo else []
        self._identified: set[int] = set()  # whose prompts' ids were told
        self._lengths: dict[int, int] = {}  # of the texts told so far
        self._offsets: dict[int, int] = {}  # where in them the next token begins

    def begin(self, number: int) -> bytes:
        return b""

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        text = self._echoed(number) + event.text
        logprobs = self._logprobs(number, [event])
        if self._running_usage is not None:
            self._chunk_usage = self._running_usage.saw(number, event, len(self._asked[number].prompt_token_ids))
        if not text and logprobs is None and not self._body.return_token_ids:
            return b""
        choice = CompletionChoice(text, number, logprobs, None)
        if self._body.return_token_ids:
            choice.token_ids = event.token_ids
            if number not in self._identified:
                self._identified.add(number)
                choice.prompt_token_ids = self._asked[number].prompt_token_ids
        return self._frame([choice], self._chunk_usage)

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason) -> bytes:
        choice = CompletionChoice("", number, None, reason, stop_reason if self._body.names_ends else UNSET)
        return self._frame([choice], self._chunk_usage)

    def usage(self, usage: Usage) -> bytes:
        return self._frame([], usage)

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(place, number, choices[number]) for place, number in enumerate(self._told(choices))]
        return self._encode(answers, usage)

    def _choice(self, place: int, number: int, events: Sequence[TokenEvent]) -> CompletionChoice:
        text = self._echoed(number) + "".join(event.text for event in events)
        choice = CompletionChoice(text, place, self._logprobs(number, events), events[-1].finish_reason)
        prompt = self._asked[number].prompt_token_ids
        if self._body.names_ends:
            choice.stop_reason = events[-1].stop_reason
        if self._body.return_token_ids:
            choice.token_ids = [token for event in events for token in event.token_ids]
            choice.prompt_token_ids = prompt
        if self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = described_prompt(prompt, events[0].prompt_logprobs, self._tokenizer)
        return choice

    def _told(self, choices: Sequence[Sequence[TokenEvent]]) -> list[int]:
        """Of each prompt's answers the `n` best, by the mean log-probability of their tokens."""
        size, num_told = self._body.num_choices, self._body.n or 1
        if not self._body.is_contest:
            return list(range(len(choices)))
        groups = [range(first, first + size) for first in range(0, len(choices), size)]
        return [number for group in groups
                for number in sorted(group, key=lambda number: -_mean_logprob(choices[number]))[:num_told]]  # fmt: skip

    def _echoed(self, number: int) -> str:
        """The prompt, before the first text of its answer."""
        if number in self._offsets or not self._body.echo:
            return ""
        return self._echoes[number // self._body.num_choices].text

    def _frame(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return b"data: " + self._encode(choices, usage) + b"\n\n"

    def _encode(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        model = self._body.model
        return msgspec.json.encode(
            Completion(self._id, self._created, model, choices, object="text_completion", usage=usage)
        )

    def _logprobs(self, number: int, events: Sequence[TokenEvent]) -> CompletionLogprobs | None:
        """None where the request did not ask. Counts the text that was told."""
        described = CompletionLogprobs([], [], [], [])
        if number not in self._offsets:
            self._lengths[number] = self._offsets[number] = 0
            self._describe_prompt(number, events[0].prompt_logprobs, described)
        for event in told_tokens(events):
            for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=False):
                described.add(token_id, logprobs, self._offsets[number], self._written)
            self._lengths[number] += len(event.text)
            self._offsets[number] = self._lengths[number] + event.num_held
        return described if described.tokens and self._body.logprobs is not None else None

    def _describe_prompt(
        self, number: int, logprobs: Sequence[TokenLogprobs | None], described: CompletionLogprobs
    ) -> None:
        if not self._body.echo:
            return
        echo = self._echoes[number // self._body.num_choices]
        self._lengths[number] = self._offsets[number] = len(echo.text)
        if self._body.logprobs is None:
            return
        told = logprobs or (None,) * len(echo.token_ids)  # of a prompt of one token an engine has nothing to tell
        for token_id, one, offset in zip(echo.token_ids, told, echo.offsets(), strict=True):
            described.add(token_id, one, offset, self._written)


def _echoes(body: CompletionRequest, choices: Sequence[GenerateRequest], tokenizer: Tokenizer) -> list[EchoedPrompt]:
    """One for each prompt."""
    sent = [body.prompt] if isinstance(body.prompt, str) else body.prompt  # ids of one prompt, perhaps
    return [
        EchoedPrompt(
            part if isinstance(part, str) and body.truncate_prompt_tokens is None else None,
            choice.prompt_token_ids,
            tokenizer,
            skip_special_tokens=body.skip_special_tokens is not False,
            add_special_tokens=body.add_special_tokens is not False,
        )
        for part, choice in zip(sent, choices[:: body.num_choices], strict=False)
    ]


def _mean_logprob(events: Sequence[TokenEvent]) -> float:
    found = [one.logprob for event in told_tokens(events) for one in event.logprobs]
    return sum(found) / len(found) if found else -math.inf
