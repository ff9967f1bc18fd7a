"""What the gateway may ask of a tokenizer, and the messages of a conversation that it renders. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call that an earlier answer made; `arguments` is the JSON text the model wrote, valid or not."""

    id: str
    name: str
    arguments: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation, as chat templates see it. A tool's result says which call it answers."""

    role: str
    content: str | None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class TokenSpan(msgspec.Struct, frozen=True):
    """One token of a text, and where it stands there in characters; a special token that was added stands nowhere."""

    token_id: int
    start: int
    stop: int


class Room(msgspec.Struct, frozen=True):
    """How many tokens of a text are of use; with `keeps_end` those are the last, and the others are left out."""

    most: int
    keeps_end: bool = False


class Tokenizer(Protocol):
    """Text to token ids and back, in the gateway's process.

    Where there is `room` for so many tokens alone, a text that has far more may be a PromptTooLong that names no field.
    """

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are no part of a text: ends, beginnings, marks of a chat template."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[int]: ...

    def spans(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[TokenSpan]:
        """The tokens that `encode` gives, with their places."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of whole tokens, special tokens left out or as their names; broken UTF-8 as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, as bytes; a special token's name."""
        ...

    def token_name(self, token_id: int) -> str:
        """How the vocabulary writes it."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The text of the model's chat template, or None."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """What the chat template reads beside the messages: `tools`, `enable_thinking` and the like."""
        ...

    @property
    def renders_apart(self) -> bool:
        """Whether `encode_chat` waits for another process, so that its place is a thread."""
        ...

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        room: Room | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template. Raises InvalidRequest where it refuses.

        `tools` are as OpenAI writes them; `variables` are further names the template may read. With
        `continue_final_message` the last message's text is left open, for the answer to go on with.
        """
        ...
