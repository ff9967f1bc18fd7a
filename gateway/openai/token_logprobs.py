"""Tokens with their log-probabilities, as chats and responses tell them."""

from collections.abc import Sequence

from msgspec import Struct

from loraplex.engines.protocol import TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.wire import LEAST_LOGPROB


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


def described_tokens(events: Sequence[TokenEvent], tokenizer: Tokenizer) -> list[TokenLogprob]:
    """One entry for each token that has log-probabilities."""
    described = []
    for event in events:
        for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=False):
            own = _described(token_id, logprobs.logprob, tokenizer)
            top = [_described(*other, tokenizer) for other in logprobs.top]
            described.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
    return described


def _described(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return TopLogprob(raw.decode(errors="replace"), max(logprob, LEAST_LOGPROB), list(raw))
