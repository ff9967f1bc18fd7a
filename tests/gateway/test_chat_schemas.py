"""Schemas of tools and forms that no grammar can hold to the letter, and forms that are none, over the echo engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.chats import TOOLS, calls_of, user
from support.gateway import BASE, Gateway
from support.problems import assert_problem


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


BEYOND_GRAMMARS: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"const": "x"}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 9}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "format": {"type": "string", "format": "password"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": "array"}]},
}


def beyond(keyword: str, *, strict: bool | None) -> list[Any]:
    schema = {"type": "object", "properties": {"place": BEYOND_GRAMMARS[keyword]}, "required": ["place"]}
    tool = {"name": "weather", "parameters": schema} | ({} if strict is None else {"strict": strict})
    return [TOOLS[1], {"type": "function", "function": tool}]


SAYS = {"uniqueItems": [1], "contains": [1], "propertyNames": {"a": 1}, "dependentRequired": {"a": 1, "b": 2}}


def call_of(keyword: str) -> str:
    arguments = json.dumps({"place": SAYS.get(keyword, "Łódź")}, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("strict", [None, False])
@pytest.mark.parametrize("keyword", BEYOND_GRAMMARS)
def test_forced_call_is_held_to_what_of_its_schema_a_grammar_can_say(
    client: OpenAI, keyword: str, strict: bool | None
) -> None:
    options: Any = {"model": BASE, "tools": beyond(keyword, strict=strict), "tool_choice": "required"}
    answer = client.chat.completions.create(messages=user(call_of(keyword)), **options)
    assert calls_of(answer.choices[0].message) == [("weather", {"place": SAYS.get(keyword, "Łódź")})]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=user(call_of(keyword).replace('"place"', '"plice"')), **options)


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("keyword", BEYOND_GRAMMARS)
def test_strict_tool_beyond_grammars_is_refused_by_name(client: OpenAI, keyword: str, choice: Any) -> None:
    tools = beyond(keyword, strict=True)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BASE, messages=user(call_of(keyword)), tools=tools, tool_choice=choice)
    assert caught.value.param == "tools[1].function.parameters"
    assert "'weather'" in str(caught.value)
    assert keyword in str(caught.value)
    for inside in ("lark", "args_", "%json", " | "):
        assert inside not in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "thinking"])
@pytest.mark.parametrize("keyword", BEYOND_GRAMMARS)
def test_form_that_is_not_strict_is_held_to_what_a_grammar_can_say(
    request: pytest.FixtureRequest, kind: str, keyword: str
) -> None:
    gateway: Gateway = request.getfixturevalue("gateway" if kind == "plain" else "thinking")
    schema = beyond(keyword, strict=None)[1]["function"]["parameters"]
    says = json.dumps({"place": SAYS.get(keyword, "Łódź")}, ensure_ascii=False)
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        for strict in (None, False, True):
            form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
            options: Any = {"model": BASE, "response_format": form}
            if strict:
                with pytest.raises(openai.BadRequestError, match=keyword) as caught:
                    client.chat.completions.create(messages=user(says), **options)
                assert caught.value.param == "response_format"
                assert "lark" not in str(caught.value)
                continue
            assert client.chat.completions.create(messages=user(says), **options).choices[0].message.content == says
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(messages=user(says.replace("place", "plice")), **options)


@pytest.mark.parametrize("kind", ["gateway", "thinking"])
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["alone", "beside-tools"])
@pytest.mark.parametrize(
    "form",
    [{"guided_json": "{"}, {"guided_json": "[" * 100_000}, {"guided_json": "[1]"}, {"guided_choice": []},
     {"guided_choice": [""]}, {"guided_regex": "(/"}],
    ids=["json", "deep", "array", "choices", "empty-choice", "regex"],
)  # fmt: skip
def test_form_that_is_none_is_refused_by_name(
    request: pytest.FixtureRequest, kind: str, tools: Any, form: dict[str, Any]
) -> None:
    with request.getfixturevalue(kind).client() as client:
        body = {"model": BASE, "messages": user("x"), "tools": tools, **form}
        assert_problem(client.post("/v1/chat/completions", json=body), 400, "invalid_request", next(iter(form)))
