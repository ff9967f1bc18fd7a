"""One request inside the engine: its tokens so far, and how many of them the KV cache holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from loraplex.engines.native.blocks import next_key, root_key, switched_key
from loraplex.engines.native.pooling import Pool
from loraplex.engines.protocol import FinishReason, GenerateRequest, TokenLogprobs


class Constraint(Protocol):
    """What may follow in one answer, token by token."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow but the end."""
        ...

    def consume(self, token_id: int) -> None:
        """The answer has one more token, an admitted one. Raises InvalidRequest where nothing is known behind it."""
        ...

    def forced(self) -> list[int]:
        """The tokens that most likely follow because their text must."""
        ...

    def num_admitted(self, token_ids: SequenceOf[int]) -> int:
        """How many of these may follow, in this order."""
        ...

    def masks(self, drafts: SequenceOf[int]) -> list[bytes]:
        """One bit for each token id, lowest first, that may follow; then the same behind each draft.

        Raises InvalidRequest.
        """
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """`token_ids` is prompt then answer; keys and values of the first `num_computed` of them are in `block_table`.

    `num_cached_tokens` of the prompt were found in the prefix cache at the first admission, and `queue_seconds` had
    passed since its arrival; None before. Its adapters, `adapter_ids`, are active from the positions `starts` on (an
    activated LoRA from its invocation); what lies before is the base's. `prompt_logprobs`, where asked for, are those
    of the prompt's tokens from the second on, as far as computed.
    `end_token_ids` are all that may end it.
    With a grammar it waits for its `constraint`. With a `pool` it is there for an embedding: it never samples, and is
    over when the pool has all it needs.
    A preempted sequence keeps its tokens and loses its blocks: it is prefilled again, and nothing is emitted twice.
    """

    request: GenerateRequest
    seed: int
    eos_token_ids: frozenset[int]
    arrival: float
    max_len: int
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    starts: tuple[int, ...] = field(init=False)
    adapter_ids: tuple[str, ...] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    constraint: Constraint | None = None
    pool: Pool | None = None
    end_token_ids: frozenset[int] = field(init=False)
    _stop_token_ids: frozenset[int] = field(init=False)
    _keys: list[bytes] = field(default_factory=list)
    _parts: tuple[tuple[str, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self._parts = tuple((part.adapter.id, part.weight) for part in self.request.parts)
        self.adapter_ids = tuple(adapter_id for adapter_id, _ in self._parts)
        self.starts = (0,) * len(self._parts)
        self._stop_token_ids = frozenset(self.request.sampling.stop_token_ids)
        self.end_token_ids = self.eos_token_ids | self._stop_token_ids

    @property
    def was_admitted(self) -> bool:
        return self.queue_seconds is not None

    def block_keys(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The prefix-cache keys of the first `num_blocks` blocks, which must be full of known tokens."""
        for block in range(len(self._keys), num_blocks):
            before = self._keys[-1] if self._keys else root_key(self._active_name(0, 1), *self._cache_scope)
            if begins := self._active_name(max(block * block_size, 1), (block + 1) * block_size):
                before = switched_key(before, begins)
            self._keys.append(next_key(before, self.token_ids[block * block_size : (block + 1) * block_size]))
        return self._keys[:num_blocks]

    def _active_name(self, begin: int, end: int) -> str | None:
        """The adapters that become active at the positions begin … end − 1, as a cache's key knows them."""
        names = [
            f"{part.adapter.id}*{part.weight!r}@{start}" if start or part.weight != 1.0 or len(self.starts) > 1
            else part.adapter.id
            for part, start in zip(self.request.parts, self.starts, strict=True) if begin <= start < end
        ]  # fmt: skip
        return "+".join(names) or None

    def adapters_at(self, position: int) -> tuple[tuple[str, float], ...]:
        """(adapter id, weight) of those active at a position."""
        if position >= max(self.starts, default=0):
            return self._parts
        return tuple(part for part, start in zip(self._parts, self.starts, strict=True) if start <= position)

    @property
    def _cache_scope(self) -> tuple[str, ...]:
        request = self.request
        return (request.cache_salt,) if request.shares_prefixes else (request.cache_salt, request.tenant)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_ready(self) -> bool:
        """Whether all is there that it needs besides its adapters."""
        return self.constraint is not None or self.request.sampling.grammar is None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> FinishReason | None:
        """Take one sampled token; the reason to finish, if it gives one. Raises what its constraint raises."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        sampling = self.request.sampling
        is_eos = token_id in self.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in self._stop_token_ids:
            return "stop"
        if self.constraint is not None:
            self.constraint.consume(token_id)
            if self.constraint.is_over:
                return "stop"
        if self.num_generated >= sampling.max_tokens or len(self.token_ids) >= self.max_len:
            return "length"
        return None
