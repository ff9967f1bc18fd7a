"""Fifty JSON schemas: nested, enums, formats, recursion, bounds, alternatives."""

from __future__ import annotations

from typing import Any


def _object(properties: dict[str, Any], *, required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


_WORD = {"type": "string", "pattern": "^[a-z]{1,6}$"}
_POINT = _object({"x": {"type": "integer"}, "y": {"type": "integer"}})

SCHEMAS: dict[str, Any] = {
    "string": {"type": "string", "maxLength": 12},
    "string-bounds": {"type": "string", "minLength": 3, "maxLength": 5},
    "string-pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "integer": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "integer-exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 11},
    "integer-multiple": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 7},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "const": {"const": "only this"},
    "const-number": {"const": 42},
    "const-object": {"const": {"a": [1, None, True]}},
    "enum-strings": {"enum": ["red", "green", "blue"]},
    "enum-mixed": {"enum": ["one", 2, None, False, {"three": 3}]},
    "enum-unicode": {"enum": ["grün", "赤", "🟦", 'a "quoted" one', "back\\slash\n"]},
    "types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9},
    "array": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
    "array-bounds": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3},
    "array-empty": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [_WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "tuple-and-rest": {
        "type": "array", "prefixItems": [_WORD], "items": {"type": "null"}, "minItems": 1, "maxItems": 3,
    },
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "object": _object({"name": _WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    "object-empty": _object({}),
    "object-optional": _object({"name": _WORD, "nick": _WORD, "title": _WORD}, required=["name"]),
    "object-all-optional": _object({"a": {"type": "null"}, "b": {"type": "boolean"}}, required=[]),
    "object-odd-names": _object({"a b": {"type": "null"}, "ü": {"type": "null"}, 'q"': {"type": "null"}, "": _WORD}),
    "object-any": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "nested": _object({"a": _object({"b": _object({"c": _object({"d": {"type": "boolean"}})})})}),
    "nested-arrays": _object({"points": {"type": "array", "items": _POINT, "minItems": 1, "maxItems": 2}}),
    "nullable-object": {"anyOf": [_POINT, {"type": "null"}]},
    "any-of": {"anyOf": [_object({"kind": {"const": "a"}, "a": _WORD}), _object({"kind": {"const": "b"}})]},
    "any-of-scalars": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 5}]},
    "all-of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "reference": {"$ref": "#/$defs/point", "$defs": {"point": _POINT}},
    "references": {"$defs": {"w": _WORD}, **_object({"first": {"$ref": "#/$defs/w"}, "last": {"$ref": "#/$defs/w"}})},
    "definitions": {"definitions": {"w": _WORD}, **_object({"one": {"$ref": "#/definitions/w"}})},
    "recursive-list": {
        "$defs": {"node": _object({"value": _WORD, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})},
        "$ref": "#/$defs/node",
    },
    "recursive-tree": {
        "$defs": {
            "tree": _object(
                {
                    "leaf": {"type": "boolean"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                }
            )
        },
        "$ref": "#/$defs/tree",
    },
    "recursive-mutual": {
        "$defs": {
            "even": _object({"odd": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/odd"}]}}),
            "odd": _object({"even": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/even"}]}}),
        },
        "$ref": "#/$defs/even",
    },
    "format-date": {"type": "string", "format": "date"},
    "format-time": {"type": "string", "format": "time"},
    "format-date-time": {"type": "string", "format": "date-time"},
    "format-uuid": {"type": "string", "format": "uuid"},
    "format-ipv4": {"type": "string", "format": "ipv4"},
    "format-email": _object({"mail": {"type": "string", "format": "email"}}),
    "format-hostname": {"type": "string", "format": "hostname"},
    "openai-strict": _object(
        {
            "steps": {
                "type": "array", "maxItems": 2, "items": _object({"explanation": _WORD, "output": _WORD}),
            },
            "final_answer": _WORD,
        }
    ),
    "tool-call": _object(
        {"name": {"const": "get_weather"}, "arguments": _object({"city": _WORD, "unit": {"enum": ["c", "f"]}})}
    ),
    "described": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Person", "description": "Somebody.",
        **_object({"id": {"type": "integer", "minimum": 1, "maximum": 9, "description": "A number.", "default": 1}}),
    },
}  # fmt: skip
