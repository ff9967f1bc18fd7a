"""How a chat's answer looks on the wire: of text alone, or of reasoning, text and tool calls."""

import time
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET

from loraplex.engines.protocol import FinishReason, StopReason, TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.answers import told_tokens
from loraplex.gateway.openai.chat_wire import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
)
from loraplex.gateway.openai.prompt_logprobs import described_prompt
from loraplex.gateway.openai.tiers import GrantedTier
from loraplex.gateway.openai.token_logprobs import described_tokens
from loraplex.gateway.openai.tool_wire import MadeCall, MadeFunction
from loraplex.gateway.openai.wire import CompletionTokensDetails, Usage
from loraplex.gateway.speech.deltas import CallArguments, CallBegun, Delta, Reasoning, Text
from loraplex.gateway.speech.speech import Speech

_END = b"}\n\n"
_TAIL, _TAIL_WITH_USAGE = b"]" + _END, b'],"usage":null' + _END
_TEXT_END = b'},"logprobs":null,"finish_reason":null}'
_PLAIN_TEXT_TAIL = _TEXT_END + _TAIL  # one object for all streams: it is read for every token
_encode = msgspec.json.Encoder().encode


class ChatWire:
    """Implements `Wire`; what does not change from chunk to chunk is encoded once."""

    __slots__ = (
        "_body", "_created", "_head", "_id", "_is_bare", "_model", "_prompt", "_running_usage", "_tail", "_tells_ids",
        "_text_head", "_text_tail", "_tier", "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, completion_id: str, body: ChatRequest, tokenizer: Tokenizer, tier: GrantedTier, prompt: Sequence[int]
    ) -> None:
        self._id = completion_id
        self._body = body
        self._prompt = prompt
        self._tells_ids = bool(body.return_token_ids)
        self._running_usage = body.running_usage()
        self._is_bare = not self._tells_ids and self._running_usage is None  # chunks tell their text alone
        self._tier = tier
        self._model = body.model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = _TAIL_WITH_USAGE if body.includes_usage else _TAIL
        self._text_head = self._head + b'{"index":0,"delta":{"content":'
        self._text_tail = _TEXT_END + _TAIL_WITH_USAGE if body.includes_usage else _PLAIN_TEXT_TAIL

    def begin(self, number: int) -> bytes:
        return self._begin(number, b'""')

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        if number == 0 and event.text and not event.logprobs and self._is_bare:  # as nearly all are
            return self._text_head + _encode(event.text) + self._text_tail
        self._count(number, event)
        described = self._described(event) if event.logprobs else b"null"
        ids = self._ids(event)
        if not event.text and described == b"null" and not ids:
            return b""
        return self._frame(number, b'{"content":' + msgspec.json.encode(event.text) + b"}", described, more=ids)

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason) -> bytes:
        return self._frame(number, b"{}", finish=b'"' + reason.encode() + b'"', more=self._ended_by(stop_reason))

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(number, events) for number, events in enumerate(choices)]
        return self._encoded(answers, usage, choices[0])

    def _encoded(self, answers: list[Choice], usage: Usage, first: Sequence[TokenEvent]) -> bytes:
        whole = ChatCompletion(self._id, self._created, self._model, answers, usage, service_tier=self._tier)
        if self._tells_ids:
            whole.prompt_token_ids = self._prompt
        if self._body.prompt_logprobs is not None:
            whole.prompt_logprobs = described_prompt(self._prompt, first[0].prompt_logprobs, self._tokenizer)
        return msgspec.json.encode(whole)

    def _count(self, number: int, event: TokenEvent | None) -> None:
        """What frames of this choice tell of its usage from now on; None where nothing has come."""
        if self._running_usage is not None:
            usage = self._running_usage.saw(number, event, len(self._prompt))
            self._tail = b'],"usage":' + msgspec.json.encode(usage) + _END

    def _begin(self, number: int, content: bytes) -> bytes:
        self._count(number, None)
        frame = self._frame(number, b'{"role":"assistant","content":%b}' % content)
        if number or not self._tells_ids:
            return frame
        return frame.removesuffix(_END) + b',"prompt_token_ids":' + msgspec.json.encode(self._prompt) + _END

    def _frame(
        self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null", more: bytes = b""
    ) -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b}' % (index, delta, logprobs, finish, more)
        return self._head + choice + self._tail

    def _ids(self, event: TokenEvent) -> bytes:
        return b',"token_ids":' + msgspec.json.encode(event.token_ids) if self._tells_ids else b""

    def _ended_by(self, stop_reason: StopReason) -> bytes:
        """Nothing where the request named no end of its own: OpenAI has no such field."""
        return b',"stop_reason":' + msgspec.json.encode(stop_reason) if self._body.names_ends else b""

    def _choice(self, number: int, events: Sequence[TokenEvent]) -> Choice:
        message = AnswerMessage(content="".join(event.text for event in events))
        return self._made(message, _reason(events), number, events)

    def _made(
        self,
        message: AnswerMessage,
        reason: FinishReason | Literal["tool_calls"],
        number: int,
        events: Sequence[TokenEvent],
    ) -> Choice:
        choice = Choice(message, reason, number, self._logprobs(events))
        if self._body.names_ends:
            choice.stop_reason = events[-1].stop_reason
        if self._tells_ids:
            choice.token_ids = [token for event in events for token in event.token_ids]
        return choice

    def _described(self, event: TokenEvent) -> bytes:
        return msgspec.json.encode(self._logprobs([event]))

    def _logprobs(self, events: Sequence[TokenEvent]) -> ChoiceLogprobs | None:
        """None where the request did not ask."""
        found = described_tokens(told_tokens(events), self._tokenizer)
        return ChoiceLogprobs(found) if found else None


