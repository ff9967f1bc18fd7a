"""Wire parameters -> GenerateRequest: messages become tokens under the model's chat template."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from litestar import Request

from loraplex.engines.errors import PromptTooLong
from loraplex.engines.protocol import Engine, GenerateRequest, SamplingParams
from loraplex.engines.tokenizer_protocol import Room, Tokenizer
from loraplex.gateway.catalogue import Route
from loraplex.gateway.decoding import Body, read
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import caller_of
from loraplex.gateway.health import require_ready
from loraplex.gateway.long_work import LongWork
from loraplex.gateway.openai.dialogue import LARGE_BODY, LONG_TEXT, Dialogue
from loraplex.gateway.openai.wire import GenerationFields

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
MAX_ANSWERS = 2048  # as many prompts as OpenAI takes in one request
_MOST_TOLD = 2**18  # tokens, or a whole context of them, of a text that nothing is generated for
_MOST_NAMED = 2**20  # tokens that a request's answers may allow, exclude and prefer, each by itself
_MANY_NAMED = 4096  # take some milliseconds
_TOKEN_ID = re.compile(r"[0-9]{1,18}")  # int() refuses thousands of digits with an error of its own

T = TypeVar("T")


class Checked(Protocol):
    """A body that refuses what its types cannot."""

    def check(self) -> None: ...


C = TypeVar("C", bound=Checked)


async def checked(body: Body[C], request: Request[Any, Any, Any]) -> tuple[C, bool]:
    """What a request's body says, and whether it is large: what passes over all of it then belongs in a thread.

    Raises what `Body.of` and the body's `check` raise, and what `apart` does.
    """
    raw = await read(request)
    is_large = len(raw) > LARGE_BODY
    return await apart(request, partial(_checked, body, request, raw), is_long=is_large), is_large


def _checked(body: Body[C], request: Request[Any, Any, Any], raw: bytes) -> C:
    said = body.told(request, raw)
    said.check()
    return said


async def chat_requests(
    request: Request[Any, Any, Any], dialogue: Dialogue, completion_id: str, route: Route, engine: Engine
) -> list[GenerateRequest]:
    """One request for each of the `n` choices; a seed is counted up from choice to choice.

    Raises PromptTooLong or MalformedRequest, naming the field, InvalidRequest where the template refuses, and what
    `apart` raises.
    """
    encode = partial(chat_prompt, dialogue, engine.info().max_model_len)
    prompt = await apart(request, encode, is_long=dialogue.is_long)
    return await chat_choices(request, dialogue, prompt, completion_id, route, engine)


def chat_prompt(dialogue: Dialogue, max_model_len: int) -> tuple[list[int], int]:
    """A chat's tokens, and how many may follow. For any thread.

    Raises PromptTooLong, naming the field, or InvalidRequest where the template refuses.
    """
    body, wanted = dialogue.body, dialogue.max_tokens
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    with too_long("messages", max_model_len):
        prompt = dialogue.encode(room_of(body.truncate_prompt_tokens, max_model_len, wanted or 1))
    return prompt, _limit(len(prompt), "messages", wanted, field, max_model_len)


async def chat_choices(
    request: Request[Any, Any, Any],
    dialogue: Dialogue,
    prompt: tuple[list[int], int],
    completion_id: str,
    route: Route,
    engine: Engine,
) -> list[GenerateRequest]:
    """One request for each choice behind what `chat_prompt` gave.

    Raises MalformedRequest, naming the field, and what `apart` raises.
    """
    tenant_id = caller_of(request).tenant_id
    sampling = await _sampling_of(request, dialogue.body, engine, dialogue.tokenizer, 1)
    made = _choices(dialogue.body, sampling, [prompt], completion_id, route, tenant_id)
    return dialogue.hold(made)


async def completion_requests(
    request: Request[Any, Any, Any],
    body: GenerationFields,
    prompt: str | list[str | int | list[int]],
    completion_id: str,
    route: Route,
    engine: Engine,
    *,
    add_special_tokens: bool = True,
) -> list[GenerateRequest]:
    """`n` requests for each prompt; texts get the tokens that the tokenizer adds, unless `add_special_tokens` is off.

    Raises PromptTooLong or MalformedRequest, naming the field, EngineUnavailable, and what `apart` raises.
    """
    tokenizer = await tokenizer_for(route, engine)
    info = engine.info()
    wanted = _either(body.max_tokens, DEFAULT_COMPLETION_TOKENS)
    room = room_of(body.truncate_prompt_tokens, info.max_model_len, wanted or 1)
    prompts = await prompts_of(
        request, prompt, tokenizer, engine, "prompt", room, add_special_tokens=add_special_tokens
    )
    if len(prompts) * body.num_choices > MAX_ANSWERS:
        raise MalformedRequest(f"One request has at most {MAX_ANSWERS} answers, all prompts together.", "prompt")
    limited = [(tokens, _limit(len(tokens), "prompt", wanted, "max_tokens", info.max_model_len)) for tokens in prompts]
    sampling = await _sampling_of(request, body, engine, tokenizer, len(prompts))
    return _choices(body, sampling, limited, completion_id, route, caller_of(request).tenant_id)


async def tokenizer_for(route: Route, engine: Engine) -> Tokenizer:
    """What a request is said in: its adapter's tokenizer and template, or the base's, also for a composition.

    Raises AdapterError or EngineUnavailable.
    """
    require_ready(engine)
    return await engine.tokenizer_of(route.adapter)


async def prompts_of(
    request: Request[Any, Any, Any],
    said: str | list[str | int | list[int]],
    tokenizer: Tokenizer,
    engine: Engine,
    field: str,
    room: Room,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The token ids of each prompt that the field says, or of each the last that there is room for.

    Raises MalformedRequest or PromptTooLong, naming it, EngineUnavailable, and what `apart` raises.
    """
    require_ready(engine)
    if not isinstance(said, str) and len(said) > MAX_ANSWERS and not isinstance(said[0], int):
        raise MalformedRequest(f"One request has at most {MAX_ANSWERS} prompts.", field)
    length = len(said)
    if length <= LONG_TEXT and not isinstance(said, str):
        length = sum(1 if isinstance(part, int) else len(part) for part in said)
    vocab_size = engine.info().vocab_size
    encode = partial(tokenizer.encode, add_special_tokens=add_special_tokens, room=room)
    work = partial(_prompt_tokens, said, encode, vocab_size, field)
    with too_long(field, engine.info().max_model_len):
        prompts = await apart(request, work, is_long=length > LONG_TEXT)
    return [tokens[-room.most :] for tokens in prompts] if room.keeps_end else prompts


