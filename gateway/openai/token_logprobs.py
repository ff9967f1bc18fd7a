"""Tokens with their log-probabilities, as chats and responses tell them."""

from collections.abc import Sequence
from typing import Any

from loraplex.engines.protocol import TokenEvent, Tokenizer
from loraplex.gateway.openai.wire import LEAST_LOGPROB


def described_tokens(events: Sequence[TokenEvent], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One entry for each token that has log-probabilities."""
    pairs = [pair for event in events for pair in zip(event.token_ids, event.logprobs, strict=False)]
    return [
        {
            **_described(token_id, logprobs.logprob, tokenizer),
            "top_logprobs": [_described(*other, tokenizer) for other in logprobs.top],
        }
        for token_id, logprobs in pairs
    ]


def _described(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}
