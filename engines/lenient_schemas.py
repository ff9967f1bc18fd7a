"""JSON schemas that say `lenient` of themselves: what no grammar can say of them is left out, here their patterns.

llguidance leaves out keywords that it does not know, and refuses expressions that it does not.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher

_IN_LARK = re.compile(r"(?<=%json )\{.*\}$", re.MULTILINE)
_VALUES = frozenset({"const", "enum", "default", "examples"})  # what stands there is no schema


def without_foreign_patterns(source: str) -> str:
    """A schema, or a Lark grammar with some, each on a line of its own, without what cannot be matched of lenient ones.

    What is no JSON, and what is not lenient, is left as it is.
    """
    if source.startswith("{"):
        return _cleaned(source)
    return _IN_LARK.sub(lambda found: _cleaned(found[0]), source)


def _cleaned(source: str) -> str:
    try:
        schema = json.loads(source)
    except ValueError:
        return source
    guidance = schema.get("x-guidance")
    if not (isinstance(guidance, dict) and guidance.get("lenient") is True):
        return source
    return json.dumps(_without(schema), ensure_ascii=False)


def _without(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "pattern" and isinstance(value, str):
            if _can_match(value):
                kept[name] = value
        elif name == "patternProperties" and isinstance(value, dict):
            kept[name] = {pattern: _without(part) for pattern, part in value.items() if _can_match(pattern)}
            if len(kept[name]) < len(value):
                kept["additionalProperties"] = True  # it admits what those would
        elif name not in kept:
            kept[name] = value if name in _VALUES else _without(value)
    return kept


def _can_match(pattern: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    return not LLMatcher.validate_grammar(grammar)
