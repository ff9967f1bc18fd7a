"""/v1/responses through the unmodified SDK; the echo engine says what the conversation says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from msgspec.structs import fields
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent, response_create_params
from pydantic import BaseModel, TypeAdapter
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.auth.caller import Caller
from loraplex.auth.store.database import open_database
from loraplex.gateway.errors import ResponseNotFound
from loraplex.gateway.openai.response_store import ResponseStore, StoredResponse
from loraplex.gateway.openai.responses_request import ResponseRequest

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        "strict": False,
    }
]
SAYS_CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Łódź"}}\n</tool_call>'
THOUGHT = "<think>\nWarm?\n</think>\n\n"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def events_of(gateway: Gateway, **body: Any) -> list[Any]:
    """The events of a stream, each strictly the SDK's type; the frames are nothing but these."""
    with gateway.client() as client:
        response = client.post("/v1/responses", json={"model": BASE, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for number, frame in enumerate(response.content.removesuffix(b"\n\n").split(b"\n\n")):
        event_line, data_line = frame.split(b"\n")
        event = EVENTS.validate_json(data_line.removeprefix(b"data: "), strict=True)
        assert event_line == b"event: " + event.type.encode()
        assert event.sequence_number == number
        found.append(event)
    return found


def test_create_answers_with_text_and_usage(client: OpenAI) -> None:
    answer = client.responses.create(
        model=BASE, input="Grüße!", instructions="Echo.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=99
    )
    assert answer.output_text == "Echo.\nGrüße!"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Echo.", {"a": "b"}, 0.5)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (14, 15, 29)
    assert answer.usage.output_tokens_details.reasoning_tokens == 0


def test_create_cut_short_is_incomplete(client: OpenAI) -> None:
    answer = client.responses.create(model=BASE, input="abcdef", max_output_tokens=3)
    assert (answer.output_text, answer.status) == ("abc", "incomplete")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_stream_events_build_the_response_up(gateway: Gateway) -> None:
    events = events_of(gateway, input="ab", store=False)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["a", "b"]
    final = events[-1].response
    assert (final.output_text, final.status) == ("ab", "completed")
    assert events[-2].item == final.output[0]
    assert {events[0].response.id, events[1].response.id, final.id} == {final.id}
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])


@pytest.mark.parametrize("says", [THOUGHT + SAYS_CALL, THOUGHT + "Yes.", SAYS_CALL + " Done.", "<think>open"])
def test_stream_and_whole_tell_the_same_items(thinking: Gateway, says: str) -> None:
    events = events_of(thinking, input=says, tools=TOOLS)
    with thinking.client() as client:
        raw = client.post("/v1/responses", json={"model": BASE, "input": says, "tools": TOOLS}).content
    whole = Response.model_validate_json(raw, strict=True)

    def told(response: Any) -> list[dict[str, Any]]:
        return [{key: value for key, value in item.model_dump().items() if key not in ("id", "call_id")}
                for item in response.output]  # fmt: skip

    assert told(events[-1].response) == told(whole)
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert added == done == [item.id for item in events[-1].response.output]
    for event in events:
        if event.type == "response.function_call_arguments.done":
            assert json.loads(event.arguments) == {"place": "Łódź"}
    if THOUGHT in says:
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens == len(THOUGHT) - len("<think>\n\n")


@pytest.mark.parametrize(("stop", "kinds", "content"), [
    ("Warm", ["reasoning", "message", "function_call"], "I look."),
    ("place", ["reasoning", "message", "function_call"], "I look."),
    ("look", ["reasoning", "message"], "I "),
])  # fmt: skip
def test_stop_ends_the_text_and_neither_calls_nor_reasoning(
    thinking: Gateway, stop: str, kinds: list[str], content: str
) -> None:
    says = THOUGHT + SAYS_CALL
    with OpenAI(base_url=f"{thinking.url}/v1", api_key=thinking.api_key) as client:
        whole: Any = client.responses.create(model=BASE, input=says, tools=TOOLS, extra_body={"stop": stop})
    streamed = events_of(thinking, input=says, tools=TOOLS, stop=stop)[-1].response
    for response in (whole, streamed):
        assert [item.type for item in response.output] == kinds
        assert (response.output_text, response.status) == (content, "completed")
        assert response.output[0].content[0].text == "Warm?"
        assert [json.loads(item.arguments) for item in response.output[2:]] == [{"place": "Łódź"}] * (len(kinds) - 2)
    assert whole.usage == streamed.usage


