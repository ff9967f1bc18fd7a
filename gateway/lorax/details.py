"""What LoRAX tells of an answer, token by token."""

import codecs
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from loraplex.engines.protocol import GenerateRequest, TokenEvent, TokenLogprobs
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.wire import LEAST_LOGPROB

EndReason = Literal["length", "eos_token", "stop_sequence"]


class AlternativeToken(Struct):
    id: int
    text: str
    logprob: float


class Token(Struct):
    """One generated token. `skipped` where a draft had guessed it, so that it needed no step of its own."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | UnsetType = UNSET


class PrefillToken(Struct):
    """One token of the prompt; nothing came before the first, so that it has no probability."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(Struct, kw_only=True):
    """One of the answers that were not the best."""

    generated_text: str
    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(Struct, kw_only=True):
    finish_reason: EndReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class StreamDetails(Struct, kw_only=True):
    finish_reason: EndReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Answer:
    """One answer as it grows: what its tokens are called, and what the whole of them says.

    The texts of its tokens that are not special, put together, are `text`: a character of several tokens is told with
    its last one, and what a token holds beyond a stop string is left out.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, *, num_alternatives: int) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._told = ""
        self._step = -1
        self._sum_logprobs = 0.0
        self.text = ""
        self.num_tokens = 0
        self.num_skipped = 0
        self.reason: EndReason = "length"

    @property
    def seed(self) -> int | None:
        """As the client may say it again; None where nothing was drawn."""
        seed = self._request.sampling.seed
        return None if seed is None or self._request.sampling.temperature == 0 else seed % 2**64

    @property
    def mean_logprob(self) -> float:
        return self._sum_logprobs / max(self.num_tokens, 1)

    def add(self, event: TokenEvent) -> list[Token]:
        """The next tokens; told without a probability where none was asked for they have the least there is."""
        self.text += event.text
        if event.finish_reason == "stop":
            self.reason = "stop_sequence" if self.text.endswith(self._request.sampling.stop) else "eos_token"
        tokens = []
        for place, token_id in enumerate(event.token_ids):
            is_last = event.finish_reason is not None and place == len(event.token_ids) - 1
            logprobs = event.logprobs[place] if place < len(event.logprobs) else None
            tokens.append(self._token(token_id, logprobs, event.step, is_last=is_last))
        return tokens

    def prefill(self, event: TokenEvent) -> list[PrefillToken]:
        """The prompt's tokens, of an answer's first event."""
        told = event.prompt_logprobs or (None,) * len(self._request.prompt_token_ids)
        return [
            PrefillToken(token_id, self._name(token_id), None if one is None else max(one.logprob, LEAST_LOGPROB))
            for token_id, one in zip(self._request.prompt_token_ids, told, strict=True)
        ]

    def _token(self, token_id: int, logprobs: TokenLogprobs | None, step: int, *, is_last: bool) -> Token:
        is_special = token_id in self._tokenizer.special_token_ids
        logprob = LEAST_LOGPROB if logprobs is None else max(logprobs.logprob, LEAST_LOGPROB)
        skipped = step == self._step
        self._step = step
        self.num_tokens += 1
        self.num_skipped += skipped
        self._sum_logprobs += logprob
        text = self._name(token_id) if is_special else self._text(token_id, is_last=is_last)
        return Token(token_id, text, logprob, is_special, skipped, self._alternatives(logprobs))

    def _text(self, token_id: int, *, is_last: bool) -> str:
        text = self._characters.decode(self._tokenizer.token_bytes(token_id), final=is_last)
        if is_last and self.reason == "stop_sequence":
            whole = self._told + text
            ends = [at + len(stop) for stop in self._request.sampling.stop if (at := whole.find(stop)) >= 0]
            text = whole[: min(ends, default=len(whole))][len(self._told) :]
        self._told += text
        return text

    def _alternatives(self, logprobs: TokenLogprobs | None) -> list[AlternativeToken] | UnsetType:
        if not self._num_alternatives or logprobs is None:
            return UNSET
        return [
            AlternativeToken(token_id, self._name(token_id), max(logprob, LEAST_LOGPROB))
            for token_id, logprob in logprobs.top[: self._num_alternatives]
        ]

    def _name(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
