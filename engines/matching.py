"""A grammar in any of its forms -> what follows a text token by token, by llguidance. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.protocol import Grammar

# Larger ones take seconds to compile. OpenAI takes schemas of 120,000 characters.
MAX_SOURCE_CHARACTERS = 256 * 1024
# A model left to itself may add white space for ever; this is enough to print with indentation.
_WHITESPACE = r"( |\n[ \t]{0,32})?"


def match(grammar: Grammar, tokenizer: LLTokenizer, limits: LLParserLimits | None = None) -> LLMatcher:
    """A matcher at the grammar's beginning. Raises InvalidRequest where it cannot be compiled."""
    if len(grammar.source) > MAX_SOURCE_CHARACTERS:
        raise refusal(grammar, f"it has {len(grammar.source)} characters, and may have {MAX_SOURCE_CHARACTERS}")
    try:
        source = _COMPILERS[grammar.kind](grammar.source)
    except Exception as error:
        raise refusal(grammar, str(error)) from error
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise refusal(grammar, matcher.get_error())
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


def refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    return InvalidRequest(f"the {grammar.kind.replace('_', ' ')} cannot be used: {in_short(reason)}", "grammar")


def in_short(reason: str) -> str:
    return " ".join(reason.split())[:500]
