"""The JSON that asks for a response, and the chat request it comes to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.errors import InvalidRequest
from loraplex.gateway.errors import GatewayError, UnsupportedParameter
from loraplex.gateway.openai.chat_wire import ChatRequest, Metadata, ServiceTier
from loraplex.gateway.openai.forms import JsonObject, JsonSchema, NamedSchema, Schema, Text
from loraplex.gateway.openai.responses_items import InputItem, messages_of
from loraplex.gateway.openai.tool_wire import (
    Allowed,
    AllowedTools,
    FunctionSpec,
    FunctionTool,
    Named,
    NamedTool,
    ToolChoice,
    ToolName,
)
from loraplex.gateway.openai.wire import Count, Natural, Stops, StreamOptions, refuse_what_matters


class ResponseTool(Struct, forbid_unknown_fields=True, tag="function"):
    """`strict` holds calls to the schema unless it is switched off."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = True

    def for_chat(self) -> FunctionTool:
        return FunctionTool(FunctionSpec(self.name, self.description, self.parameters, self.strict))


class ChosenTool(Struct, forbid_unknown_fields=True, tag="function"):
    name: str


class ChosenTools(Struct, forbid_unknown_fields=True, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], msgspec.Meta(min_length=1)]


class SchemaFormat(Struct, forbid_unknown_fields=True, tag="json_schema"):
    name: str
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct, forbid_unknown_fields=True):
    format: Text | JsonObject | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # known, not offered
    summary: Raw | UnsetType = UNSET
    generate_summary: Raw | UnsetType = UNSET
    context: Raw | UnsetType = UNSET
    mode: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "summary": ("auto",),  # as much as there is, which is none: the reasoning itself is told
        "generate_summary": ("auto",),
        "context": ("auto",),
        "mode": ("standard",),
    }


ResponseToolChoice: TypeAlias = Literal["none", "auto", "required"] | ChosenTool | ChosenTools
LOGPROBS = "message.output_text.logprobs"
# What is called the same, and means the same, in a chat.
_SAME = (
    "model", "temperature", "top_p", "metadata", "parallel_tool_calls", "service_tier", "stream", "user",
    "safety_identifier", "prompt_cache_key", "top_k", "min_p", "repetition_penalty", "seed", "stop", "logit_bias",
    "frequency_penalty", "presence_penalty", "chat_template_kwargs", "cache_salt", "timeout_seconds", "ignore_eos",
    "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "min_tokens",
)  # fmt: skip
# What an error of the chat request calls a field, and what it is called here.
_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class ResponseRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that are honoured, those said without effect on the answer, and those known and not offered."""

    model: str = ""
    input: str | Annotated[list[InputItem], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # nothing is encrypted: reasoning is told in the open, and read so where it comes back
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    metadata: Metadata | None = None
    tools: Annotated[list[ResponseTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: ServiceTier | None = None
    # said about a request, without effect on its answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # common extensions
    adapter_source: str | None = None
    api_token: str | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: Natural | None = None
    # known, not offered
    access_programs: Raw | UnsetType = UNSET
    background: Raw | UnsetType = UNSET
    background_options: Raw | UnsetType = UNSET
    context_management: Raw | UnsetType = UNSET
    conversation: Raw | UnsetType = UNSET
    image: Raw | UnsetType = UNSET
    include_reasoning: Raw | UnsetType = UNSET
    max_tool_calls: Raw | UnsetType = UNSET
    moderation: Raw | UnsetType = UNSET
    priority: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    prompt_cache_options: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": (),
        "conversation": (),
        "image": (),
        "include_reasoning": (True,),
        "max_tool_calls": (),
        "moderation": (),
        "priority": (0,),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
    }

    def check(self) -> None:
        """Refuse what the types cannot. Raises UnsupportedParameter or MalformedRequest, naming the field."""
        refuse_what_matters(self, self.not_offered)
        if self.reasoning is not None:
            refuse_what_matters(self.reasoning, self.reasoning.not_offered, "reasoning.")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            message = "A response tells its usage at its end."
            raise UnsupportedParameter(message, "stream_options.continuous_usage_stats")
        for number, item in enumerate(self.items):
            item.check(f"input[{number}]")
        if self.top_logprobs and LOGPROBS not in (self.include or []):
            raise UnsupportedParameter(f"It is told only where include asks for {LOGPROBS}.", "top_logprobs")

    @property
    def items(self) -> list[InputItem]:
        if isinstance(self.input, str):
            return [InputItem(role="user", content=self.input)]
        return self.input

    def chat(self, earlier: list[InputItem]) -> ChatRequest:
        """The same as a chat, behind the items of the conversation it goes on with.

        Raises MalformedRequest or UnsupportedParameter, naming the chat's fields.
        """
        tells_logprobs = LOGPROBS in (self.include or [])
        request = ChatRequest(
            **{name: getattr(self, name) for name in _SAME},
            messages=messages_of(self.instructions, [*earlier, *self.items]),
            max_completion_tokens=self.max_output_tokens,
            logprobs=tells_logprobs,
            top_logprobs=self.top_logprobs if tells_logprobs else None,
            response_format=self._form(),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            tools=[tool.for_chat() for tool in self.tools] if self.tools else None,
            tool_choice=self._choice(),
            stream_options=StreamOptions(include_usage=True) if self.stream else None,
        )
        request.check()
        return request

    def _form(self) -> JsonObject | JsonSchema | None:
        match self.text.format if self.text else None:
            case SchemaFormat(name, schema, description, strict):
                return JsonSchema(NamedSchema(name, schema, description, strict))
            case JsonObject() as form:
                return form
            case _:
                return None

    def _choice(self) -> ToolChoice | None:
        match self.tool_choice:
            case ChosenTool(name):
                return NamedTool(Named(name))
            case ChosenTools(mode, tools):
                return AllowedTools(Allowed(mode, [NamedTool(Named(tool.name)) for tool in tools]))
            case said:
                return said


@contextmanager
def named_as_asked() -> Iterator[None]:
    """Let errors of the chat request name the fields of the one that was sent."""
    try:
        yield
    except (GatewayError, InvalidRequest) as error:
        said = error.param or ""
        field = next((name for name in _FIELDS if said == name or said.startswith((f"{name}[", f"{name}."))), None)
        if field is not None:
            is_place = field == "messages"  # its places are other ones here
            error.param = _FIELDS[field] + ("" if is_place else said.removeprefix(field))
        elif said.startswith("tools["):
            error.param = said.replace(".function.", ".", 1)  # a tool here is what a chat's tool says of its function
        raise
