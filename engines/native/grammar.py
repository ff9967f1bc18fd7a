"""Grammars -> which tokens may follow, through llguidance. Compiled beside the step, and kept for the next request.

A grammar that cannot be compiled, breaks its compiler, or grows beyond its bounds while it is followed, is the error of
its request alone. So is every grammar where llguidance cannot take the model's tokenizer.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.fair_threads import FairThreads
from loraplex.engines.grammar_trial import GrammarTrial
from loraplex.engines.matching import in_short, match, refusal
from loraplex.engines.native.tokenizer_conversion import tokenizer_json
from loraplex.engines.protocol import Grammar
from loraplex.engines.tiktoken_codec import TiktokenCodec, find_tiktoken_file

_MAX_SECONDS = 1.0  # of computing that one answer may be behind
_MASK_SECONDS = 0.005  # that each search makes up for; usual ones take less than a millisecond
_NUM_THREADS = 2  # that compile; a tenant has one at a time
_MAX_KEPT = 256  # grammars, and characters of their sources: what one takes grows with them
_MAX_KEPT_CHARACTERS = 2**20


class Constraint:
    """Implements `sequence.Constraint`: one answer's place in its grammar.

    A tokenizer may have tokens beyond the model's `vocab_size`: masks may have bits of them, which say nothing. Where
    one of `eos_token_ids` is admitted, so are `own_ends`, which the matcher does not know.

    What an ambiguous grammar costs shows only while it is followed, so the computing is timed: a request that uses up
    what a long answer takes many times over fails, and no neighbour's step waits for it again.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int] = (), own_ends: Sequence[int] = ()
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._own_ends = own_ends
        self._seconds_left = _MAX_SECONDS

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped()

    def consume(self, token_id: int) -> None:
        with self._timed():
            is_consumed = self._matcher.consume_token(token_id)
        if not is_consumed:  # it counts as stopped from then on, as at its proper end
            raise self._failure(self._matcher.get_error())

    def forced(self) -> list[int]:
        with self._timed():
            found = self._matcher.compute_ff_tokens()
        return list(takewhile(lambda token_id: token_id < self._vocab_size, found))

    def num_admitted(self, token_ids: Sequence[int]) -> int:
        if self._seconds_left < _MAX_SECONDS / 2:
            return 0  # each would be one search more in the same step
        with self._timed():
            return self._matcher.validate_tokens(list(token_ids))

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        """Raises InvalidRequest where the grammar got out of hand."""
        if self._seconds_left < 0:
            raise self._failure(f"it took more than {_MAX_SECONDS:g} s to find what may come next")
        with self._timed():
            found = self._masks(drafts)
        self._seconds_left = min(self._seconds_left + _MASK_SECONDS * len(found), _MAX_SECONDS)
        return [self._ended(mask) for mask in found] if self._own_ends else found

    def _masks(self, drafts: Sequence[int]) -> list[bytes]:
        matcher, found, num_consumed = self._matcher, [], 0
        for draft in drafts:
            found.append(matcher.compute_bitmask())
            if not matcher.is_stopped():  # the end token behind the grammar's end would not be rolled back
                matcher.consume_token(draft)
                num_consumed += 1
        found.append(matcher.compute_bitmask())
        if matcher.is_error() or not matcher.rollback(num_consumed):
            raise self._failure(matcher.get_error())
        return found

    def _ended(self, mask: bytes) -> bytes:
        if not any(mask[end // 8] >> end % 8 & 1 for end in self._eos_token_ids):
            return mask
        ended = bytearray(mask)
        for end in self._own_ends:
            ended[end // 8] |= 1 << end % 8
        return bytes(ended)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self._seconds_left -= time.thread_time() - began

    def _failure(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"the grammar cannot be followed any further: {in_short(reason)}", "grammar")


class Grammars:
    """Compiles each grammar once. `begin` early, `constraint` once `is_ready`."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._trial = GrammarTrial(_NUM_THREADS)
        self._threads = FairThreads(_NUM_THREADS, 1, "grammar")

    @property
    def is_compiling(self) -> bool:
        return any(not future.done() for future in self._compiled.values())

    def begin(self, grammar: Grammar, tenant: str = "") -> None:
        """Compile it when it is the tenant's turn, if that was not begun before."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._threads.submit(tenant, partial(self._compile, grammar))
        self._compiled.move_to_end(grammar)
        num_kept = num_characters = 0
        for known in [known for known, future in reversed(self._compiled.items()) if future.done()]:
            num_kept, num_characters = num_kept + 1, num_characters + len(known.source)
            if known != grammar and (num_kept > _MAX_KEPT or num_characters > _MAX_KEPT_CHARACTERS):
                del self._compiled[known]

    def forget_all_but(self, wanted: Iterable[Grammar | None]) -> None:
        """Nobody waits for others any more: those that were not begun to be compiled never are."""
        kept = {*wanted}
        for known in [known for known in self._compiled if known not in kept]:
            if self._compiled[known].cancel():
                del self._compiled[known]

    def is_ready(self, grammar: Grammar, tenant: str = "") -> bool:
        self.begin(grammar, tenant)
        return self._compiled[grammar].done()

    def constraint(self, grammar: Grammar, own_ends: Sequence[int] = ()) -> Constraint:
        """At the grammar's beginning; where it may end, so it may with `own_ends`, which are the answer's alone.

        Raises InvalidRequest where it could not be compiled.
        """
        matcher = self._compiled[grammar].result().deep_copy()
        return Constraint(matcher, self._vocab_size, self._eos_token_ids, own_ends)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            return self._read_tokenizer(self._vocab_size)
        except ValueError:  # as where it has more tokens than the model
            return self._read_tokenizer(None)

    def _read_tokenizer(self, num_tokens: int | None) -> LLTokenizer:
        """With so many tokens, or its own number. Raises ValueError, or ModelNotServable where there is none."""
        path, ends = self._directory / "tokenizer.json", self._eos_token_ids or None
        if path.is_file():
            return LLTokenizer(str(path), n_vocab=num_tokens, eos_token=ends)
        if (tiktoken_file := find_tiktoken_file(self._directory)) is not None:
            config = self._directory / "tokenizer_config.json"
            codec = TiktokenCodec(tiktoken_file, json.loads(config.read_text()) if config.is_file() else {})
            return lltokenizer_from_encoding(codec.encoding, n_vocab=num_tokens, eos_token=ends or [])
        return LLTokenizer(tokenizer_json(self._directory), n_vocab=num_tokens, eos_token=ends)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """Raises InvalidRequest, whatever foreign code fails with: in Rust it may panic, which is no Exception."""
        try:
            tokenizer = self._tokenizer
        except BaseException as error:
            reason = in_short(str(error))
            raise InvalidRequest(f"grammars are not served for this model: {reason}", "grammar") from error
        self._trial.check(grammar)
        try:
            matcher = match(grammar, tokenizer)
            matcher.compute_bitmask()  # what a first mask computes is kept for all copies
        except InvalidRequest:
            raise
        except BaseException as error:
            raise refusal(grammar, str(error)) from error
        if matcher.is_error():
            raise refusal(grammar, matcher.get_error())
        return matcher
