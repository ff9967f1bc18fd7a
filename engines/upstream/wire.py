"""A GenerateRequest as vLLM's /v1/completions takes it, and what that answers, in token ids throughout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.protocol import GenerateRequest, Grammar, SamplingParams, TokenLogprobs

BACKGROUND = 2**20  # what a background request's priority is lowered by
_TOKEN_ID = "token_id:"  # how `return_tokens_as_token_ids` writes a token


class ToldLogprobs(msgspec.Struct):
    """Of a choice's tokens, in order."""

    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class ToldPromptLogprob(msgspec.Struct):
    logprob: float


class Choice(msgspec.Struct):
    """What a chunk, or a whole answer, adds."""

    text: str = ""
    token_ids: list[int] | None = None
    logprobs: ToldLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, ToldPromptLogprob] | None] | None = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def num_cached_tokens(self) -> int:
        """None are told unless vLLM runs with --enable-prompt-tokens-details."""
        details = self.prompt_tokens_details
        return (details.cached_tokens if details is not None else None) or 0


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None


def completion_body(
    request: GenerateRequest,
    model: str,
    decode: Callable[[Sequence[int]], str],
    *,
    sends_stops: bool,
    sends_priority: bool,
) -> dict[str, Any]:
    """`decode` gives the text of bad words. A prompt's log-probabilities come whole only.

    Raises InvalidRequest, naming what there is no word for.
    """
    sampling = request.sampling
    if request.composition:
        raise InvalidRequest("this engine computes with one adapter a request; it adds up none", "adapters")
    if sampling.typical_p != 1.0:
        raise InvalidRequest("this engine has no typical_p", "typical_p")
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "n": 1,
        "stream": sampling.num_prompt_logprobs is None,
        "return_token_ids": True,
        **_said(sampling),
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if sampling.grammar is not None:
        body["structured_outputs"] = _structured(sampling.grammar)
    if sampling.bad_words_ids:
        body["bad_words"] = _words(sampling.bad_words_ids, decode)
    if sends_stops and sampling.stop:
        body["stop"] = sampling.stop
    if salt := salt_of(request):
        body["cache_salt"] = salt
    if sends_priority:  # there the lowest number goes first
        body["priority"] = BACKGROUND * request.is_background - request.priority
    return body


def _said(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that differ from what leaves a token's choice alone; a server may have other defaults than none."""
    ends = () if sampling.ignore_eos else sampling.end_token_ids
    said: dict[str, tuple[Any, Any]] = {
        "presence_penalty": (sampling.presence_penalty, 0.0),
        "frequency_penalty": (sampling.frequency_penalty, 0.0),
        "logit_bias": ({str(token): bias for token, bias in sampling.logit_bias.items()}, {}),
        "seed": (sampling.seed, None),
        "stop_token_ids": ([*dict.fromkeys((*sampling.stop_token_ids, *ends))], []),
        "allowed_token_ids": (sampling.allowed_token_ids, ()),
        "include_stop_str_in_output": (sampling.includes_stop, False),
        "ignore_eos": (sampling.ignore_eos, False),
        "min_tokens": (sampling.min_tokens, 0),
        "skip_special_tokens": (sampling.skip_special_tokens, True),
        "logprobs": (sampling.num_logprobs, None),
        "return_tokens_as_token_ids": (sampling.num_logprobs is not None, False),
        "prompt_logprobs": (sampling.num_prompt_logprobs, None),
    }
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        **{name: value for name, (value, default) in said.items() if value != default},
    }


def _structured(grammar: Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "json_schema":
            return {"json": grammar.source}
        case "choice":
            return {"choice": json.loads(grammar.source)}
        case "regex":
            return {"regex": grammar.source}
    return {"grammar": grammar.source}


def _words(words: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Without a space before them: with one the upstream looks for them anyway."""
    texts = dict.fromkeys(decode(word).lstrip() for word in words)
    if "" in texts:
        raise InvalidRequest("this engine cannot leave out white space", "bad_words")
    return list(texts)


def salt_of(request: GenerateRequest) -> str:
    """What keeps the prefix cache's parts asunder: whose prompt it is, unless it is shared, and the request's own."""
    whose = "" if request.shares_prefixes else request.tenant
    if not whose and not request.cache_salt:
        return ""
    return hashlib.sha256(json.dumps([whose, request.cache_salt]).encode()).hexdigest()


def logprobs_of(told: ToldLogprobs, num_top: int) -> list[TokenLogprobs]:
    """One entry a token. The token taken is told among the likeliest though it may be none of them."""
    tops = told.top_logprobs or [None] * len(told.token_logprobs)
    return [
        TokenLogprobs(-9999.0 if own is None else own, _likeliest(_ids(top or {}), num_top))
        for own, top in zip(told.token_logprobs, tops, strict=True)
    ]


def prompt_logprobs_of(
    told: Sequence[Mapping[str, ToldPromptLogprob] | None], prompt: Sequence[int], num_top: int
) -> tuple[TokenLogprobs | None, ...]:
    """One entry a token of the prompt, None for its first. Raises ValueError or KeyError where that is not told."""
    return tuple(
        None if entry is None else _of_prompt(token, entry, num_top) for token, entry in zip(prompt, told, strict=True)
    )


def _of_prompt(token_id: int, entry: Mapping[str, ToldPromptLogprob], num_top: int) -> TokenLogprobs:
    told = {int(other): one.logprob for other, one in entry.items()}
    return TokenLogprobs(told[token_id], _likeliest(told, num_top))


def _ids(top: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix(_TOKEN_ID)): logprob for name, logprob in top.items()}


def _likeliest(logprobs: Mapping[int, float], number: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(logprobs.items(), key=lambda entry: -entry[1])[:number])
