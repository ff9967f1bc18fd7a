"""Calls that the demo's model makes because a grammar makes it, over its own tokens, through the unmodified SDK.

Its chat template knows no tools, so they are told in a system message and called in Hermes' form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from jsonschema import validate
from openai import OpenAI
from pydantic import BaseModel, Field
from support.demo import Demo

from loraplex.config.demo import adapter_names

ASK: Any = [{"role": "user", "content": "Where does Anna work?"}]


class book(BaseModel):  # the SDK names the tool by the class
    """Book a table."""

    person: Literal["Anna", "Ben"]
    guests: Annotated[int, Field(ge=1, le=9)]
    outside: bool


class cancel(BaseModel):
    person: Literal["Anna", "Ben"]


TOOLS: Any = [openai.pydantic_function_tool(book), openai.pydantic_function_tool(cancel)]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture
def client(demo: Demo) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.base_url, api_key=demo.api_key, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("seed", [1, 2])
def test_forced_call_keeps_its_schema_streamed_and_whole(client: OpenAI, place: int, seed: int) -> None:
    choice: Any = {"type": "function", "function": {"name": "book"}}
    options: dict[str, Any] = {
        "model": adapter_names()[place], "messages": ASK, "tools": TOOLS, "tool_choice": choice, "temperature": 1.0,
        "seed": seed, "max_tokens": 200, "parallel_tool_calls": False,
    }  # fmt: skip
    answer = client.chat.completions.parse(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert answer.message.tool_calls is not None
    [call] = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, book)
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert [one.function.arguments for one in streamed] == [call.function.arguments]


def test_required_call_is_of_any_tool(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model=adapter_names()[0], messages=ASK, tools=TOOLS, tool_choice="required", temperature=1.5, seed=seed,
            max_tokens=300, parallel_tool_calls=False,
        )  # fmt: skip
        call: Any = (answer.choices[0].message.tool_calls or [])[0]
        validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("stop", ["\n", "person", "}", "<tool_call>"])
def test_stop_strings_leave_a_forced_call_alone(client: OpenAI, stop: str) -> None:
    options: dict[str, Any] = {
        "model": adapter_names()[0], "messages": ASK, "tools": TOOLS, "tool_choice": "required", "temperature": 0,
        "max_tokens": 300, "parallel_tool_calls": False,
    }  # fmt: skip
    without = client.chat.completions.create(**options)
    answer = client.chat.completions.create(**options, stop=stop)
    with client.chat.completions.stream(**options, stop=stop) as stream:
        streamed = stream.get_final_completion()
    assert answer.usage == without.usage
    for choice in (answer.choices[0], streamed.choices[0]):
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
        assert arguments_of(choice.message) == arguments_of(without.choices[0].message)
    called = client.responses.create(
        model=adapter_names()[0], input=ASK, tools=TOOLS_OF_RESPONSES, tool_choice="required", temperature=0,
        max_output_tokens=300, parallel_tool_calls=False, extra_body={"stop": stop},
    )  # fmt: skip
    assert [item.type for item in called.output] == ["function_call"]


def arguments_of(message: Any) -> list[str]:
    return [call.function.arguments for call in message.tool_calls]


def test_schema_beyond_grammars_is_kept_loosely_or_refused_by_name(client: OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"ids": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}},
        "required": ["ids"], "additionalProperties": False,
    }  # fmt: skip
    function: dict[str, Any] = {"name": "pick", "parameters": schema}
    options: dict[str, Any] = {"model": adapter_names()[0], "temperature": 0, "tool_choice": "required"}
    tool: Any = {"type": "function", "function": function}
    answer = client.chat.completions.create(
        **options, messages=ASK, tools=[tool], max_tokens=200, parallel_tool_calls=False, logit_bias={}
    )
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    assert call.function.arguments.startswith('{"ids"')
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"'pick' cannot be held to its schema.*uniqueItems") as caught:
            client.chat.completions.create(
                **options, messages=ASK, tools=[TOOLS[0], {**tool, "function": {**function, "strict": True}}],
                stream=stream,
            )  # fmt: skip
        assert caught.value.param == "tools[1].function.parameters"
    flat: Any = {"type": "function", **function, "strict": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        client.responses.create(**options, input=ASK, tools=[flat])
    assert caught.value.param == "tools[0].parameters"


def test_named_tool_is_called_once(client: OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "cancel"}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=adapter_names()[0], messages=ASK, tools=TOOLS, tool_choice=choice, temperature=1.5, seed=seed,
            max_tokens=300,
        )  # fmt: skip
        assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == ["cancel"]  # type: ignore[union-attr]
        assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("max_tokens", [1, 3, 8, 12])
def test_forced_call_cut_short_is_no_text(client: OpenAI, max_tokens: int) -> None:
    options: dict[str, Any] = {
        "model": adapter_names()[0], "messages": ASK, "tools": TOOLS, "tool_choice": "required", "temperature": 0,
        "max_tokens": max_tokens,
    }  # fmt: skip
    answer = client.chat.completions.create(**options).choices[0]
    assert (answer.message.content or "", answer.finish_reason) == ("", "length")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert ("".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason) == ("", "length")


def test_results_come_back_and_the_model_goes_on(client: OpenAI) -> None:
    first: Any = client.chat.completions.create(
        model=adapter_names()[0], messages=ASK, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=300,
        parallel_tool_calls=False,
    ).choices[0].message  # fmt: skip
    assert first.tool_calls
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Done."}
    answer = client.chat.completions.create(
        model=adapter_names()[0], messages=[*ASK, first, result], tools=TOOLS, tool_choice="none", max_tokens=10
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_free_answer_with_strict_tools_is_text(client: OpenAI) -> None:
    """The model knows of no tools: held to text or right calls, it says text, as without them."""
    answer = client.chat.completions.create(
        model=adapter_names()[0], messages=ASK, tools=TOOLS, temperature=0, max_tokens=20
    ).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None


def test_stop_ends_free_text_beside_tools(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": adapter_names()[0], "messages": ASK, "tools": TOOLS, "temperature": 0, "max_tokens": 30,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    content = whole.choices[0].message.content or ""
    stop = content[7:11]
    answer = client.chat.completions.create(**options, stop=stop)
    with client.chat.completions.stream(**options, stop=stop, stream_options={"include_usage": True}) as stream:
        streamed = stream.get_final_completion()
    assert answer.usage is not None
    assert whole.usage is not None
    assert answer.usage.completion_tokens < whole.usage.completion_tokens
    for found in (answer, streamed):
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (content[:7], "stop")
        assert found.usage is not None
        assert found.usage.completion_tokens == answer.usage.completion_tokens


def test_response_calls_and_is_gone_on_from(client: OpenAI) -> None:
    model = adapter_names()[0]
    first = client.responses.create(
        model=model, input="Where does Anna work?", tools=TOOLS_OF_RESPONSES, tool_choice="required", temperature=0,
        max_output_tokens=300, parallel_tool_calls=False,
    )  # fmt: skip
    [call] = first.output
    assert call.type == "function_call"
    validate(json.loads(call.arguments), SCHEMAS[call.name])
    second = client.responses.create(
        model=model, previous_response_id=first.id, max_output_tokens=10,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Done."}],
    )  # fmt: skip
    assert second.output_text
    assert client.responses.retrieve(second.id).previous_response_id == first.id


TOOLS_OF_RESPONSES: Any = [
    {"type": "function", **{name: tool["function"][name] for name in ("name", "parameters")}} for tool in TOOLS
]
