"""A grammar in any of its forms -> what follows a text token by token, by llguidance. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.lenient_schemas import without_foreign_patterns
from loraplex.engines.protocol import Grammar

# Larger ones take seconds to compile. OpenAI takes schemas of 120,000 characters.
MAX_SOURCE_CHARACTERS = 256 * 1024
# A model left to itself may add white space for ever; this is enough to print with indentation.
# What one token's search may look at. Usual grammars stay far below; ambiguous ones, where every step doubles, do not.
_LIMITS = LLParserLimits(verbose_errors=False, step_max_items=10_000)
_WHITESPACE = r"( |\n[ \t]{0,32})?"


def match(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the grammar's beginning. Raises InvalidRequest where it cannot be compiled."""
    if len(grammar.source) > MAX_SOURCE_CHARACTERS:
        raise refusal(grammar, f"it has {len(grammar.source)} characters, and may have {MAX_SOURCE_CHARACTERS}")
    try:
        matcher = _matcher(grammar, grammar.source, tokenizer)
        if matcher.is_error() and (rest := without_foreign_patterns(grammar.source)) != grammar.source:
            matcher = _matcher(grammar, rest, tokenizer)
    except Exception as error:
        raise refusal(grammar, str(error)) from error
    if matcher.is_error():
        raise refusal(grammar, matcher.get_error())
    return matcher


def _matcher(grammar: Grammar, source: str, tokenizer: LLTokenizer) -> LLMatcher:
    return LLMatcher(tokenizer, _COMPILERS[grammar.kind](source), log_level=0, limits=_LIMITS)


def _json_schema(source: str) -> str:
    schema = json.loads(source)
    if schema is True:
        source = "{}"
    elif not isinstance(schema, dict):
        raise ValueError("a schema is an object, or true")
    return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": _WHITESPACE})


def _choice(source: str) -> str:
    choices = json.loads(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ValueError("the choices must be strings that are not empty, one at least")
    literals = [json.dumps(one, ensure_ascii=False).replace("\x7f", r"\u007f") for one in choices]
    # all of them as one terminal: as alternatives of a rule each of a thousand is followed by itself
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(literals))


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
    """On one line, without advice about what only llguidance's callers can set."""
    return " ".join(reason.split()).replace(" Enable 'coerce_one_of' option to approximate oneOf with anyOf", "")[:500]