def test_tools_are_called_and_answered(client: OpenAI) -> None:
    """As OpenAI's documentation does it: the output joins the input, then the results."""
    conversation: list[Any] = [{"role": "user", "content": SAYS_CALL}]
    first = client.responses.create(model=BASE, input=conversation, tools=TOOLS)
    call = first.output[1]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Łódź"})
    conversation += first.output
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
    second = client.responses.create(model=BASE, input=conversation, tools=TOOLS, tool_choice="none")
    assert second.output_text == f"{SAYS_CALL}\nI look.\n21 degrees"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input=conversation[:-1], tools=TOOLS)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("required", "no call"),
        ({"type": "function", "name": "weather"}, SAYS_CALL),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}, "none"),
    ],
)
def test_forced_calls_are_held_to(client: OpenAI, choice: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input=says, tools=TOOLS, tool_choice=choice)
    assert caught.value.param == "tool_choice"
    answer = client.responses.create(model=BASE, input=SAYS_CALL[8:], tools=TOOLS, tool_choice=choice)
    assert [item.type for item in answer.output] == ["function_call"]


class weather(BaseModel):
    place: str


class Answer(BaseModel):
    warm: bool


def test_parse_reads_forms_and_strict_tools(client: OpenAI) -> None:
    form = client.responses.parse(model=BASE, input='{"warm": true}', text_format=Answer)
    assert form.output_parsed == Answer(warm=True)
    tools: Any = [openai.pydantic_function_tool(weather)]
    called = client.responses.parse(model=BASE, input=SAYS_CALL, tools=tools)
    assert called.output[1].parsed_arguments == weather(place="Łódź")  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.parse(model=BASE, input="no", text_format=Answer)
    assert caught.value.param == "text.format"


async def test_stream_helper_and_async(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        async with client.responses.stream(model=BASE, input='{"warm": false}', text_format=Answer) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert final.output_parsed == Answer(warm=False)
        assert kinds[-1] == "response.completed"
        stored = await client.responses.retrieve(final.id)
        assert stored.output_text == final.output_text


def test_responses_are_stored_gone_on_from_and_deleted(client: OpenAI) -> None:
    first = client.responses.create(model=BASE, input="one", instructions="Not carried over.")
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(model=BASE, input="two", previous_response_id=first.id)
    assert second.output_text == "one\nNot carried over.\none\ntwo"
    assert second.previous_response_id == first.id
    third = client.responses.create(model=BASE, input="three", previous_response_id=second.id)
    assert third.output_text == f"one\nNot carried over.\none\ntwo\n{second.output_text}\nthree"
    client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input="x", previous_response_id=third.id)
    assert caught.value.code == "previous_response_not_found"


def test_responses_not_to_be_stored_are_not(client: OpenAI) -> None:
    answer = client.responses.create(model=BASE, input="x", store=False)
    assert answer.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_responses_of_other_tenants_look_nonexistent(client: OpenAI, gateway: Gateway) -> None:
    mine = client.responses.create(model=BASE, input="secret")
    _, key = gateway.new_tenant("curious")
    with gateway.client(key) as other:
        absent = other.get("/v1/responses/resp_none")
        foreign = other.get(f"/v1/responses/{mine.id}")
        assert foreign.json() == json.loads(absent.text.replace("resp_none", mine.id))
        assert_problem(foreign, 404, "response_not_found", "response_id")
        assert other.delete(f"/v1/responses/{mine.id}").status_code == 404
        assert other.get(f"/v1/responses/{mine.id}/input_items").status_code == 404
        body = {"model": BASE, "input": "x", "previous_response_id": mine.id}
        assert_problem(
            other.post("/v1/responses", json=body), 400, "previous_response_not_found", "previous_response_id"
        )
    with gateway.admin() as admin:
        assert admin.get(f"/v1/responses/{mine.id}").status_code == 404
    assert client.responses.retrieve(mine.id).output_text == "secret"


def test_input_items_are_listed_in_pages(client: OpenAI, gateway: Gateway) -> None:
    items: Any = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "e"}]},
    ]
    answer = client.responses.create(model=BASE, input=items)
    found = [item.type for item in client.responses.input_items.list(answer.id, order="asc", limit=2)]
    assert found == ["message", "message", "function_call", "function_call_output", "message"]
    newest = client.responses.input_items.list(answer.id).data
    assert [item.type for item in newest] == found[::-1]
    with gateway.client() as plain:
        raw = plain.get(f"/v1/responses/{answer.id}/input_items?limit=3")
        ResponseItemList.model_validate_json(raw.content, strict=True)
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing"):
            refused = plain.get(f"/v1/responses/{answer.id}/input_items?{query}")
            assert_problem(refused, 400, "invalid_request", query.split("=")[0])


def test_logprobs_are_told_where_included(gateway: Gateway, client: OpenAI) -> None:
    include = ["message.output_text.logprobs"]
    answer = client.responses.create(model=BASE, input="hé", include=include, top_logprobs=1)  # type: ignore[arg-type]
    part = answer.output[0].content[0]  # type: ignore[union-attr,index]
    assert [one.bytes for one in part.logprobs or []] == [[104], [195], [169]]  # type: ignore[union-attr]
    events = events_of(gateway, input="hé", include=include, top_logprobs=1)
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert len(told) == 3