class SpokenWire(ChatWire):
    """The same, of answers that are taken apart: one `Speech` for each choice."""

    __slots__ = ("_num_calls", "_num_reasoning", "_speeches")

    def __init__(
        self,
        completion_id: str,
        body: ChatRequest,
        tokenizer: Tokenizer,
        tier: GrantedTier,
        prompt: Sequence[int],
        speeches: Sequence[Speech],
    ) -> None:
        super().__init__(completion_id, body, tokenizer, tier, prompt)
        self._speeches = speeches
        self._num_calls = [0] * len(speeches)
        self._num_reasoning = 0

    def begin(self, number: int) -> bytes:
        return self._begin(number, b"null")

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        self._count(number, event)
        described, ids = self._described(event) if event.logprobs else b"null", self._ids(event)
        deltas = [self._delta(number, delta) for delta in self._hear(number, event)]
        if not deltas and (described != b"null" or ids):
            deltas = [b"{}"]
        return b"".join(
            self._frame(number, delta) if place else self._frame(number, delta, described, more=ids)
            for place, delta in enumerate(deltas)
        )

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason) -> bytes:
        rest = [self._frame(number, self._delta(number, delta)) for delta in self._speeches[number].finish()]
        told = b"tool_calls" if self._num_calls[number] and reason == "stop" else reason.encode()
        end = self._frame(number, b"{}", finish=b'"' + told + b'"', more=self._ended_by(stop_reason))
        return b"".join(rest) + end

    def usage(self, usage: Usage) -> bytes:
        return super().usage(self._detailed(usage))

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(number, events) for number, events in enumerate(choices)]
        return self._encoded(answers, self._detailed(usage), choices[0])  # after the choices were heard

    def _choice(self, number: int, events: Sequence[TokenEvent]) -> Choice:
        deltas = [delta for event in events for delta in self._hear(number, event)]
        message = spoken_message([*deltas, *self._speeches[number].finish()])
        reason = _reason(events)
        told = "tool_calls" if message.tool_calls is not UNSET and reason == "stop" else reason
        return self._made(message, told, number, events)

    def _hear(self, number: int, event: TokenEvent) -> list[Delta]:
        speech = self._speeches[number]
        if speech.is_reasoning:
            self._num_reasoning += len(event.token_ids)
        return speech.feed(event.text, len(event.token_ids))

    def _delta(self, number: int, delta: Delta) -> bytes:
        match delta:
            case Text(text):
                return b'{"content":' + msgspec.json.encode(text) + b"}"
            case Reasoning(text):
                told = msgspec.json.encode(text)
                return b'{"reasoning_content":%b,"reasoning":%b}' % (told, told)
            case CallBegun(call_id, name):
                place = self._num_calls[number]
                self._num_calls[number] += 1
                described = msgspec.json.encode(MadeCall(call_id, MadeFunction(name, "")))
                return b'{"tool_calls":[{"index":%d,' % place + described[1:] + b"]}"
            case CallArguments(text):
                place = self._num_calls[number] - 1
                head = b'{"tool_calls":[{"index":%d,"function":{"arguments":' % place
                return head + msgspec.json.encode(text) + b"}}]}"

    def _detailed(self, usage: Usage) -> Usage:
        return msgspec.structs.replace(usage, completion_tokens_details=CompletionTokensDetails(self._num_reasoning))


def spoken_message(deltas: Sequence[Delta]) -> AnswerMessage:
    """All that one answer says."""
    calls: list[MadeCall] = []
    for delta in deltas:
        if isinstance(delta, CallBegun):
            calls.append(MadeCall(delta.id, MadeFunction(delta.name, "")))
        elif isinstance(delta, CallArguments):
            calls[-1].function.arguments += delta.text
    text = "".join(delta.text for delta in deltas if isinstance(delta, Text))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, Reasoning)) or UNSET
    content = text or (None if calls else "")
    return AnswerMessage(content, reasoning_content=reasoning, reasoning=reasoning, tool_calls=calls or UNSET)


def _reason(events: Sequence[TokenEvent]) -> FinishReason:
    reason = events[-1].finish_reason
    assert reason is not None, "an engine ends every answer with a reason"
    return reason
