"""What an answer must look like: OpenAI's `response_format` and vLLM's fields for the same, as one grammar."""

import json
from typing import Any, ClassVar, TypeAlias

from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.engines.protocol import Grammar
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.speech.call_grammars import LENIENT

Schema: TypeAlias = dict[str, Any]


class Text(Struct, forbid_unknown_fields=True, tag="text"):
    """Any text."""


class JsonObject(Struct, forbid_unknown_fields=True, tag="json_object"):
    """Any JSON object, or as LoRAX has it one of a `schema`."""

    schema: Schema | str | UnsetType | None = UNSET


class NamedSchema(Struct, forbid_unknown_fields=True):
    """An answer is always of the schema; only one that is `strict` must be possible to keep to the letter.

    `name` and `description` are for people.
    """

    name: str
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Struct, forbid_unknown_fields=True, tag="json_schema"):
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Text | JsonObject | JsonSchema


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's; exactly one field says the form."""

    json: Schema | str | UnsetType | None = UNSET
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    # known, not offered
    disable_additional_properties: Raw | UnsetType = UNSET
    disable_any_whitespace: Raw | UnsetType = UNSET
    structural_tag: Raw | UnsetType = UNSET
    whitespace_pattern: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }


class FormFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields of a request, of which at most one may say a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def form(self) -> tuple[str, Grammar] | None:
        """The field that says it, and what it says. Raises MalformedRequest where two do."""
        found = [*_of_format(self.response_format), *self._of_guided(), *_of_outputs(self.structured_outputs)]
        if len(found) > 1:
            (first, _), (second, _) = found[:2]
            raise MalformedRequest(f"{first} and {second} both say what the answer looks like; set one.", second)
        return found[0] if found else None

    def complaint(self, reason: str) -> tuple[str, str] | None:
        """The field that says the form, where an engine cannot follow it, and the reason."""
        form = self.form()
        return None if form is None else (form[0], reason)

    def _of_guided(self) -> list[tuple[str, Grammar]]:
        found = _forms(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return [(f"guided_{name}", grammar) for name, grammar in found]


def _of_format(said: ResponseFormat | None) -> list[tuple[str, Grammar]]:
    match said:
        case JsonObject(schema):
            return [("response_format", _schema(schema or {"type": "object"}))]
        case JsonSchema(named):
            schema = named.schema or {"type": "object"}
            return [("response_format", _schema(schema if named.strict else {**schema, "x-guidance": LENIENT}))]
        case _:
            return []


def _of_outputs(said: StructuredOutputs | None) -> list[tuple[str, Grammar]]:
    if said is None:
        return []
    found = _forms(None if said.json is UNSET else said.json, said.regex, said.choice, said.grammar)
    if said.json_object:
        found.append(("json_object", _schema({"type": "object"})))
    if not found:
        raise MalformedRequest("It must say one of json, json_object, regex, choice, grammar.", "structured_outputs")
    return [(f"structured_outputs.{name}", grammar) for name, grammar in found]


def _forms(
    schema: Schema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[tuple[str, Grammar]]:
    found = []
    if schema is not None:
        found.append(
            ("json", Grammar(kind="json_schema", source=schema) if isinstance(schema, str) else _schema(schema))
        )
    if regex is not None:
        found.append(("regex", Grammar(kind="regex", source=regex)))
    if choice is not None:
        found.append(("choice", Grammar(kind="choice", source=json.dumps(choice, ensure_ascii=False))))
    if grammar is not None:
        found.append(("grammar", Grammar(kind="gbnf" if "::=" in grammar else "lark", source=grammar)))
    return found


def _schema(schema: Schema | str) -> Grammar:
    source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Grammar(kind="json_schema", source=source)
