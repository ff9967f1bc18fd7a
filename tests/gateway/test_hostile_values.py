"""Values that are valid JSON to one layer and poison to the next: each is refused by name, none reaches an engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.matching import MAX_SOURCE_CHARACTERS
from loraplex.engines.protocol import GenerateRequest
from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.dialogue import Dialogue
from loraplex.gateway.openai.responses_request import ResponseRequest

GOOD: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
BEGINNING = b'{"model":"echo-base","messages":[{"role":"user","content":"hi"}],'


def post(gateway: Gateway, body: bytes) -> Any:
    with gateway.client() as client:
        return client.post("/v1/chat/completions", content=body)


@pytest.mark.parametrize(
    "value", [b'"\xff"', b"1e999", b"[" * 500 + b"]" * 500, b'{"a":"\xc3"}'], ids=["utf8", "range", "deep", "nested"]
)
def test_field_not_offered_with_undecodable_value_is_refused_by_name(gateway: Gateway, value: bytes) -> None:
    assert_problem(
        post(gateway, BEGINNING + b'"prediction":' + value + b"}"), 400, "unsupported_parameter", "prediction"
    )


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_field_not_offered_nested_too_deep_is_400(gateway: Gateway, depth: int) -> None:
    raw = BEGINNING + b'"prediction":' + b"[" * depth + b"]" * depth + b"}"
    assert_problem(post(gateway, raw), 400, "invalid_request")


@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\\udc00"', b'"\\ud800x"'])
@pytest.mark.parametrize("field", [b"model", b"user", b"stop"])
def test_lone_surrogate_is_400(gateway: Gateway, field: bytes, text: bytes) -> None:
    raw = BEGINNING + b'"' + field + b'":' + text + b"}"
    assert_problem(post(gateway, raw), 400, "invalid_request")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("field", [b"temperature", b"repetition_penalty", b"presence_penalty", b"min_p"])
def test_number_that_is_none_is_400(gateway: Gateway, field: bytes, number: bytes) -> None:
    response = post(gateway, BEGINNING + b'"' + field + b'":' + number + b"}")
    assert_problem(response, 400, "invalid_request", field.decode() if number == b"1e999" else None)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"": 1}}, "logit_bias", "invalid_request"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids", "invalid_request"),
        ({"min_tokens": 10**30}, "min_tokens", "invalid_request"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "invalid_request"),
        ({"repetition_penalty": 1e300}, "repetition_penalty", "invalid_request"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "invalid_request"),
        ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "unknown_parameter"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_value_out_of_bounds_is_named(gateway: Gateway, changes: dict[str, Any], param: str, code: str) -> None:
    assert_problem(post(gateway, json.dumps({**GOOD, **changes}).encode()), 400, code, param)


def test_integers_reach_the_engine_within_64_bits(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerateRequest] = []
    generate = gateway.services.engine.generate

    def record(request: GenerateRequest) -> Any:
        asked.append(request)
        return generate(request)

    monkeypatch.setattr(gateway.services.engine, "generate", record)
    body = {**GOOD, "seed": 2**63 - 1, "n": 3, "top_k": 10**30, "min_tokens": 3, "max_tokens": 3}
    assert post(gateway, json.dumps(body).encode()).status_code == 200
    assert [request.sampling.seed for request in asked] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert {request.sampling.top_k for request in asked} == {257}


@pytest.mark.parametrize("field", ["model", "m" * 1_000_000])
def test_what_a_client_sends_is_not_repeated_at_any_length(gateway: Gateway, field: str) -> None:
    answer = post(gateway, json.dumps({**GOOD, field: "m" * 1_000_000}).encode())
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 5000
    assert "mmm" in answer.json()["error"]["message"]


def test_key_given_twice_has_its_last_value(gateway: Gateway) -> None:
    """As in Python, Go and JavaScript, which clients' bodies are made with."""
    raw = b'{"model":"nope","model":"echo-base","messages":[{"role":"user","content":"a","content":"b"}]}'
    assert post(gateway, raw).json()["choices"][0]["message"]["content"] == "b"


def test_nul_in_a_text_is_a_character_like_others(gateway: Gateway) -> None:
    body = {**GOOD, "messages": [{"role": "user", "content": "a\0b"}], "user": "\0", "metadata": {"\0": "\0"}}
    assert post(gateway, json.dumps(body).encode()).json()["choices"][0]["message"]["content"] == "a\0b"


@pytest.mark.parametrize(
    ("field", "grammar"),
    [
        ("guided_regex", "a" * MAX_SOURCE_CHARACTERS + "a"),
        ("guided_json", {"type": "object", "properties": {f"p{number}": {} for number in range(20_000)}}),
    ],
)
def test_grammar_too_large_is_refused_before_it_takes_seconds(gateway: Gateway, field: str, grammar: Any) -> None:
    message = assert_problem(
        post(gateway, json.dumps({**GOOD, field: grammar}).encode()), 400, "invalid_request", field
    )
    assert str(MAX_SOURCE_CHARACTERS) in message


@pytest.mark.parametrize(
    ("changes", "is_apart"),
    [
        ({}, False),
        ({"messages": [{"role": "user", "content": ""}] * 100_000}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_000}]}, True),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": ["x"] * 20_000}}}]}, True),
    ],
    ids=["small", "messages", "parts", "tools"],
)
def test_large_body_is_worked_on_where_it_holds_up_no_stream(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_apart: bool
) -> None:
    """100,000 messages without a text took a second of the event loop."""
    threads = noted(monkeypatch, (ChatRequest, "check"), (Dialogue, "__init__"), (Dialogue, "encode"))
    assert post(gateway, json.dumps({**GOOD, "max_tokens": 1, **changes}).encode()).status_code in (200, 400)
    assert len(threads) == 3
    assert {thread != loop_of(gateway) for thread in threads} == {is_apart}


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/responses/input_tokens"])
@pytest.mark.parametrize(("num_items", "is_apart"), [(1, False), (20_000, True)])
def test_long_conversation_is_worked_on_where_it_holds_up_no_stream(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, route: str, num_items: int, is_apart: bool
) -> None:
    threads = noted(
        monkeypatch, (ResponseRequest, "check"), (ResponseRequest, "chat"), (Dialogue, "__init__"), (Dialogue, "encode")
    )
    body: dict[str, Any] = {"model": GOOD["model"], "input": [{"role": "user", "content": ""}] * num_items}
    body["input"][-1] = {"role": "user", "content": "a"}
    with gateway.client() as client:
        assert client.post(route, content=json.dumps(body).encode()).status_code in (200, 400)
    assert len(threads) == 4
    assert {thread != loop_of(gateway) for thread in threads} == {is_apart}


def noted(monkeypatch: pytest.MonkeyPatch, *functions: tuple[type, str]) -> list[int]:
    """The threads in which these are called from now on."""
    threads: list[int] = []

    def noting(work: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            threads.append(threading.get_ident())
            return work(*arguments, **options)

        return note

    for owner, name in functions:
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    return threads


def loop_of(gateway: Gateway) -> int:
    """The thread of its event loop."""

    async def here() -> int:
        return threading.get_ident()

    return asyncio.run_coroutine_threadsafe(here(), gateway.loop).result(10)
