"""Wire parameters -> GenerateRequest: messages become tokens under the model's chat template."""

import msgspec

from loraplex.auth.caller import Caller
from loraplex.engines.errors import PromptTooLong
from loraplex.engines.protocol import ChatMessage, Engine, GenerateRequest, SamplingParams
from loraplex.gateway.catalogue import Route
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.openai.chat_wire import ChatRequest


def to_generate_requests(
    body: ChatRequest, completion_id: str, route: Route, caller: Caller, engine: Engine
) -> list[GenerateRequest]:
    """One request for each of the `n` choices; a seed is counted up from choice to choice.

    Raises PromptTooLong or MalformedRequest, naming the field, or InvalidRequest where the template refuses.
    """
    messages = [
        ChatMessage(role="system" if message.role == "developer" else message.role, content=message.text())
        for message in body.messages
    ]
    prompt = engine.tokenizer.encode_chat(messages)
    info = engine.info()
    room = info.max_model_len - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"This model's context is {info.max_model_len} tokens, and the messages have {len(prompt)}.", "messages"
        )
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(body, field)
    if wanted is not None and wanted > room:
        raise PromptTooLong(
            f"This model's context is {info.max_model_len} tokens; the messages have {len(prompt)}, "
            f"which leaves {room} of the {wanted} asked for.",
            field,
        )
    sampling = _sampling(body, wanted or room, info.vocab_size)
    return [
        GenerateRequest(
            request_id=f"{completion_id}-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=_reseeded(sampling, number),
            adapter=route.adapter,
            tenant=caller.tenant_id,
        )
        for number in range(body.n or 1)
    ]


def _reseeded(sampling: SamplingParams, number: int) -> SamplingParams:
    if sampling.seed is None or not number:
        return sampling
    return msgspec.structs.replace(sampling, seed=sampling.seed + number)


def _sampling(body: ChatRequest, max_tokens: int, vocab_size: int) -> SamplingParams:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stops:
        raise MalformedRequest("A stop string must not be empty.", "stop")
    stop_token_ids = body.stop_token_ids or []
    if not all(0 <= token < vocab_size for token in stop_token_ids):
        raise MalformedRequest(f"Token ids run from 0 to {vocab_size - 1}.", "stop_token_ids")
    bias = body.logit_bias or {}
    if not all(token.isascii() and token.isdigit() and int(token) < vocab_size for token in bias):
        raise MalformedRequest(f"Its keys are token ids, from 0 to {vocab_size - 1}.", "logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): value for token, value in bias.items()},
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        seed=body.seed,
        stop=tuple(stops),
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
    )