def test_truncation_leaves_the_oldest_out(client: OpenAI) -> None:
    old: Any = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 100}]
    new: Any = [{"role": "user", "content": "newest"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input=[*old, *old, *new])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    answer = client.responses.create(model=BASE, input=[*old, *old, *new], truncation="auto", instructions="I")
    prompt = "\n".join(["I", "x" * 300, "y" * 100, "newest"])
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(prompt)
    assert prompt.startswith(answer.output_text)
    assert client.responses.create(model=BASE, input=new, truncation="auto").output_text == "newest"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=BASE, input="z" * 600, truncation="auto")


def test_input_tokens_are_counted(client: OpenAI) -> None:
    assert client.responses.input_tokens.count(model=BASE, input="abc").input_tokens == 3


def test_background_is_refused_and_cancelling_explained(client: OpenAI) -> None:
    answer = client.responses.create(model=BASE, input="x")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=BASE, input="x", background=True)
    assert caught.value.param == "background"
    with pytest.raises(openai.BadRequestError, match="not offered"):
        client.responses.compact(model=BASE, input="x")


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": []}, "invalid_request", "input"),
        ({"input": 5}, "invalid_request", "input"),
        ({"input": [{"role": "user"}]}, "invalid_request", "input[0].content"),
        ({"input": [{"type": "web_search_call"}]}, "invalid_request", "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "invalid_request", "input[0].name"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "invalid_request",
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "invalid_request",
         "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]},
         "unsupported_parameter", "input[0].summary"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "invalid_request", "input"),
        ({"tools": [{"type": "web_search"}]}, "invalid_request", "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a"}] * 2}, "invalid_request", "tools[1].name"),
        ({"tools": [{"type": "function", "name": "a", "parameters": {"type": "array"}}]}, "invalid_request",
         "tools[0].parameters"),
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"include": ["file_search_call.results"]}, "invalid_request", "include[0]"),
        ({"top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "unsupported_parameter",
            "stream_options.continuous_usage_stats",
        ),
        ({"reasoning": {"summary": "detailed"}}, "unsupported_parameter", "reasoning.summary"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_request", "text.format.type"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"max_output_tokens": 600}, "context_length_exceeded", "max_output_tokens"),
        ({"previous_response_id": "resp_none"}, "previous_response_not_found", "previous_response_id"),
        ({"surprise": 1}, "unknown_parameter", "surprise"),
    ],
    ids=str,
)  # fmt: skip
def test_field_wrong_or_not_offered_is_refused_by_name(
    gateway: Gateway, changes: dict[str, Any], code: str, param: str
) -> None:
    with gateway.client() as client:
        assert_problem(client.post("/v1/responses", json={"model": BASE, "input": "x", **changes}), 400, code, param)


@pytest.mark.parametrize("name", sorted(ResponseRequest.not_offered))
def test_field_not_offered_matters_or_is_harmless(gateway: Gateway, name: str) -> None:
    with gateway.client() as client:
        for harmless in (None, *ResponseRequest.not_offered[name]):
            assert client.post("/v1/responses", json={"model": BASE, "input": "x", name: harmless}).status_code == 200
        refused = client.post("/v1/responses", json={"model": BASE, "input": "x", name: {"a": 1}})
        assert_problem(refused, 400, "unsupported_parameter", name)


def test_every_field_of_the_sdks_request_is_honoured_or_refused_by_name() -> None:
    theirs = set(get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    assert theirs <= {field.encode_name for field in fields(ResponseRequest)}


@pytest.mark.parametrize("prompt", ["<fail>......", "<die>......"])
def test_failure_midway_is_a_failed_response(gateway: Gateway, prompt: str) -> None:
    events = events_of(gateway, input=prompt)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"
    with gateway.client() as client:
        assert client.get(f"/v1/responses/{events[-1].response.id}").status_code == 404


async def test_store_forgets_what_is_old_and_whom_a_tenant_was(tmp_path: Path) -> None:
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'responses.db'}")
    now = [1000.0]
    store = ResponseStore(database, 60.0, lambda: now[0])
    admin = Caller(tenant_id="", tenant_name="", key_id="admin", role="admin")
    stored = StoredResponse(b'{"output":[]}', [])
    try:
        await store.save(admin, "old", stored, None)
        assert await store.get(admin, "old") == stored
        now[0] += 61
        with pytest.raises(ResponseNotFound):
            await store.get(admin, "old")
        await asyncio.gather(*(store.save(admin, f"new{number}", stored, None) for number in range(3)))
        now[0] -= 61
        with pytest.raises(ResponseNotFound):
            await store.get(admin, "old")
    finally:
        await database.dispose()
