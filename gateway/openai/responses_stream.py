"""How a response looks on the wire: the object as a whole, or the events that build it up.

Every item is opened, filled and closed by events in OpenAI's order; the last event carries the object as it is stored.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from loraplex.engines.protocol import FinishReason, StopReason, TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.answers import told_tokens
from loraplex.gateway.openai.responses_items import (
    CallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    new_id,
)
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.openai.tiers import GrantedTier
from loraplex.gateway.openai.token_logprobs import TokenLogprob, described_tokens
from loraplex.gateway.openai.wire import Usage
from loraplex.gateway.problems import problem_of
from loraplex.gateway.speech.deltas import CallArguments, CallBegun, Delta, Reasoning, Text
from loraplex.gateway.speech.speech import Speech

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class Response(Struct, kw_only=True):
    """OpenAI's object. Times in seconds since 1970."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    completed_at: int | None = None
    background: Literal[False] = False
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: Sequence[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: GrantedTier
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: Any
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: dict[str, Any] | None = None
    user: str | None


def begun_response(response_id: str, body: ResponseRequest, tier: GrantedTier) -> Response:
    """Before its first token."""
    form = body.text.format if body.text and body.text.format else None
    return Response(
        id=response_id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
        service_tier=tier,
        store=body.store is not False,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": msgspec.to_builtins(form) if form else {"type": "text"}},
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


class ResponseWire:
    """Implements `Wire`, of one choice. `response` is the object as far as it is known."""

    def __init__(self, response: Response, speech: Speech, tokenizer: Tokenizer) -> None:
        self.response = response
        self._speech = speech
        self._tokenizer = tokenizer
        self._output: list[OutputItem] = []
        self._is_open = False  # whether the last item is
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not told yet
        self._num_events = 0
        self._num_reasoning = 0
        self._reason: FinishReason = "stop"

    def begin(self, number: int) -> bytes:
        return self._event("response.created", response=self.response) + self._event(
            "response.in_progress", response=self.response
        )

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        return b"".join(self._tell(delta) for delta in self._hear(event))

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason = None) -> bytes:
        rest = b"".join(self._tell(delta) for delta in self._speech.finish())
        if not self._output:
            rest += self._tell(Text(""))
        self._reason = reason
        return rest + self._close("completed" if reason == "stop" else "incomplete")

    def usage(self, usage: Usage) -> bytes:
        """The last event."""
        self._end(usage)
        return self._event(f"response.{self.response.status}", response=self.response)

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        for event in choices[0]:
            self.chunk(0, event)
        reason = choices[0][-1].finish_reason
        assert reason is not None, "an engine ends every answer with a reason"
        self.finish(0, reason)
        self._end(usage)
        return msgspec.json.encode(self.response)

    def error(self, error: Exception) -> bytes:
        """What ends a stream that fails: the response as failed, or an error behind one that is complete."""
        problem = problem_of(error)
        if self.response.status != "in_progress":
            return self._event("error", code=problem.row.code, message=problem.message, param=problem.param)
        self.response.status = "failed"
        code = "rate_limit_exceeded" if problem.row.status == 429 else "server_error"
        self.response.error = {"code": code, "message": problem.message}
        self.response.output = self._output
        return self._event("response.failed", response=self.response)

    def _end(self, usage: Usage) -> None:
        response = self.response
        response.status = "completed" if self._reason == "stop" else "incomplete"
        response.completed_at = int(time.time()) if self._reason == "stop" else None
        response.incomplete_details = None if self._reason == "stop" else {"reason": "max_output_tokens"}
        response.output = self._output
        response.usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": usage.total_tokens,
        }

    def _hear(self, event: TokenEvent) -> list[Delta]:
        if self._speech.is_reasoning:
            self._num_reasoning += len(event.token_ids)
        elif event.logprobs:
            self._logprobs += described_tokens(told_tokens([event]), self._tokenizer)
        return self._speech.feed(event.text, len(event.token_ids))

    def _tell(self, delta: Delta) -> bytes:
        item = self._output[-1] if self._is_open else None
        match delta:
            case Text(text):
                opened = b"" if isinstance(item, MessageItem) else self._open_message()
                return opened + self._tell_text(text)
            case Reasoning(text):
                opened = b"" if isinstance(item, ReasoningItem) else self._open_reasoning()
                return opened + self._tell_reasoning(text)
            case CallBegun(call_id, name):
                self._logprobs.clear()
                return self._open(CallItem(new_id("fc"), call_id, name))
            case CallArguments(text):
                assert isinstance(item, CallItem), "arguments follow their call"
                item.arguments += text
                return self._at_item("response.function_call_arguments.delta", item, delta=text)

    def _tell_text(self, text: str) -> bytes:
        item = self._output[-1]
        assert isinstance(item, MessageItem)
        item.content[0].text += text
        logprobs, self._logprobs = self._logprobs, []
        item.content[0].logprobs += logprobs
        if not text and not logprobs:
            return b""
        return self._at_item("response.output_text.delta", item, content_index=0, delta=text, logprobs=logprobs)

    def _tell_reasoning(self, text: str) -> bytes:
        item = self._output[-1]
        assert isinstance(item, ReasoningItem)
        item.content[0].text += text
        return self._at_item("response.reasoning_text.delta", item, content_index=0, delta=text)

    def _open(self, item: OutputItem) -> bytes:
        closed = self._close("completed")
        self._output.append(item)
        self._is_open = True
        return closed + self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _open_message(self) -> bytes:
        item = MessageItem(new_id("msg"), [])
        opened = self._open(item)
        item.content.append(OutputText("", [], []))
        return opened + self._at_item("response.content_part.added", item, content_index=0, part=item.content[0])

    def _open_reasoning(self) -> bytes:
        item = ReasoningItem(new_id("rs"), [])
        opened = self._open(item)
        item.content.append(ReasoningText(""))
        return opened + self._at_item("response.content_part.added", item, content_index=0, part=item.content[0])

    def _close(self, status: Literal["completed", "incomplete"]) -> bytes:
        """The events that end the open item, if there is one."""
        if not self._is_open:
            return b""
        self._is_open = False
        item = self._output[-1]
        item.status = status
        match item:
            case MessageItem(content=[part]):
                told = {"text": part.text, "logprobs": part.logprobs}
                done = self._at_item("response.output_text.done", item, content_index=0, **told)
                done += self._at_item("response.content_part.done", item, content_index=0, part=part)
            case ReasoningItem(content=[thought]):
                done = self._at_item("response.reasoning_text.done", item, content_index=0, text=thought.text)
                done += self._at_item("response.content_part.done", item, content_index=0, part=thought)
            case CallItem():
                arguments = {"name": item.name, "arguments": item.arguments}
                done = self._at_item("response.function_call_arguments.done", item, **arguments)
            case _:
                done = b""
        return done + self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _at_item(self, kind: str, item: OutputItem, **fields: Any) -> bytes:
        return self._event(kind, item_id=item.id, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = msgspec.json.encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"
