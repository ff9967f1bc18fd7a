"""Grammars -> which tokens may follow, through llguidance. Compiled beside the step, and kept for the next request.

A grammar that cannot be compiled, or grows beyond its bounds while it is followed, is its request's error alone.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.tiktoken import lltokenizer_from_encoding

from loraplex.engines.errors import GenerationFailed, InvalidRequest, ModelNotServable
from loraplex.engines.native.tokenizer_conversion import tokenizer_json
from loraplex.engines.protocol import Grammar
from loraplex.engines.tiktoken_codec import TiktokenCodec, find_tiktoken_file

_MAX_KEPT = 256
# A model left to itself may add white space for ever; this is enough to print with indentation.
_WHITESPACE = r"( |\n[ \t]{0,32})?"


class Constraint:
    """Implements `sequence.Constraint`: one answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped()

    def consume(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        return self._matcher.compute_ff_tokens()

    def num_admitted(self, token_ids: Sequence[int]) -> int:
        return self._matcher.validate_tokens(list(token_ids))

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        """Raises GenerationFailed where the grammar got out of hand."""
        matcher, found = self._matcher, []
        for place in range(len(drafts) + 1):
            found.append(matcher.compute_bitmask())
            if place < len(drafts):
                matcher.consume_token(drafts[place])
        if matcher.is_error():
            raise GenerationFailed(f"the grammar cannot be followed any further: {_in_short(matcher.get_error())}")
        matcher.rollback(len(drafts))
        return found


class Grammars:
    """Compiles each grammar once. `begin` early, `constraint` once `is_ready`."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._limits = LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")

    @property
    def is_compiling(self) -> bool:
        return any(not future.done() for future in self._compiled.values())

    def begin(self, grammar: Grammar) -> None:
        """Compile it, if that was not begun before."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._executor.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)
        for other in [known for known, future in self._compiled.items() if future.done()][:-_MAX_KEPT]:
            del self._compiled[other]

    def is_ready(self, grammar: Grammar) -> bool:
        self.begin(grammar)
        return self._compiled[grammar].done()

    def constraint(self, grammar: Grammar) -> Constraint:
        """At the grammar's beginning. Raises InvalidRequest where it could not be compiled."""
        return Constraint(self._compiled[grammar].result().deep_copy())

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        path, ends = self._directory / "tokenizer.json", self._eos_token_ids or None
        if path.is_file():
            return LLTokenizer(str(path), n_vocab=self._vocab_size, eos_token=ends)
        if (tiktoken_file := find_tiktoken_file(self._directory)) is not None:
            config = self._directory / "tokenizer_config.json"
            codec = TiktokenCodec(tiktoken_file, json.loads(config.read_text()) if config.is_file() else {})
            return lltokenizer_from_encoding(codec.encoding, n_vocab=self._vocab_size, eos_token=ends or [])
        try:
            return LLTokenizer(tokenizer_json(self._directory), n_vocab=self._vocab_size, eos_token=ends)
        except ModelNotServable as error:
            raise InvalidRequest(f"grammars are not served for this model: {error}", "grammar") from error

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = match(grammar, self._tokenizer, self._limits)
        matcher.compute_bitmask()  # what a first mask computes is kept for all copies
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return matcher


def match(grammar: Grammar, tokenizer: LLTokenizer, limits: LLParserLimits | None = None) -> LLMatcher:
    """A matcher at the grammar's beginning. Raises InvalidRequest where it cannot be compiled."""
    try:
        source = _COMPILERS[grammar.kind](grammar.source)
    except Exception as error:
        raise _refusal(grammar, str(error)) from error
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())
    return matcher


def _json_schema(source: str) -> str:
    return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": _WHITESPACE})


def _choice(source: str) -> str:
    choices = json.loads(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ValueError("the choices must be strings that are not empty, one at least")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices))


def _gbnf(source: str) -> str:
    return LLMatcher.grammar_from_lark(gbnf_to_lark(source))


_COMPILERS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _choice,
    "lark": LLMatcher.grammar_from_lark,
    "gbnf": _gbnf,
}


def _refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    return InvalidRequest(f"the {grammar.kind.replace('_', ' ')} cannot be used: {_in_short(reason)}", "grammar")


def _in_short(reason: str) -> str:
    return " ".join(reason.split())[:500]
