"""What no grammar can say of a lenient schema is left out of it, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from loraplex.engines.errors import InvalidRequest
from loraplex.engines.lenient_schemas import without_foreign_patterns
from loraplex.engines.matching import match
from loraplex.engines.protocol import Grammar

LENIENT = {"x-guidance": {"lenient": True}}
LOOKS = "^(?!x)[a-z]{3}$"
BYTES = LLTokenizer("byte")


def admits(schema: dict[str, Any] | str, text: str, *, in_lark: bool) -> bool:
    source = schema if isinstance(schema, str) else json.dumps(schema)
    grammar = Grammar(kind="json_schema", source=source)
    if in_lark:
        grammar = Grammar(kind="lark", source=f'start: "<" body ">"\nbody: %json {source}\nother: "x"')
        text = f"<{text}>"
    matcher = match(grammar, BYTES)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


@pytest.mark.parametrize("in_lark", [False, True], ids=["schema", "lark"])
@pytest.mark.parametrize("pattern", [LOOKS, r"\bx", r"(a)\1"], ids=["look ahead", "boundary", "reference"])
def test_pattern_that_cannot_be_matched_is_left_out_where_the_schema_is_lenient(pattern: str, in_lark: bool) -> None:
    fields = {
        "a": {"type": "string", "pattern": pattern, "maxLength": 4},
        "b": {"pattern": "^[0-9]+$", "type": "string"},
    }
    schema = {"type": "object", "properties": fields, "required": ["a", "b"], "additionalProperties": False}
    with pytest.raises(InvalidRequest, match="cannot be used"):
        admits(schema, "", in_lark=in_lark)
    lenient = {**schema, **LENIENT}
    assert admits(lenient, '{"a":"xyz","b":"12"}', in_lark=in_lark)
    assert not admits(lenient, '{"a":"xyz","b":"no"}', in_lark=in_lark)
    assert not admits(lenient, '{"a":"xyzzy","b":"12"}', in_lark=in_lark)


def test_properties_of_a_foreign_pattern_may_be_any() -> None:
    schema = {"type": "object", "patternProperties": {"^(?!a)": {"type": "null"}, "^n": {"type": "number"}},
              "additionalProperties": False, **LENIENT}  # fmt: skip
    assert admits(schema, '{"b":"text"}', in_lark=False)
    assert not admits(schema, '{"n":"text"}', in_lark=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"pattern": {"type": "string"}}, **LENIENT},
        {"const": {"pattern": LOOKS}, "enum": [{"pattern": LOOKS}], "default": {"pattern": LOOKS}, **LENIENT},
        {"items": [{"pattern": "^a+$"}, True], "patternProperties": {"^a": {"type": "null"}}, **LENIENT},
    ],
    ids=["property of that name", "values", "usual patterns"],
)
def test_what_is_no_foreign_pattern_stays(schema: dict[str, Any]) -> None:
    assert json.loads(without_foreign_patterns(json.dumps(schema))) == schema


@pytest.mark.parametrize("source", [json.dumps({"pattern": LOOKS}), "{", "[1]", "start: x", "(?!a)"], ids=str)
def test_what_is_not_lenient_stays_as_it_is(source: str) -> None:
    assert without_foreign_patterns(source) == source


def test_boolean_schema_admits_anything() -> None:
    for text in ("1", '"a"', '{"a":[null]}'):
        assert admits("true", text, in_lark=False)
