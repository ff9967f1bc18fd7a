"""Tokens with their log-probabilities, as completions tell them: lists of one entry a token."""

import codecs
from collections.abc import Sequence, Set
from typing import Protocol

from msgspec import Struct

from loraplex.engines.protocol import TokenLogprobs
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.wire import LEAST_LOGPROB


class Written(Protocol):
    """How tokens are written: a tokenizer, for one."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TokensAsIds:
    """Implements Written as vLLM's `return_tokens_as_token_ids` has it, so that no two tokens are written alike."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"token_id:%d" % token_id


class CompletionLogprobs(Struct):
    """One entry a token; `text_offset` counts characters from the text's start. A prompt's first token has None.

    A token that is no text by itself, such as a part of a character, is written `bytes:\\xf0\\x9f`, as OpenAI does.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def add(self, token_id: int, logprobs: TokenLogprobs | None, offset: int, written: Written) -> None:
        self.tokens.append(_written(token_id, written))
        self.text_offset.append(offset)
        self.token_logprobs.append(None if logprobs is None else max(logprobs.logprob, LEAST_LOGPROB))
        self.top_logprobs.append(None if logprobs is None else _top(logprobs, written))


class EchoedPrompt:
    """A prompt as it stands before its answers: as it was sent, or decoded where ids were."""

    def __init__(
        self,
        sent: str | None,
        token_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        add_special_tokens: bool = True,
    ) -> None:
        """`add_special_tokens` says whether a text's ids begin with those that its tokenizer adds."""
        self.token_ids = token_ids
        self._is_text = sent is not None
        self._add_special_tokens = add_special_tokens
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self.text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens) if sent is None else sent

    def offsets(self) -> list[int]:
        """Where in the text each token begins, in characters."""
        if not self._is_text:
            return offsets_of(self.token_ids, self.text, self._tokenizer, self._skipped)
        end, places = 0, []
        # some leave out the space before a word
        for span in self._tokenizer.spans(self.text, add_special_tokens=self._add_special_tokens):
            places.append(min(span.start, end) if span.start < span.stop else end)
            end = max(span.stop, end)
        return places


def offsets_of(token_ids: Sequence[int], text: str, tokenizer: Tokenizer, skipped: Set[int]) -> list[int]:
    """Where in the text, which `decode` gives of all but the skipped ones, each token begins, in characters.

    A part of a character begins where that does, and a token that is not in the text where the next one does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    place, places = 0, []
    for token_id in token_ids:
        places.append(place)
        if token_id not in skipped:
            place += len(decoder.decode(tokenizer.token_bytes(token_id)))
    place += len(decoder.decode(b"", final=True))
    left_out = max(place - len(text), 0)  # SentencePiece's space before the first word
    return [min(max(place - left_out, 0), len(text)) for place in places]


def _top(logprobs: TokenLogprobs, written: Written) -> dict[str, float]:
    """Of tokens that are written alike the likeliest."""
    top: dict[str, float] = {}
    for token_id, told in logprobs.top:
        top.setdefault(_written(token_id, written), max(told, LEAST_LOGPROB))
    return top


def _written(token_id: int, written: Written) -> str:
    raw = written.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return f"bytes:{str(raw)[2:-1]}"
