"""Grammars -> which tokens may follow, through llguidance. Compiled beside the step, and kept for the next request.

A grammar that cannot be compiled, breaks its compiler, or grows beyond its bounds while it is followed, is the error of
its request alone. So is every grammar where llguidance cannot take the model's tokenizer.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue

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
    """Compiles each grammar once. Whoever began one awaits it, until `ready` tells it or nobody wants it any more.

    What is awaited is never evicted, so that nothing is compiled again for the same request.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._awaited: dict[Grammar, Future[LLMatcher]] = {}
        self._ended: SimpleQueue[tuple[Grammar, Future[LLMatcher]]] = SimpleQueue()  # of the awaited, by any thread
        self._kept: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()  # compiled ones, oldest first
        self._num_kept_characters = 0
        self._trial = GrammarTrial(_NUM_THREADS)
        self._threads = FairThreads(_NUM_THREADS, 1, "grammar")

    @property
    def is_compiling(self) -> bool:
        """Whether `ready` has something to tell, now or later."""
        return bool(self._awaited)

    def begin(self, grammar: Grammar, tenant: str = "") -> None:
        """Compile it when it is the tenant's turn, if that was not begun before."""
        if grammar in self._awaited:
            return
        if grammar in self._kept:
            future = self._kept.pop(grammar)
            self._num_kept_characters -= len(grammar.source)
        else:
            future = self._threads.submit(tenant, partial(self._compile, grammar))
        self._awaited[grammar] = future
        future.add_done_callback(lambda ended: self._ended.put((grammar, ended)))

    def give_up(self, grammar: Grammar) -> None:
        """Nobody waits for it any more: if its compiling was not begun, it never is."""
        if grammar in self._awaited and self._awaited[grammar].cancel():
            del self._awaited[grammar]

    def ready(self) -> Iterator[Grammar]:
        """Those awaited that have been compiled since, or could not be; each has its `constraint` until the next."""
        while not self._ended.empty():
            grammar, future = self._ended.get()
            if not future.cancelled():
                del self._awaited[grammar]
                self._keep(grammar, future)
                yield grammar

    def _keep(self, grammar: Grammar, future: Future[LLMatcher]) -> None:
        self._kept[grammar] = future
        self._num_kept_characters += len(grammar.source)
        while len(self._kept) > 1 and (len(self._kept) > _MAX_KEPT or self._num_kept_characters > _MAX_KEPT_CHARACTERS):
            oldest, _ = self._kept.popitem(last=False)
            self._num_kept_characters -= len(oldest.source)

    def constraint(self, grammar: Grammar, own_ends: Sequence[int] = ()) -> Constraint:
        """At the grammar's beginning; where it may end, so it may with `own_ends`, which are the answer's alone.

        Raises InvalidRequest where it could not be compiled.
        """
        matcher = self._kept[grammar].result().deep_copy()
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
