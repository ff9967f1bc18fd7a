"""A prompt's tokens with their log-probabilities, as vLLM tells them."""

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from loraplex.engines.protocol import TokenLogprobs
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.openai.wire import LEAST_LOGPROB


class PromptLogprob(Struct):
    """`rank` counts from 1, the likeliest; null for one that was not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


# By the ids of a place's own token and of the likeliest there; null for the prompt's first, which nothing is before.
PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]


def described_prompt(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs | None], tokenizer: Tokenizer
) -> PromptLogprobs:
    """One entry for each token of the prompt; an engine tells nothing of one that is alone."""
    told = logprobs or (None,) * len(prompt)
    return [None if one is None else _place(token, one, tokenizer) for token, one in zip(prompt, told, strict=True)]


def _place(token_id: int, told: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranks = {other: place for place, (other, _) in enumerate(told.top, 1)}
    found = {token_id: told.logprob, **dict(told.top)}
    return {
        str(one): PromptLogprob(max(logprob, LEAST_LOGPROB), ranks.get(one), _text(one, tokenizer))
        for one, logprob in found.items()
    }


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")
