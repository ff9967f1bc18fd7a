"""What chat completions and completions share: sampling fields, usage, and how the rest is refused."""

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import TokenEvent
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.middleware import is_request_id
from loraplex.gateway.openai.forms import FormFields

# JSON has no -inf; OpenAI's own answers say this instead.
LEAST_LOGPROB = -9999.0

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
MAX_STOP_CHARACTERS = 1000
_Stop = Annotated[str, msgspec.Meta(max_length=MAX_STOP_CHARACTERS)]
Stops = _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=16)]
_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# So many tokens of a prompt, the last ones; -1: what there is room for.
Truncation = Annotated[int, msgspec.Meta(ge=-1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`continuous_usage_stats` is vLLM's: with `include_usage`, each chunk tells the usage of its choice so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class AdapterPart(Struct, forbid_unknown_fields=True):
    """One adapter of a composition: what it adds to each layer counts `weight` times."""

    model: str
    weight: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 1.0


class GenerationFields(FormFields, forbid_unknown_fields=True, kw_only=True):
    """Fields that are honoured wherever text is generated.

    A route adds its own, and those it knows and does not offer: these may only have a value without effect, listed in
    `not_offered`. A field that is neither is refused by the decoder.
    """

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        # whichever it is, the form is kept
        "guided_decoding_backend": ("auto", "guidance", "lm-format-enforcer", "outlines", "xgrammar"),
        "ec_transfer_params": ({},),
        "guided_whitespace_pattern": (),
        "kv_transfer_params": ({},),
        "length_penalty": (1.0,),
        "logits_processors": ([],),
        "logprob_token_ids": ([],),
        "mm_payload": (),
        "priority": (0,),
        "prompt_embeds": (),
        "repetition_detection": (),
        "return_mm_kwargs": (False,),
        "return_prompt_text": (False,),
        "return_token_offsets": (False,),
        "routed_experts_prompt_start": (0,),
        "session_id": (),
        "spaces_between_special_tokens": (True,),
        "stream_interval": (1,),
        "thinking_token_budget": (),
        "truncation_side": ("left",),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        "watermarking": (),
    }

    model: str = ""
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    stop: Stops | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # said about a request, without effect on its answer
    user: str | None = None
    # common extensions
    adapter_source: str | None = None
    api_token: str | None = None
    adapters: Annotated[list[AdapterPart], msgspec.Meta(min_length=1, max_length=16)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Unit | None = None
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None  # LoRAX's name for the same
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: Natural | None = None
    allowed_token_ids: Annotated[list[int], msgspec.Meta(min_length=1)] | None = None
    bad_words: Annotated[list[_Word], msgspec.Meta(max_length=256)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    request_id: str | None = None
    truncate_prompt_tokens: Truncation | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # vLLM's, known, not offered
    ec_transfer_params: Raw | UnsetType = UNSET
    guided_decoding_backend: Raw | UnsetType = UNSET
    guided_whitespace_pattern: Raw | UnsetType = UNSET
    kv_transfer_params: Raw | UnsetType = UNSET
    length_penalty: Raw | UnsetType = UNSET
    logits_processors: Raw | UnsetType = UNSET
    logprob_token_ids: Raw | UnsetType = UNSET
    mm_payload: Raw | UnsetType = UNSET
    priority: Raw | UnsetType = UNSET
    prompt_embeds: Raw | UnsetType = UNSET
    repetition_detection: Raw | UnsetType = UNSET
    return_mm_kwargs: Raw | UnsetType = UNSET
    return_prompt_text: Raw | UnsetType = UNSET
    return_token_offsets: Raw | UnsetType = UNSET
    routed_experts_prompt_start: Raw | UnsetType = UNSET
    session_id: Raw | UnsetType = UNSET
    spaces_between_special_tokens: Raw | UnsetType = UNSET
    stream_interval: Raw | UnsetType = UNSET
    thinking_token_budget: Raw | UnsetType = UNSET
    truncation_side: Raw | UnsetType = UNSET
    use_beam_search: Raw | UnsetType = UNSET
    vllm_xargs: Raw | UnsetType = UNSET
    watermarking: Raw | UnsetType = UNSET

    def check(self) -> None:
        """Refuse what the types cannot. Raises UnsupportedParameter or MalformedRequest, naming the field."""
        refuse_what_matters(self, self.not_offered)
        if self.structured_outputs is not None:
            refuse_what_matters(self.structured_outputs, self.structured_outputs.not_offered, "structured_outputs.")
        if self.truncate_prompt_tokens == 0:
            raise MalformedRequest("It is -1, or a number of tokens from 1.", "truncate_prompt_tokens")
        if self.request_id is not None and not is_request_id(self.request_id):
            raise MalformedRequest("It has 1 to 128 letters, digits, dots, dashes and underscores.", "request_id")
        if self.prompt_logprobs is not None and self.stream:
            raise MalformedRequest("It is only told when stream is false.", "prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise MalformedRequest("stream_options is only allowed when stream is true.", "stream_options")

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell beside each; None where nothing is asked for."""
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def names_ends(self) -> bool:
        """Whether an answer may end for a reason that the request gives."""
        return bool(self.stop or self.stop_token_ids)

    @property
    def num_choices(self) -> int:
        """How many answers are generated for each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def running_usage(self) -> "RunningUsage | None":
        """What tells the usage in each chunk, where the request asks for that."""
        options = self.stream_options
        return RunningUsage() if options and options.include_usage and options.continuous_usage_stats else None


def refuse_what_matters(body: Struct, not_offered: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Fields that are known and not offered may be null or one of these values. Raises UnsupportedParameter."""
    for name, harmless in not_offered.items():
        raw = getattr(body, name)
        if raw is not UNSET and not _is_among(raw, (None, *harmless)):
            raise UnsupportedParameter(f"{prefix}{name} is not supported by this server.", f"{prefix}{name}")


def _is_among(raw: msgspec.Raw, values: tuple[Any, ...]) -> bool:
    """The decoder only skips over raw fields, so that broken UTF-8 or a number out of range shows here first."""
    try:
        return msgspec.json.decode(raw) in values
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    """`cached_tokens` of the prompt were found in the prefix cache. `reasoning_tokens` only models that reason have."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class RunningUsage:
    """Of each choice of a stream as far as it has come."""

    def __init__(self) -> None:
        self._num_made: Counter[int] = Counter()
        self._num_cached: Counter[int] = Counter()

    def saw(self, number: int, event: TokenEvent | None, num_prompt_tokens: int) -> Usage:
        """With this event; None where nothing has come."""
        if event is not None:
            self._num_made[number] += len(event.token_ids)
            self._num_cached[number] += event.num_cached_tokens
        made, details = self._num_made[number], PromptTokensDetails(self._num_cached[number])
        return Usage(num_prompt_tokens, made, num_prompt_tokens + made, details)
