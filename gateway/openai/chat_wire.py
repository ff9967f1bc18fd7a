"""The JSON of chat completions, in and out."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import FinishReason, StopReason
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.chat_messages import Message, check_messages
from loraplex.gateway.openai.prompt_logprobs import PromptLogprobs
from loraplex.gateway.openai.token_logprobs import TokenLogprob
from loraplex.gateway.openai.tool_wire import MadeCall, ToolFields
from loraplex.gateway.openai.wire import Count, Usage

Metadata: TypeAlias = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]
ServiceTier: TypeAlias = Literal["auto", "default", "flex", "priority"]


class ChatRequest(ToolFields, forbid_unknown_fields=True, kw_only=True):
    """What is said of every generation, and what is special to a chat."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    service_tier: ServiceTier | None = None
    # common extensions
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # said about a request, without effect on its answer
    metadata: Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # known, not offered
    functions: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET
    audio: Raw | UnsetType = UNSET
    modalities: Raw | UnsetType = UNSET
    moderation: Raw | UnsetType = UNSET
    prediction: Raw | UnsetType = UNSET
    prompt_cache_options: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET
    chat_template: Raw | UnsetType = UNSET
    store: Raw | UnsetType = UNSET
    verbosity: Raw | UnsetType = UNSET
    web_search_options: Raw | UnsetType = UNSET
    # vLLM's
    add_special_tokens: Raw | UnsetType = UNSET
    best_of: Raw | UnsetType = UNSET
    documents: Raw | UnsetType = UNSET
    echo: Raw | UnsetType = UNSET
    include_reasoning: Raw | UnsetType = UNSET
    media_io_kwargs: Raw | UnsetType = UNSET
    mm_processor_kwargs: Raw | UnsetType = UNSET

    # the values of those that ask for nothing we lack
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        **ToolFields.not_offered,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "chat_template": (),  # a client's template could run for ever in the gateway's process
        "store": (False,),  # chats are not kept; responses are
        "verbosity": ("medium",),
        "web_search_options": (),
        "add_special_tokens": (False,),  # the template writes them
        "best_of": (1,),
        "documents": ([],),
        "echo": (False,),
        "include_reasoning": (True,),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        self.check_tools()
        if self.continue_final_message and self.add_generation_prompt:
            raise MalformedRequest("It cannot be together with add_generation_prompt.", "continue_final_message")
        if self.top_logprobs and not self.logprobs:
            raise MalformedRequest("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise MalformedRequest("max_tokens and max_completion_tokens differ; set one.", "max_completion_tokens")

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ChoiceLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Struct):
    """`content` is null where the answer is calls alone. Older and newer clients know reasoning by two names."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET


class Choice(Struct):
    message: AnswerMessage
    finish_reason: FinishReason | Literal["tool_calls"]
    index: int
    logprobs: ChoiceLogprobs | None
    stop_reason: StopReason | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    """The answer to a request that does not stream. `created` in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: Literal["default", "flex", "priority"] = "default"
    system_fingerprint: None = None
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