def room_of(truncate: int | None, max_model_len: int, num_wanted: int) -> Room:
    """What a prompt has where so many tokens are wanted behind it: with `truncate` for so many of its last tokens, of
    -1 for as many as fit.
    """
    if truncate is None:
        return Room(max_model_len)
    return Room(max(max_model_len - num_wanted, 1) if truncate == -1 else truncate, keeps_end=True)


def told_room(engine: Engine) -> Room:
    """What a text has whose tokens are only told."""
    return Room(max(engine.info().max_model_len, _MOST_TOLD))


@contextmanager
def too_long(field: str, max_model_len: int) -> Iterator[None]:
    """Let a tokenizer's PromptTooLong name the field, and the model's context."""
    try:
        yield
    except PromptTooLong as error:
        if error.param is not None:
            raise
        raise PromptTooLong(f"This model's context is {max_model_len} tokens; the prompt has more.", field) from error


async def apart(request: Request[Any, Any, Any], work: Callable[[], T], *, is_long: bool, is_counted: bool = True) -> T:
    """What the work gives; a long one holds up no stream meanwhile, nor other tenants' long work.

    Before a long one it is seen whether the tenant may ask anything now, unless the request is one that counts nowhere.

    Raises what the work raises; LimitReached, or LimitsUnavailable.
    """
    if not is_long:
        return work()
    long_work: LongWork = request.app.state.long_work
    return await long_work.do(request, work, is_counted=is_counted)


def _prompt_tokens(
    prompt: str | list[str | int | list[int]], encode: Callable[[str], list[int]], vocab_size: int, field: str
) -> list[list[int]]:
    if isinstance(prompt, str):
        prompts: list[list[int]] = [encode(prompt)]
    elif prompt and all(isinstance(part, int) for part in prompt):
        prompts = [[part for part in prompt if isinstance(part, int)]]
    else:
        if any(isinstance(part, int) for part in prompt):
            raise MalformedRequest("It is a text, a list of texts, token ids, or a list of lists of them.", field)
        prompts = [encode(part) if isinstance(part, str) else list(part) for part in prompt
                   if not isinstance(part, int)]  # fmt: skip
    if not prompts or not all(prompts):
        raise MalformedRequest("A prompt must not be empty.", field)
    if not all(0 <= token < vocab_size for tokens in prompts for token in tokens):
        raise MalformedRequest(f"Token ids run from 0 to {vocab_size - 1}.", field)
    return prompts


def _limit(num_prompt: int, prompt_field: str, wanted: int | None, field: str, max_model_len: int) -> int:
    """How many tokens may be generated. Raises PromptTooLong."""
    room = max_model_len - num_prompt
    if room < 1:
        raise PromptTooLong(
            f"This model's context is {max_model_len} tokens; the prompt has {num_prompt}.", prompt_field
        )
    if wanted is not None and wanted > room:
        raise PromptTooLong(
            f"This model's context is {max_model_len} tokens; the prompt has {num_prompt}, "
            f"which leaves {room} of the {wanted} asked for.",
            field,
        )
    return _either(wanted, room)


