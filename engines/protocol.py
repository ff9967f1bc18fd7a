"""What the gateway may ask of an engine, and in which words.

Every message is a frozen msgspec Struct, so the same objects cross a process, a machine or a test unchanged.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol, TypeAlias

import msgspec

from loraplex.engines.stats import EngineStats
from loraplex.engines.tokenizer_protocol import Tokenizer

FinishReason = Literal["stop", "length"]
StopReason: TypeAlias = str | int | None  # the stop string, or the id of the stop token, that a request named itself
Variant = Literal["lora", "rslora", "dora"]
Pooling = Literal["mean", "last", "cls"]
HealthState = Literal["starting", "ready", "restarting", "draining", "failed"]


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one adapter, as PEFT files on this machine.

    `id` is the content hash of the files and the only identity any tier or cache keys on; `name` is for people
    and figures; `path` is a directory with `adapter_config.json` and `adapter_model.safetensors`.
    """

    id: str
    name: str
    path: str


class WeightedAdapter(msgspec.Struct, frozen=True):
    """One part of a composition: what the adapter adds to each layer, times `weight`."""

    adapter: Adapter
    weight: float


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine read off a valid adapter. `num_bytes` is what it occupies on the device."""

    adapter_id: str
    rank: int
    variant: Variant
    target_modules: tuple[str, ...]
    num_modules: int
    num_parameters: int
    num_bytes: int


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """How many requests of one tenant name an adapter by one name; several names may mean the same content."""

    tenant: str
    name: str
    num_requests: int


class AdapterResidency(msgspec.Struct, frozen=True, kw_only=True):
    """Where one adapter is right now. `num_requests` name it, `num_running` of them run, the others wait.

    `uses` says whose requests these are.
    """

    adapter_id: str
    name: str
    tier: Literal["disk", "host", "device"]
    pinned: bool
    num_bytes: int
    num_requests: int
    num_running: int = 0
    uses: tuple[AdapterUse, ...] = ()


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must look like: the text of a JSON schema, a regular expression, a Lark or GBNF grammar.

    A `choice` is one of several strings; its source is a JSON array of them.
    """

    kind: Literal["json_schema", "regex", "choice", "lark", "gbnf"]
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` switch the filter off.

    The filters apply in the order of transformers' logits processors: temperature, top-k, top-p, min-p, typical-p.
    `repetition_penalty` (1: off) regards prompt and answer; `presence_penalty` and `frequency_penalty` (0: off), as
    OpenAI defines them, the answer; `logit_bias` maps token ids to what is added to their logits.
    `num_logprobs` asks for each token's log-probability under the model's own distribution, before any control, and
    for those of that many likeliest tokens beside it; None asks for nothing.
    `num_prompt_logprobs` asks the same for the tokens of the prompt. `grammar` admits only tokens that continue a text
    of that form; `bad_words_ids` are token sequences that never appear in the answer; `allowed_token_ids`, where there
    are any, are all that may.
    With `seed`, the same request draws the same tokens whatever shares its batch.
    `stop` strings and `stop_token_ids` end generation behind the first `min_tokens`, and are no part of the text unless
    it `includes_stop`; `end_token_ids` are ends of sequence beside the model's own. Where a `grammar` admits nothing
    else, neither `min_tokens` nor `ignore_eos` puts an end off. Special tokens leave no text unless
    `skip_special_tokens` is off.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    includes_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What every request may be computed with: one adapter, or a composition of several."""

    adapter: Adapter | None = None
    composition: tuple[WeightedAdapter, ...] = ()

    @property
    def parts(self) -> tuple[WeightedAdapter, ...]:
        """Its adapters, however it names them."""
        return (WeightedAdapter(self.adapter, 1.0),) if self.adapter is not None else self.composition


class GenerateRequest(_Request, frozen=True, kw_only=True):
    """One generation. `request_id` is unique among the requests in flight.

    `tenant` has a fair share of the engine in proportion to `weight`; among its own requests those of higher
    `priority` go first; one that `is_background` waits until no other request of any tenant does, and makes way for
    it. The prefix cache is the tenant's own, or that of all who say `shares_prefixes`; `cache_salt`
    sets a part of it aside. After `timeout_seconds` the request ends with DeadlineExceeded, wherever it is.
    It is computed with `adapter`, or with a `composition` of several: every layer adds the weighted sum of what theirs
    add.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    is_background: bool = False
    shares_prefixes: bool = False
    cache_salt: str = ""
    timeout_seconds: float | None = None


class EmbedRequest(_Request, frozen=True, kw_only=True):
    """One text to be made a vector: its final hidden states, pooled. The fields it shares are those of a generation.

    `mean` is that of all tokens' hidden states, `last` that of the last token, `cls` that of the first; with
    `normalize` the vector is divided by its Euclidean length.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    pooling: Pooling = "mean"
    normalize: bool = True
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    is_background: bool = False
    timeout_seconds: float | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one request. `num_cached_tokens` of its prompt came from the prefix cache."""

    request_id: str
    values: tuple[float, ...]
    num_cached_tokens: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities: of the token taken, and of the likeliest ones, most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Some tokens of one request, in order; the last event of a request alone carries a `finish_reason`.

    `text` is what these tokens add to the answer: whole UTF-8 characters, stop strings removed; it may be empty
    while a character or a possible stop string is incomplete: `num_held` characters of the text so far wait for what
    follows. `token_ids` counts every token generated, the one that `is_end` included: it ended the answer, and what
    text comes with it was held back before. `stop_reason` is what ended it, where the request named that. `step` is the
    number of the engine step that made the last of them. `num_cached_tokens` of the prompt came from the prefix cache;
    `queue_seconds` passed until a step took the request up. `logprobs`, if asked for, has one entry a token;
    `prompt_logprobs`, on a request's first event, one a token of the prompt, None for its first.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    step: int
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    is_end: bool = False
    num_held: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request that leaves these open is sampled with, as the model's makers recommend."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves. Lengths are tokens, `kv_block_size` tokens a block.

    `embedding_width` is the length of an embedding, 0 where the model gives none.
    """

    engine: str
    base_model: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_parameters: int
    kv_block_size: int
    num_kv_blocks: int
    embedding_width: int = 0
    sampling_defaults: SamplingDefaults = SamplingDefaults()


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state and, where it is not ready, the reason in words."""

    state: HealthState
    detail: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a start-up; `fraction` runs from 0 to 1."""

    stage: str
    fraction: float


class Engine(Protocol):
    """A serving engine for one base model and any number of adapters."""

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Load the base model. Raises ModelNotServable with the reason."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    async def tokenizer_of(self, adapter: Adapter | None) -> Tokenizer:
        """What requests for an adapter are said in: the tokenizer and template that it ships, else the base's.

        Raises AdapterError where what it ships cannot be used beside the base, EngineUnavailable before `start`.
        """
        ...

    def info(self) -> EngineInfo:
        """What is served; valid after `start`."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """The tokens of one request. Closing or cancelling the iterator aborts the request.

        One of `engines.events` also hands each event over in the moment it is made.
        Raises InvalidRequest, EngineUnavailable or EngineOverloaded before the first event; EngineDied,
        AdapterError, DeadlineExceeded or GenerationFailed at any time.
        """
        ...

    async def embed(self, request: EmbedRequest) -> Embedding:
        """The pooled hidden states of one text, computed beside the generations. Cancelling aborts the request.

        Raises what `generate` raises; InvalidRequest also where the model gives no embeddings.
        """
        ...

    async def inspect(self, adapter: Adapter) -> AdapterCard:
        """Check an adapter against the base without loading it for anyone. Raises AdapterError."""
        ...

    async def load(self, adapter: Adapter) -> None:
        """Bring an adapter to the device ahead of its first request.

        Raises AdapterError, at once NoRoomBesidePins where pins leave too little for it.
        """
        ...

    async def unload(self, adapter_id: str) -> None:
        """Drop an adapter from host and device. Raises AdapterInUse while requests name it."""
        ...

    async def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        """Keep an adapter on the device, or stop doing so; that needs its `id` alone. Raises what `load` does."""
        ...

    async def residency(self) -> list[AdapterResidency]:
        """Every adapter the engine knows of."""
        ...

    async def stats(self) -> EngineStats: ...

    def health(self) -> Health: ...

    async def reload(self) -> EngineInfo:
        """Load the base model anew beside the one in use, then change over; streams in flight finish where they are.

        Raises ModelNotServable, and then nothing has changed.
        """
        ...

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let those in flight finish for up to `drain_seconds`, then stop."""
        ...
