"""Tool calls and reasoning through the unmodified SDK, scripted: the echo engine says what the user says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from msgspec.structs import fields, replace
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, completion_create_params
from pydantic import BaseModel
from support.chats import SAYS_TWO, SAYS_WEATHER, THOUGHT, TOOLS, calls_of, user
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem

from loraplex.gateway.openai.chat_wire import ChatRequest


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


@pytest.fixture
async def thinker(thinking: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{thinking.url}/v1", api_key=thinking.api_key, max_retries=0) as client:
        yield client


def test_create_tells_text_calls_and_reason(client: OpenAI) -> None:
    choice = client.chat.completions.create(model=BASE, messages=user(SAYS_TWO), tools=TOOLS).choices[0]
    assert choice.message.content == "I look."
    assert calls_of(choice.message) == [("weather", {"place": "Łódź"}), ("now", {})]
    assert choice.finish_reason == "tool_calls"
    ids = [call.id for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)


def test_create_of_calls_alone_has_null_content(client: OpenAI) -> None:
    said = SAYS_WEATHER.removeprefix("I look.\n")
    choice = client.chat.completions.create(model=BASE, messages=user(said), tools=TOOLS).choices[0]
    assert choice.message.content is None
    assert choice.message.tool_calls


def test_create_cut_short_within_a_call_says_length(client: OpenAI) -> None:
    choice = client.chat.completions.create(
        model=BASE, messages=user(SAYS_WEATHER), tools=TOOLS, max_tokens=70
    ).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert '{"place": "Łódź"}'.startswith(choice.message.tool_calls[0].function.arguments)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options",
    [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}],
)
def test_create_without_tools_to_call_is_text(client: OpenAI, options: dict[str, Any]) -> None:
    choice = client.chat.completions.create(model=BASE, messages=user(SAYS_TWO), **options).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (SAYS_TWO, None)
    assert choice.finish_reason == "stop"


def test_stream_tells_calls_as_openai_does(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=BASE, messages=user(SAYS_TWO), tools=TOOLS, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    for index, (name, arguments) in enumerate([("weather", {"place": "Łódź"}), ("now", {})]):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert first.id is not None
        assert first.type == "function"
        assert first.function is not None
        assert (first.function.name, first.function.arguments) == (name, "")
        assert len(rest) == len(json.dumps(arguments, ensure_ascii=False))
        assert all(delta.id is None and delta.type is None and delta.function is not None for delta in rest)
        assert all(delta.function.name is None for delta in rest if delta.function is not None)
        told = "".join(delta.function.arguments or "" for delta in rest if delta.function is not None)
        assert json.loads(told) == arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."


def test_stream_helper_accumulates_what_create_tells(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": user(SAYS_TWO), "tools": TOOLS}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(**options).choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done", "content.delta"} <= kinds
    assert calls_of(final.message) == calls_of(whole.message)
    assert (final.message.content, final.finish_reason) == (whole.message.content, whole.finish_reason)


class weather(BaseModel):
    place: str


class Answer(BaseModel):
    warm: bool


def test_beta_helpers_are_the_same(client: OpenAI) -> None:
    tools = [openai.pydantic_function_tool(weather)]
    chats: Any = client.beta.chat.completions
    parsed = chats.parse(model=BASE, messages=user(SAYS_WEATHER), tools=tools).choices[0].message
    assert parsed.tool_calls[0].function.parsed_arguments == weather(place="Łódź")
    with chats.stream(model=BASE, messages=user(SAYS_WEATHER), tools=tools) as stream:
        assert stream.get_final_completion().choices[0].message.tool_calls[0].function.parsed_arguments == weather(
            place="Łódź"
        )
    assert client.beta.responses.create(model=BASE, input="hey").output[0].type == "message"


def test_parse_reads_strict_tools_and_forms(client: OpenAI) -> None:
    tools = [openai.pydantic_function_tool(weather)]
    parsed = client.chat.completions.parse(model=BASE, messages=user(SAYS_WEATHER), tools=tools).choices[0].message
    assert parsed.tool_calls is not None
    assert parsed.tool_calls[0].function.parsed_arguments == weather(place="Łódź")
    form = client.chat.completions.parse(
        model=BASE, messages=user('{"warm": true}'), tools=tools, response_format=Answer
    )
    assert form.choices[0].message.parsed == Answer(warm=True)
    called = client.chat.completions.parse(
        model=BASE, messages=user(SAYS_WEATHER.removeprefix("I look.\n")), tools=tools, response_format=Answer
    )
    assert called.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("options", "says", "param"),
    [
        ({"tool_choice": "required"}, "no call", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, SAYS_WEATHER[8:], "tool_choice"),
        ({"tool_choice": "required"}, SAYS_WEATHER[8:].replace("place", "plice"), "tool_choice"),
        ({"parallel_tool_calls": False}, SAYS_TWO, "tools"),
        ({"tools": [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]},
         SAYS_WEATHER.replace("place", "plice"), "tools"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}}}, SAYS_WEATHER, "tools"),
        ({"response_format": {"type": "json_object"}}, "no object", "tools"),
    ],
)  # fmt: skip
def test_answer_is_held_to_what_was_asked(client: OpenAI, options: dict[str, Any], says: str, param: str) -> None:
    """The echo refuses to say what a grammar does not admit; a model would say something else."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": user(says), "tools": TOOLS, **options})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tool_choice": "required"}, SAYS_TWO[8:]),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, SAYS_WEATHER[8:]),
        ({"parallel_tool_calls": False}, SAYS_WEATHER),
        ({"parallel_tool_calls": False}, "no call"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}}}, SAYS_WEATHER[8:]),
    ],
)  # fmt: skip
def test_answer_of_what_was_asked_is_told(client: OpenAI, options: dict[str, Any], says: str) -> None:
    answer = client.chat.completions.create(**{"model": BASE, "messages": user(says), "tools": TOOLS, **options})
    assert len(calls_of(answer.choices[0].message)) == says.count("<tool_call>")


