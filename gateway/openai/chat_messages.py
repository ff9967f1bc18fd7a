"""The messages of a chat, as clients write them -> as chat templates read them."""

from typing import Any, ClassVar, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.tokenizer_protocol import ChatMessage, ToolCall
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.tool_wire import SaidCall
from loraplex.gateway.openai.wire import refuse_what_matters


class TextPart(Struct, forbid_unknown_fields=True, tag="text"):
    """`cache_control` is a hint that Anthropic's clients give; prompts that begin alike are found again without it."""

    text: str
    cache_control: Raw | UnsetType = UNSET


class RefusalPart(Struct, forbid_unknown_fields=True, tag="refusal"):
    refusal: str


class Message(Struct, forbid_unknown_fields=True):
    """One message of the conversation. A developer's instructions reach the model as a system message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | UnsetType | None = UNSET
    name: str | None = None
    tool_calls: list[SaidCall] | None = None  # an assistant's
    tool_call_id: str | None = None  # a tool's
    refusal: str | None = None  # an assistant's, told to the model as what it said
    reasoning_content: str | None = None  # an assistant's
    reasoning: str | None = None  # the same by its other name; answers have both
    # what answers have beside their text, and clients send back with them
    annotations: Raw | UnsetType = UNSET
    audio: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET
    parsed: Raw | UnsetType = UNSET  # the SDK's own reading of the content, without effect

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "audio": (), "function_call": ()}

    def text(self) -> str | None:
        """None where it has neither content nor a refusal."""
        if isinstance(self.content, str):
            return self.content
        if self.content is UNSET or self.content is None:
            return self.refusal
        return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in self.content)

    def for_template(self) -> ChatMessage:
        calls = [ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                 for call in self.tool_calls or []]  # fmt: skip
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=self.text(),
            name=self.name,
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id,
            reasoning_content=self.reasoning if self.reasoning_content is None else self.reasoning_content,
        )

    def check(self, place: str) -> None:
        """What the types cannot say. Raises MalformedRequest or UnsupportedParameter, naming the field at `place`."""
        refuse_what_matters(self, self.not_offered, f"{place}.")
        if self.text() is None and not self.tool_calls:
            reason = "Missing required parameter" if self.content is UNSET else "Only with tool_calls may be null"
            raise MalformedRequest(f"{reason}: {place}.content", f"{place}.content")
        for field in ("tool_calls", "refusal", "reasoning_content", "reasoning"):
            if getattr(self, field) and self.role != "assistant":
                raise MalformedRequest(f"Only an assistant's message has {field}.", f"{place}.{field}")
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise MalformedRequest("It says something else than reasoning_content; set one.", f"{place}.reasoning")
        if self.role == "tool" and self.tool_call_id is None:
            raise MalformedRequest(f"Missing required parameter: {place}.tool_call_id", f"{place}.tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise MalformedRequest("Only a tool's message has tool_call_id.", f"{place}.tool_call_id")


def check_messages(messages: list[Message]) -> None:
    """Each by itself, and that calls and their results belong together. Raises as Message.check."""
    open_calls: set[str] = set()
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        message.check(place)
        if message.role != "tool":
            if open_calls:
                raise MalformedRequest(f"Tool calls without a result: {', '.join(sorted(open_calls))}.", place)
            open_calls = {call.id for call in message.tool_calls or []}
        elif message.tool_call_id in open_calls:
            open_calls.discard(message.tool_call_id)
        else:
            raise MalformedRequest("It answers no call of the message before.", f"{place}.tool_call_id")
    if open_calls:
        raise MalformedRequest(f"Tool calls without a result: {', '.join(sorted(open_calls))}.", "messages")
