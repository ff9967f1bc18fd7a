"""One generation at an upstream, from its body to its last event."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from loraplex.engines.errors import EngineDied, GenerationFailed
from loraplex.engines.protocol import FinishReason, GenerateRequest, StopReason
from loraplex.engines.upstream.answer import Answer
from loraplex.engines.upstream.refusals import error_of, refusal_in
from loraplex.engines.upstream.server import Refused, Server
from loraplex.engines.upstream.wire import Choice, Chunk, logprobs_of, prompt_logprobs_of

PATH = "/v1/completions"
_chunks = msgspec.json.Decoder(Chunk)


async def answer_from(
    server: Server, body: dict[str, Any], request: GenerateRequest, answer: Answer, on_chunk: Callable[[], None]
) -> None:
    """Ask, and put into `answer` what comes; `on_chunk` is called with each part of it.

    Raises EngineError, or UnknownModel.
    """
    if not body["stream"]:
        try:
            said = await server.post(PATH, body, seconds=None)
        except Refused as refused:
            raise error_of(refused.refusal) from None
        on_chunk()
        _Reading(request, answer).read(_chunk(msgspec.json.encode(said))).end()
        return
    reading = _Reading(request, answer)
    try:
        async with server.stream(PATH, body) as frames, aclosing(frames) as frames:  # type: ignore[type-var]
            async for frame in frames:
                on_chunk()
                if reading.read(_chunk(frame)).is_cut:
                    break
    except Refused as refused:
        raise error_of(refused.refusal) from None
    except EngineDied:
        if not reading.is_over:
            raise
    reading.end()


class _Reading:
    """What the chunks of one answer have said so far."""

    def __init__(self, request: GenerateRequest, answer: Answer) -> None:
        self._request = request
        self._answer = answer
        self._finish: tuple[FinishReason, StopReason] | None = None
        self._num_cached_tokens = 0
        self.is_cut = False  # what comes is beyond a stop string that the upstream did not look for

    @property
    def is_over(self) -> bool:
        return self._finish is not None or self._answer.is_stopped

    def read(self, chunk: Chunk) -> _Reading:
        """Raises EngineDied or GenerationFailed where it says that the answer will not be whole."""
        if chunk.usage is not None:
            self._num_cached_tokens = chunk.usage.num_cached_tokens
        for choice in chunk.choices[:1]:
            if self._answer.is_stopped and choice.token_ids:
                self.is_cut = True
                return self
            self._add(choice)
            if choice.finish_reason is not None:
                self._finish = _reason(choice.finish_reason), choice.stop_reason
        return self

    def end(self) -> None:
        if not self.is_over:
            raise EngineDied("the upstream broke the answer off")
        reason, stop_reason = self._finish or ("stop", None)
        self._answer.end(reason, stop_reason, self._num_cached_tokens)

    def _add(self, choice: Choice) -> None:
        sampling, told = self._request.sampling, choice.logprobs
        if choice.token_ids is None and choice.text:
            raise GenerationFailed("the upstream tells no token ids; vLLM does from 0.10.2 on")
        try:
            if choice.prompt_logprobs is not None and sampling.num_prompt_logprobs is not None:
                prompt, number = self._request.prompt_token_ids, sampling.num_prompt_logprobs
                self._answer.tell_prompt(prompt_logprobs_of(choice.prompt_logprobs, prompt, number))
            num_top = sampling.num_logprobs
            logprobs = logprobs_of(told, num_top) if told is not None and num_top is not None else []
        except (ValueError, KeyError) as error:
            raise GenerationFailed(f"the upstream's log-probabilities are not by token id: {error}") from error
        self._answer.add(choice.token_ids or [], logprobs)


def _chunk(frame: bytes) -> Chunk:
    try:
        chunk = _chunks.decode(frame)
        if not chunk.choices and (refusal := refusal_in(msgspec.json.decode(frame))) is not None:
            raise error_of(refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GenerationFailed(f"the upstream's answer is not in OpenAI's shape: {error}") from error
    return chunk


def _reason(said: str) -> FinishReason:
    match said:
        case "length":
            return "length"
        case "abort":
            raise EngineDied("the upstream gave the request up")
        case "error":
            raise GenerationFailed("the upstream could not compute this request")
    return "stop"
