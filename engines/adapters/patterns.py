"""Regular expressions of an adapter's config: PEFT matches them by `re`, which a hostile one can keep for ever.

They are matched by `regex` instead, which has a deadline. Patterns that the two packages read differently are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import regex

from loraplex.engines.adapters.safetensors_header import shown
from loraplex.engines.errors import AdapterInvalid

# How PEFT wraps what the config has, for `match`; a `{}` is where it stands.
WHOLE = r"(?:{})\Z"
ENDING = r"(.*\.)?({})$"
PARENT = r"(^|.*\.){}($|\..*)"
ANY_LAYERS = r".*?\.{}\.(?P<idx>\d+)\."
LAYERS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_MATCH_SECONDS = 0.1
_NO_PATTERN = (re.error, regex.error, RecursionError, OverflowError)
# An escape, a set, a quantifier in braces, or any other character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?|\{(?:\d+,?\d*|,\d+)\}|.", re.DOTALL)
# Within a set: a class such as [:alpha:], or what `re` warns of as operations on sets to come.
_SET_SYNTAX = re.compile(r"\[\[|\[:|--|&&|\|\||~~")


def check(field: str, pattern: str, wrapped: str = "{}") -> None:
    """Raises AdapterInvalid where it is no pattern to `re`, wrapped as PEFT does it, or another one to `regex`."""
    if odd := next(_ambiguous(pattern), None):
        raise AdapterInvalid(f"{field}: {shown(pattern)} has {shown(odd)}, which is not read alike everywhere")
    try:
        re.compile(wrapped.format(pattern))
        regex.compile(pattern)
    except _NO_PATTERN as error:
        raise AdapterInvalid(f"{field}: {shown(pattern)} is not a regular expression: {error}") from error


def _ambiguous(pattern: str) -> Iterator[str]:
    """Braces that are no quantifier, which `regex` takes for a number of errors to allow; operations on sets."""
    for token in (match[0] for match in _TOKEN.finditer(pattern)):
        if token == "{" or (token[0] == "[" and _SET_SYNTAX.search(token)):
            yield token


def match(wrapped: str, pattern: str, module: str) -> regex.Match[str] | None:
    """`re.match` that a hostile pattern can neither keep for ever nor keep others waiting by. Raises AdapterInvalid."""
    whole = wrapped.format(pattern)
    try:
        return regex.match(whole, module, timeout=_MATCH_SECONDS, concurrent=True)
    except _NO_PATTERN as error:  # what is one alone need not be one as a part of ours
        raise AdapterInvalid(f"the pattern {shown(whole)} is not a regular expression") from error
    except TimeoutError as error:
        raise AdapterInvalid(f"the pattern {shown(whole)} takes too long to match") from error
