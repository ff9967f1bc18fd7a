"""The JSON of LoRAX's answers."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from loraplex.engines.protocol import FinishReason, GenerateRequest, StopReason, TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.lorax.details import Answer, BestOfSequence, Details, PrefillToken, StreamDetails, Token
from loraplex.gateway.lorax.wire import Parameters
from loraplex.gateway.openai.wire import Usage


class GenerateResponse(Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamResponse(Struct):
    """One token of a stream; the last one tells the whole text, and the details where they were asked for."""

    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class Finished(Struct):
    """One answer that is complete."""

    answer: Answer
    tokens: list[Token]
    prefill: list[PrefillToken]


class LoraxWire:
    """Implements `Wire`. After `whole`, `best` is the answer that was told."""

    def __init__(
        self,
        inputs: str,
        parameters: Parameters,
        choices: Sequence[GenerateRequest],
        tokenizer: Tokenizer,
        *,
        as_list: bool,
    ) -> None:
        """`as_list`: a whole answer is the only element of a list."""
        self._parameters = parameters
        self._as_list = as_list
        self._num_prompt_tokens = len(choices[0].prompt_token_ids)
        self._before = inputs if parameters.return_full_text else ""
        alternatives = parameters.return_k_alternatives or 0
        self._answers = [Answer(choice, tokenizer, num_alternatives=alternatives) for choice in choices]
        self.best = self._answers[0]

    def begin(self, number: int) -> bytes:
        return b""

    def chunk(self, number: int, event: TokenEvent) -> bytes:
        answer = self._answers[number]
        told = [StreamResponse(token) for token in answer.add(event)]
        if told and event.finish_reason is not None:
            told[-1].generated_text = self._before + answer.text
            told[-1].details = self._stream_details(answer)
        return b"".join(b"data: " + msgspec.json.encode(one) + b"\n\n" for one in told)

    def finish(self, number: int, reason: FinishReason, stop_reason: StopReason) -> bytes:
        return b""  # the last token says it

    def usage(self, usage: Usage) -> bytes:
        return b""

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage) -> bytes:
        finished = [self._finish(number, events) for number, events in enumerate(choices)]
        told = max(finished, key=lambda one: one.answer.mean_logprob)
        self.best = told.answer
        response = GenerateResponse(self._before + told.answer.text)
        if self._parameters.wants_details:
            response.details = self._details(told, [one for one in finished if one is not told])
        return msgspec.json.encode([response] if self._as_list else response)

    def _finish(self, number: int, events: Sequence[TokenEvent]) -> Finished:
        answer = self._answers[number]
        tokens = [token for event in events for token in answer.add(event)]
        prefill = answer.prefill(events[0]) if self._parameters.decoder_input_details else []
        return Finished(answer, tokens, prefill)

    def _details(self, told: Finished, others: Sequence[Finished]) -> Details:
        return Details(
            finish_reason=told.answer.reason,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=told.answer.num_tokens,
            skipped_tokens=told.answer.num_skipped,
            seed=told.answer.seed,
            prefill=told.prefill,
            tokens=told.tokens,
            best_of_sequences=[self._sequence(other) for other in others] if others else UNSET,
        )

    def _sequence(self, other: Finished) -> BestOfSequence:
        return BestOfSequence(
            generated_text=self._before + other.answer.text,
            finish_reason=other.answer.reason,
            generated_tokens=other.answer.num_tokens,
            seed=other.answer.seed,
            prefill=other.prefill,
            tokens=other.tokens,
        )

    def _stream_details(self, answer: Answer) -> StreamDetails | None:
        if not self._parameters.wants_details:
            return None
        return StreamDetails(
            finish_reason=answer.reason,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=answer.num_tokens,
            seed=answer.seed,
        )
