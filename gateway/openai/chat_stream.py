"""How a chat's answer looks on the wire: of text alone, or of reasoning, text and tool calls."""

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from loraplex.engines.protocol import FinishReason, TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.answers import told_tokens
from loraplex.gateway.openai.chat_wire import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
)
from loraplex.gateway.openai.tiers import GrantedTier
from loraplex.gateway.openai.token_logprobs import described_tokens
from loraplex.gateway.openai.tool_wire import MadeCall, MadeFunction
from loraplex.gateway.openai.wire import CompletionTokensDetails, Usage
from loraplex.gateway.speech.deltas import CallArguments, CallBegun, Delta, Reasoning, Text
from loraplex.gateway.speech.speech import Speech

_TAIL, _TAIL_WITH_USAGE = b"]}\n\n", b'],"usage":null}\n\n'
_TEXT_END = b'},"logprobs":null,"finish_reason":null}'
_PLAIN_TEXT_TAIL = _TEXT_END + _TAIL  # one object for all streams: it is read for every token
_encode = msgspec.json.Encoder().encode


class ChatWire:
    """Implements `Wire`; what does not change from chunk to chunk is encoded once."""

    __slots__ = ("_created", "_head", "_id", "_model", "_tail", "_text_head", "_text_tail", "_tier", "_tokenizer")

    def __init__(self, completion_id: str, body: ChatRequest, tokenizer: Tokenizer, tier: GrantedTier) -> None:
        self._id = completion_id
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
        return self._frame(number, b'{"role":"assistant","content":""}')

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        if number == 0 and event.text and not event.logprobs:  # as nearly all are
            return self._text_head + _encode(event.text) + self._text_tail
        described = self._described(event) if event.logprobs else b"null"
        if not event.text and described == b"null":
            return b""
        return self._frame(number, b'{"content":' + msgspec.json.encode(event.text) + b"}", described)

    def finish(self, number: int, reason: FinishReason) -> bytes:
        return self._frame(number, b"{}", finish=b'"' + reason.encode() + b'"')

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(number, events) for number, events in enumerate(choices)]
        return msgspec.json.encode(
            ChatCompletion(self._id, self._created, self._model, answers, usage, service_tier=self._tier)
        )

    def _frame(self, index: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish)
        return self._head + choice + self._tail

    def _choice(self, number: int, events: Sequence[TokenEvent]) -> Choice:
        message = AnswerMessage(content="".join(event.text for event in events))
        return Choice(message, _reason(events), number, self._logprobs(events))

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
        speeches: Sequence[Speech],
    ) -> None:
        super().__init__(completion_id, body, tokenizer, tier)
        self._speeches = speeches
        self._num_calls = [0] * len(speeches)
        self._num_reasoning = 0

    def begin(self, number: int) -> bytes:
        return self._frame(number, b'{"role":"assistant","content":null}')

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        logprobs = self._logprobs([event])
        deltas = [self._delta(number, delta) for delta in self._hear(number, event)]
        if logprobs is not None:
            described = msgspec.json.encode(logprobs)
            return b"".join(
                self._frame(number, delta, b"null" if place else described)
                for place, delta in enumerate(deltas or [b"{}"])
            )
        return b"".join(self._frame(number, delta) for delta in deltas)

    def finish(self, number: int, reason: FinishReason) -> bytes:
        rest = [self._frame(number, self._delta(number, delta)) for delta in self._speeches[number].finish()]
        told = b"tool_calls" if self._num_calls[number] and reason == "stop" else reason.encode()
        return b"".join(rest) + self._frame(number, b"{}", finish=b'"' + told + b'"')

    def usage(self, usage: Usage) -> bytes:
        return super().usage(self._detailed(usage))

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        answers = [self._choice(number, events) for number, events in enumerate(choices)]
        told = self._detailed(usage)  # after the choices were heard
        return msgspec.json.encode(
            ChatCompletion(self._id, self._created, self._model, answers, told, service_tier=self._tier)
        )

    def _choice(self, number: int, events: Sequence[TokenEvent]) -> Choice:
        deltas = [delta for event in events for delta in self._hear(number, event)]
        message = spoken_message([*deltas, *self._speeches[number].finish()])
        reason = _reason(events)
        told = "tool_calls" if message.tool_calls is not UNSET and reason == "stop" else reason
        return Choice(message, told, number, self._logprobs(events))

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