def test_conversation_goes_on_with_calls_and_results(client: OpenAI) -> None:
    """As OpenAI's documentation does it, with the SDK's own message."""
    first = client.chat.completions.create(model=BASE, messages=user(SAYS_TWO), tools=TOOLS).choices[0].message
    assert first.tool_calls is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"result {call.id}"} for call in first.tool_calls]
    for said in (first, first.model_dump()):
        messages: Any = [*user("Warm?"), said, *results, *user("Thanks.")]
        content = client.chat.completions.create(model=BASE, messages=messages, tools=TOOLS).choices[0].message.content
        assert content == "\n".join(["Warm?", "I look.", *(result["content"] for result in results), "Thanks."])


async def test_reasoning_is_told_apart_and_counted(thinker: AsyncOpenAI) -> None:
    answer = await thinker.chat.completions.create(model=BASE, messages=user(THOUGHT + SAYS_WEATHER), tools=TOOLS)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("Warm?", "Warm?", "I look.")
    assert calls_of(message) == [("weather", {"place": "Łódź"})]
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("\nWarm?\n</think>")


async def test_reasoning_streams_before_the_answer(thinker: AsyncOpenAI) -> None:
    stream = await thinker.chat.completions.create(
        model=BASE, messages=user(THOUGHT + "Yes."), stream=True, stream_options={"include_usage": True}
    )
    reasoning, content, usage = "", "", None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta: Any = choice.delta
            if thought := getattr(delta, "reasoning_content", None):
                assert not content
                assert delta.reasoning == thought
                reasoning += thought
            content += delta.content or ""
    assert (reasoning, content) == ("Warm?", "Yes.")
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"response_format": {"type": "json_object"}}, THOUGHT + '{"a": 1}'),
        ({"guided_regex": "[a-z/]+"}, THOUGHT + "a/b"),
        ({"guided_choice": ["yes", "no"]}, "no"),
        ({"guided_grammar": 'start: "ok"'}, "ok"),
    ],
)
async def test_reasoning_comes_before_an_answer_that_must_have_a_form(
    thinker: AsyncOpenAI, form: dict[str, Any], says: str
) -> None:
    answer = await thinker.chat.completions.create(model=BASE, messages=user(says), extra_body=form)
    assert answer.choices[0].message.content == says.removeprefix(THOUGHT)


async def test_reasoning_history_and_effort_are_taken(thinker: AsyncOpenAI) -> None:
    messages: Any = [*user("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}, *user("d")]
    for effort in ("none", "minimal", "high"):
        answer = await thinker.chat.completions.create(model=BASE, messages=messages, reasoning_effort=effort)
        assert answer.choices[0].message.content == "a\nb\nd"
    answer = await thinker.chat.completions.create(
        model=BASE, messages=messages, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert answer.choices[0].message.content == "a\nb\nd"


def test_template_variable_unknown_is_refused_by_name(gateway: Gateway) -> None:
    with gateway.client() as client:
        body = {"model": BASE, "messages": user("x"), "chat_template_kwargs": {"enable_thinkng": True}}
        message = assert_problem(
            client.post("/v1/chat/completions", json=body),
            400,
            "unsupported_parameter",
            "chat_template_kwargs.enable_thinkng",
        )
    assert "enable_thinking" in message


def test_every_answer_and_chunk_is_strictly_the_sdks_type(thinking: Gateway) -> None:
    body = {
        "model": BASE,
        "messages": user(THOUGHT + SAYS_TWO),
        "tools": TOOLS,
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
    }
    with thinking.client() as client:
        whole = client.post("/v1/chat/completions", json=body)
        raw = client.post(
            "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
        ).content
    answer = ChatCompletion.model_validate_json(whole.content, strict=True)
    *frames, done = raw.removesuffix(b"\n\n").split(b"\n\n")
    assert done == b"data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(frame.removeprefix(b"data: "), strict=True) for frame in frames]
    for number in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == number]
        streamed = [one for choice in mine if choice.logprobs for one in choice.logprobs.content or []]
        told = answer.choices[number].logprobs
        assert told is not None
        assert streamed == told.content


def test_service_tiers_are_granted_or_refused(gateway: Gateway, client: OpenAI) -> None:
    for asked, told in (("auto", "default"), ("default", "default"), ("flex", "flex")):
        answer = client.chat.completions.create(model=BASE, messages=user("x"), service_tier=asked)  # type: ignore[call-overload]
        assert answer.service_tier == told
    tenant, key = gateway.new_tenant("first")
    with gateway.admin() as admin:
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"priority": 3}).status_code == 200
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key) as first:
        for asked in ("auto", "priority"):
            answer = first.chat.completions.create(model=BASE, messages=user("x"), service_tier=asked)  # type: ignore[call-overload]
            assert answer.service_tier == "priority"


def test_every_field_of_the_sdks_request_is_honoured_or_refused_by_name() -> None:
    """A field that OpenAI adds fails here until somebody decides on it."""
    theirs = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    ours = {field.encode_name for field in fields(ChatRequest)}
    assert theirs <= ours


def test_family_of_the_setting_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    settings = settings_in(tmp_path)
    settings = replace(settings, model=replace(settings.model, tool_parser="mistral"))
    with running(settings, "k") as gateway:
        _, gateway.api_key = gateway.new_tenant("tests")
        with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as client:
            says = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
            choice = client.chat.completions.create(model=BASE, messages=user(says), tools=TOOLS).choices[0]
    assert choice.message.tool_calls is not None
    assert len(choice.message.tool_calls[0].id) == 9
