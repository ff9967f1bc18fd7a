"""The JSON of chat completions, in and out."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import FinishReason
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class TextPart(Struct, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"


class Message(Struct, forbid_unknown_fields=True):
    """One message of the conversation. A developer's instructions reach the model as a system message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that are honoured, then fields that are known and not offered: those may only have a value without effect.

    A field that is neither is refused by the decoder.
    """

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=4)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # said about a request, without effect on its answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    store: Literal[False] | None = None
    # common extensions
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Unit | None = None
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    # known, not offered
    response_format: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    tool_choice: Raw | UnsetType = UNSET
    parallel_tool_calls: Raw | UnsetType = UNSET
    functions: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET
    audio: Raw | UnsetType = UNSET
    modalities: Raw | UnsetType = UNSET
    moderation: Raw | UnsetType = UNSET
    prediction: Raw | UnsetType = UNSET
    prompt_cache_key: Raw | UnsetType = UNSET
    prompt_cache_options: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET
    reasoning_effort: Raw | UnsetType = UNSET
    service_tier: Raw | UnsetType = UNSET
    verbosity: Raw | UnsetType = UNSET
    web_search_options: Raw | UnsetType = UNSET

    def check(self) -> None:
        """Refuse what the types cannot. Raises UnsupportedParameter or MalformedRequest, naming the field."""
        for name, harmless in _NOT_OFFERED.items():
            raw = getattr(self, name)
            if raw is not UNSET and msgspec.json.decode(raw) not in (None, *harmless):
                raise UnsupportedParameter(f"{name} is not supported by this server.", name)
        if self.stream_options is not None and not self.stream:
            raise MalformedRequest("stream_options is only allowed when stream is true.", "stream_options")
        if self.top_logprobs and not self.logprobs:
            raise MalformedRequest("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise MalformedRequest("max_tokens and max_completion_tokens differ; set one.", "max_completion_tokens")


# The values of a field that ask for nothing we lack.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "verbosity": (),
    "web_search_options": (),
}


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    """`cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(Struct):
    message: AnswerMessage
    finish_reason: FinishReason
    index: int
    logprobs: ChoiceLogprobs | None


class ChatCompletion(Struct):
    """The answer to a request that does not stream. `created` in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: Literal["default"] = "default"
    system_fingerprint: None = None


class ChunkFrames:
    """The SSE frames of one streamed answer; what does not change from chunk to chunk is encoded once."""

    def __init__(self, completion_id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = b"]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def role(self, index: int) -> bytes:
        """The first frame of a choice."""
        return self._frame(index, b'{"role":"assistant","content":""}')

    def text(self, index: int, text: str, logprobs: ChoiceLogprobs | None) -> bytes:
        described = b"null" if logprobs is None else msgspec.json.encode(logprobs)
        return self._frame(index, b'{"content":' + msgspec.json.encode(text) + b"}", described)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        """The last frame of a choice."""
        return self._frame(index, b"{}", finish=b'"' + reason.encode() + b'"')

    def usage(self, usage: Usage) -> bytes:
        """The extra frame for `stream_options.include_usage`."""
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"

    def _frame(self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)
        return self._head + choice + self._tail
