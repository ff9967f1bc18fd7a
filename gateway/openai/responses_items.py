"""The items that responses are made of: what a conversation brings, and what an answer adds to it."""

import secrets
from typing import Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.chat_messages import Message
from loraplex.gateway.openai.token_logprobs import TokenLogprob
from loraplex.gateway.openai.tool_wire import CalledFunction, SaidCall
from loraplex.gateway.openai.wire import refuse_what_matters


class InputText(Struct, forbid_unknown_fields=True, tag="input_text"):
    text: str


class SaidText(Struct, forbid_unknown_fields=True, tag="output_text"):
    """What answers have beside their text is without effect when it comes back."""

    text: str
    annotations: Raw | UnsetType = UNSET
    logprobs: Raw | UnsetType = UNSET
    parsed: Raw | UnsetType = UNSET


class SaidRefusal(Struct, forbid_unknown_fields=True, tag="refusal"):
    refusal: str


class ReasoningText(Struct, forbid_unknown_fields=True, tag="reasoning_text"):
    text: str


Part: TypeAlias = InputText | SaidText | SaidRefusal | ReasoningText


class InputItem(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A message (where no type is said), a call, its result, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputText] | None = None
    # what answers have beside, and clients send back with them
    parsed_arguments: Raw | UnsetType = UNSET
    phase: Raw | UnsetType = UNSET
    summary: Raw | UnsetType = UNSET
    encrypted_content: Raw | UnsetType = UNSET
    namespace: Raw | UnsetType = UNSET
    caller: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "summary": ([],),
        "encrypted_content": (),
        "namespace": (),
        "caller": (),
    }
    _needed: ClassVar[dict[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "reasoning": (),
    }

    @property
    def kind(self) -> str:
        return self.type or "message"

    def check(self, place: str) -> None:
        """Raises MalformedRequest or UnsupportedParameter, naming the field at `place`."""
        refuse_what_matters(self, self.not_offered, f"{place}.")
        for field in self._needed[self.kind]:
            if getattr(self, field) is None:
                raise MalformedRequest(f"Missing required parameter: {place}.{field}", f"{place}.{field}")
        wrong = SaidText | SaidRefusal if self.role != "assistant" else InputText
        for number, part in enumerate(self.content if isinstance(self.content, list) else []):
            if isinstance(part, ReasoningText) != (self.kind == "reasoning") or isinstance(part, wrong):
                raise MalformedRequest("This item has no content of that type.", f"{place}.content[{number}].type")

    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.refusal if isinstance(part, SaidRefusal) else part.text for part in self.content)

    def result(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output or [])


def messages_of(instructions: str | None, items: list[InputItem]) -> list[Message]:
    """The items as a chat: reasoning, text and calls of one answer become one assistant's message."""
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    reasoning: str | None = None
    answer: Message | None = None  # that a call may still join
    for item in items:
        if item.kind == "reasoning":
            reasoning, answer = item.text() or None, None
        elif item.kind == "function_call":
            if answer is None:
                answer = Message(role="assistant", content=None, reasoning_content=reasoning)
                messages.append(answer)
            call = SaidCall(item.call_id or "", CalledFunction(item.name or "", item.arguments or ""))
            answer.tool_calls = [*(answer.tool_calls or []), call]
        elif item.kind == "function_call_output":
            messages.append(Message(role="tool", content=item.result(), tool_call_id=item.call_id))
            reasoning, answer = None, None
        else:
            role = item.role or "user"
            thought = reasoning if role == "assistant" else None
            message = Message(role=role, content=item.text(), reasoning_content=thought)
            messages.append(message)
            reasoning, answer = None, message if role == "assistant" else None
    return messages


def listed(item: InputItem) -> dict[str, Any]:
    """The item as `input_items` lists it: with an id, and content in parts."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(item))  # `to_builtins` knows no raw fields
    found["type"] = item.kind
    found["id"] = item.id or new_id({"message": "msg", "reasoning": "rs"}.get(item.kind, "fc"))
    if item.kind != "message":
        found["status"] = item.status or "completed"
        return found
    said = item.role == "assistant"
    if isinstance(item.content, str):
        found["content"] = [{"type": "output_text" if said else "input_text", "text": item.content}]
    if said:
        found["status"] = item.status or "completed"
        for part in found["content"]:
            part.setdefault("annotations", [])
    return found


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"


class OutputText(Struct, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class MessageItem(Struct, tag="message"):
    id: str
    content: list[OutputText]
    status: str = "in_progress"
    role: Literal["assistant"] = "assistant"


class CallItem(Struct, tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


class ReasoningItem(Struct, tag="reasoning"):
    """`summary` stays empty: the reasoning is told as it is."""

    id: str
    content: list[ReasoningText]
    status: str = "in_progress"
    summary: list[Any] = []


OutputItem: TypeAlias = MessageItem | CallItem | ReasoningItem