def _choices(
    body: GenerationFields,
    sampling: SamplingParams,
    prompts: list[tuple[list[int], int]],
    completion_id: str,
    route: Route,
    tenant_id: str,
) -> list[GenerateRequest]:
    """(prompt, token limit) pairs -> `n` requests for each, sampled alike. Raises MalformedRequest."""
    return [
        GenerateRequest(
            request_id=f"{completion_id}-{place}-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=_reseeded(_limited(sampling, limit), number),
            adapter=route.adapter,
            composition=route.composition,
            tenant=tenant_id,
            cache_salt=body.cache_salt or "",
            timeout_seconds=body.timeout_seconds,
        )
        for place, (prompt, limit) in enumerate(prompts)
        for number in range(body.num_choices)
    ]


async def _sampling_of(
    request: Request[Any, Any, Any], body: GenerationFields, engine: Engine, tokenizer: Tokenizer, num_prompts: int
) -> SamplingParams:
    """That of all answers, but for their limits. Raises MalformedRequest, and what `apart` raises."""
    sizes = {
        "allowed_token_ids": len(body.allowed_token_ids or ()),
        "logit_bias": len(body.logit_bias or ()),
        "stop_token_ids": len(body.stop_token_ids or ()),
        "bad_words": sum(map(len, body.bad_words or ())),
    }
    field = max(sizes, key=lambda name: sizes[name])
    if sizes[field] * num_prompts * body.num_choices > _MOST_NAMED:
        raise MalformedRequest(f"Counted for each answer, there are at most {_MOST_NAMED} of them.", field)
    work = partial(_sampling, body, engine, tokenizer)
    return await apart(request, work, is_long=sizes[field] > _MANY_NAMED)


def _limited(sampling: SamplingParams, max_tokens: int) -> SamplingParams:
    if sampling.min_tokens > max_tokens:
        raise MalformedRequest(f"At most {max_tokens} tokens will be generated.", "min_tokens")
    return msgspec.structs.replace(sampling, max_tokens=max_tokens)


def _reseeded(sampling: SamplingParams, number: int) -> SamplingParams:
    if sampling.seed is None or not number:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + number + 2**63) % 2**64 - 2**63)  # of 64 bits still


def _either(said: T | None, default: T) -> T:
    return default if said is None else said


def _sampling(body: GenerationFields, engine: Engine, tokenizer: Tokenizer) -> SamplingParams:
    vocab_size = engine.info().vocab_size
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stops:
        raise MalformedRequest("A stop string must not be empty.", "stop")
    stop_token_ids = body.stop_token_ids or []
    if not all(0 <= token < vocab_size for token in stop_token_ids):
        raise MalformedRequest(f"Token ids run from 0 to {vocab_size - 1}.", "stop_token_ids")
    allowed = body.allowed_token_ids or []
    if not all(0 <= token < vocab_size for token in allowed):
        raise MalformedRequest(f"Token ids run from 0 to {vocab_size - 1}.", "allowed_token_ids")
    bias = body.logit_bias or {}
    if not all(_TOKEN_ID.fullmatch(token) and int(token) < vocab_size for token in bias):
        raise MalformedRequest(f"Its keys are token ids, from 0 to {vocab_size - 1}.", "logit_bias")
    form, defaults = body.form(), engine.info().sampling_defaults
    top_k = min(max(_either(body.top_k, defaults.top_k), 0), vocab_size)
    return SamplingParams(
        max_tokens=0,  # each prompt has its own
        temperature=_either(body.temperature, defaults.temperature),
        top_p=_either(body.top_p, defaults.top_p) or 1.0,
        top_k=1 if body.top_p == 0 else top_k,  # the likeliest token, which is all that a share of 0 leaves
        min_p=_either(body.min_p, defaults.min_p),
        typical_p=_either(body.typical_p, defaults.typical_p),
        repetition_penalty=_either(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): value for token, value in bias.items()},
        num_logprobs=body.num_logprobs(),
        num_prompt_logprobs=body.num_prompt_logprobs(),
        grammar=form[1] if form else None,
        allowed_token_ids=tuple(dict.fromkeys(allowed)),
        bad_words_ids=_words(body.bad_words or [], tokenizer),
        seed=body.seed,
        stop=tuple(stops),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        includes_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos or body.ignore_eos_token),
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _words(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, at a text's beginning and behind a space."""
    spellings = [spelling for word in words for spelling in (word, f" {word}")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in spellings))
