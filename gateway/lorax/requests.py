"""LoRAX's parameters -> GenerateRequests."""

import secrets
from functools import partial
from typing import Any

from litestar import Request

from loraplex.engines.errors import PromptTooLong
from loraplex.engines.protocol import Engine, GenerateRequest, SamplingParams
from loraplex.engines.tokenizer_protocol import Room
from loraplex.gateway.catalogue import Route
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of
from loraplex.gateway.lorax.wire import Parameters
from loraplex.gateway.openai.dialogue import LONG_TEXT
from loraplex.gateway.prompts import apart, tokenizer_for


async def lorax_requests(
    request: Request[Any, Any, Any],
    inputs: str,
    parameters: Parameters,
    *,
    tells_tokens: bool,
    route: Route,
    engine: Engine,
) -> list[GenerateRequest]:
    """One request for each answer that is generated; `tells_tokens` where the client will see their probabilities.

    Raises PromptTooLong or MalformedRequest, naming the field, EngineUnavailable, and what `apart` raises.
    """
    prompt = await tokens_of(request, inputs, route, engine, truncate=parameters.truncate)
    limit = _limit(len(prompt), parameters.max_new_tokens, engine.info().max_model_len)
    generation_id = f"lorax-{secrets.token_hex(12)}"
    return [
        GenerateRequest(
            request_id=f"{generation_id}-0-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=_sampling(parameters, limit, engine.info().vocab_size, tells_tokens=tells_tokens),
            adapter=route.adapter,
            composition=route.composition,
            tenant=caller_of(request).tenant_id,
        )
        for number in range(parameters.num_answers)
    ]


async def tokens_of(
    request: Request[Any, Any, Any], inputs: str, route: Route, engine: Engine, *, truncate: int | None
) -> list[int]:
    """The text's tokens, or the last of them that fit.

    Raises MalformedRequest, PromptTooLong, EngineUnavailable or AdapterError, and what `apart` raises.
    """
    encode = (await tokenizer_for(route, engine)).encode
    longest = engine.info().max_model_len - 1
    if truncate is not None and truncate > longest:
        raise MalformedRequest(f"`truncate` must be <= {longest}. Given: {truncate}", "truncate")
    room = Room(longest) if truncate is None else Room(truncate, keeps_end=True)
    try:
        return await apart(request, partial(encode, inputs, room=room), is_long=len(inputs) > LONG_TEXT)
    except PromptTooLong as error:
        raise PromptTooLong(f"`inputs` must have less than {longest} tokens. Given: more", "inputs") from error


def _limit(num_prompt: int, wanted: int | None, longest: int) -> int:
    """How many tokens may be generated: as many as were asked for, else all there is room for. Raises PromptTooLong."""
    if num_prompt >= longest:
        raise PromptTooLong(f"`inputs` must have less than {longest} tokens. Given: {num_prompt}", "inputs")
    if wanted is not None and num_prompt + wanted > longest:
        raise PromptTooLong(
            f"`inputs` tokens + `max_new_tokens` must be <= {longest}. Given: {num_prompt} `inputs` tokens and "
            f"{wanted} `max_new_tokens`",
            "max_new_tokens",
        )
    return longest - num_prompt if wanted is None else wanted


def _sampling(parameters: Parameters, limit: int, vocab_size: int, *, tells_tokens: bool) -> SamplingParams:
    """A seed is always set where tokens are drawn, so that the answer can tell it."""
    asks = tells_tokens or parameters.num_answers > 1 or parameters.return_k_alternatives is not None
    seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
    return SamplingParams(
        max_tokens=limit,
        temperature=(parameters.temperature or 1.0) if parameters.samples else 0.0,
        top_p=1.0 if parameters.top_p is None else parameters.top_p,
        top_k=min(parameters.top_k or 0, vocab_size),
        typical_p=1.0 if parameters.typical_p is None else parameters.typical_p,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        presence_penalty=parameters.presence_penalty or 0.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        num_logprobs=min(parameters.return_k_alternatives or 0, vocab_size) if asks else None,
        num_prompt_logprobs=0 if parameters.decoder_input_details else None,
        grammar=parameters.response_format.grammar() if parameters.response_format else None,
        seed=seed - 2**64 if seed >= 2**63 else seed,  # the same 64 bits, as the engine counts
        stop=tuple(parameters.stop or ()),
        includes_stop=True,
        ignore_eos=bool(parameters.ignore_eos_token),
    )
