"""Bad requests: the status, the code and the field's name; and no effect on anything else."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.auth import errors as auth_errors
from loraplex.auth.errors import AuthError
from loraplex.engines import errors as engine_errors
from loraplex.engines.errors import EngineError
from loraplex.gateway.errors import GatewayError
from loraplex.gateway.problems import TABLE

ROUTE = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


TOOL = _tool({"type": "object"})


def post(gateway: Gateway, body: Any = None, *, raw: bytes | None = None, key: str | None = None) -> Any:
    with gateway.client(key) as client:
        return client.post(ROUTE, content=raw if raw is not None else json.dumps(body))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Basic abc",
        "Bearer nonsense",
        "Bearer sk-loraplex-00000000-" + "0" * 43 + "-000000",
    ],
)
def test_key_missing_or_wrong_is_401(gateway: Gateway, header: str | None) -> None:
    with gateway.client() as client:
        del client.headers["authorization"]
        response = client.post(ROUTE, json=GOOD, headers={} if header is None else {"authorization": header})
    assert_problem(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_key_with_one_character_changed_is_401(gateway: Gateway) -> None:
    changed = gateway.api_key[:-10] + ("A" if gateway.api_key[-10] != "A" else "B") + gateway.api_key[-9:]
    assert_problem(post(gateway, GOOD, key=changed), 401, "invalid_api_key")


def test_key_revoked_is_refused_at_once(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("revoked")
    assert post(gateway, GOOD, key=key).status_code == 200
    with gateway.admin() as admin:
        key_id = admin.get(f"/admin/v1/tenants/{tenant}/keys").json()["data"][0]["id"]
        assert admin.delete(f"/admin/v1/tenants/{tenant}/keys/{key_id}").status_code == 204
    assert_problem(post(gateway, GOOD, key=key), 401, "invalid_api_key")


def test_model_unknown_is_404(gateway: Gateway) -> None:
    message = assert_problem(post(gateway, {**GOOD, "model": "nope"}), 404, "model_not_found", "model")
    assert "'nope'" in message


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"\xff\xfe{}", b'{"model": "\xff"}', b"[" * 100_000, b"null"]
)
def test_body_that_is_no_object_is_400(gateway: Gateway, raw: bytes) -> None:
    assert_problem(post(gateway, raw=raw), 400, "invalid_request")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": 5}, "model"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [257]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"metadata": {"a": "x" * 513}}, "metadata[...]"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [_tool({"type": "array"})]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"reasoning_effort": "utmost"}, "reasoning_effort"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *GOOD["messages"]]}, "messages[1]"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ],
    ids=str,
)
def test_field_wrong_is_400_and_named(gateway: Gateway, changes: dict[str, Any], param: str) -> None:
    assert_problem(post(gateway, {**GOOD, **changes}), 400, "invalid_request", param)


@pytest.mark.parametrize(("field", "param"), [("maxtokens", "maxtokens"), ("guided_jsn", "guided_jsn")])
def test_field_unknown_is_refused_by_name(gateway: Gateway, field: str, param: str) -> None:
    assert_problem(post(gateway, {**GOOD, field: 1}), 400, "unknown_parameter", param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("service_tier", "priority"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("store", True),
    ],
    ids=str,
)
def test_field_not_offered_is_refused_by_name(gateway: Gateway, field: str, value: Any) -> None:
    assert_problem(post(gateway, {**GOOD, field: value}), 400, "unsupported_parameter", field)


def test_fields_not_offered_are_harmless_at_their_defaults(gateway: Gateway) -> None:
    harmless = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "service_tier": "auto", "modalities": ["text"], "audio": None, "store": False, "user": "u", "n": 1,
        "metadata": {"a": "b"}, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False,
    }  # fmt: skip
    assert post(gateway, {**GOOD, **harmless}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}}, None),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        (
            {"structured_outputs": {"choice": ["a"], "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"bad_words": [""]}, None),
        ({"bad_words": ["x" * 257]}, "bad_words[0]"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": ["x", "y" * 1001]}, "stop[1]"),
        ({"allowed_token_ids": [5] * 10_000, "n": 128}, "allowed_token_ids"),
        ({"bad_words": ["x" * 256] * 200, "n": 64}, "bad_words"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_form_that_cannot_be_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str | None) -> None:
    answer = post(gateway, {**GOOD, **fields})
    assert answer.status_code == 400, answer.text
    assert param in (None, answer.json()["error"]["param"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {"type": "integer"}}, "guided_json"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engines_complaint_of_a_grammar_names_the_field_that_said_it(
    gateway: Gateway, fields: dict[str, Any], param: str, stream: bool
) -> None:
    answer = post(gateway, {**GOOD, **fields, "stream": stream})
    assert "echo engine follows no grammar" in assert_problem(answer, 400, "invalid_request", param)


def test_prompt_too_long_is_400(gateway: Gateway) -> None:
    body = {**GOOD, "messages": [{"role": "user", "content": "x" * 512}]}
    assert "512" in assert_problem(post(gateway, body), 400, "context_length_exceeded", "messages")
    assert_problem(post(gateway, {**GOOD, "max_tokens": 511}), 400, "context_length_exceeded", "max_tokens")
    assert post(gateway, {**GOOD, "max_tokens": 510}).status_code == 200


def test_body_too_large_is_413(gateway: Gateway) -> None:
    assert_problem(post(gateway, raw=b" " * (17 * 2**20)), 413, "request_too_large")


def test_route_unknown_and_method_wrong(gateway: Gateway) -> None:
    with gateway.client() as client:
        assert_problem(client.get("/v1/nothing"), 404, "not_found")
        assert_problem(client.get(ROUTE), 405, "method_not_allowed")


def test_unforeseen_exception_is_500_and_tells_nothing(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("an inner secret")

    monkeypatch.setattr(gateway.services.engine.tokenizer, "encode_chat", break_down)
    response = post(gateway, GOOD)
    message = assert_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "logged" in message
    assert response.headers["x-request-id"] in caplog.text
    assert "an inner secret" in caplog.text


def test_engine_not_ready_is_503_with_retry_after(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.services.engine, "_state", "restarting")
    response = post(gateway, {**GOOD, "stream": True})
    assert_problem(response, 503, "engine_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    with gateway.client() as client:
        assert client.get("/health").json()["state"] == "restarting"
        assert client.get("/health").status_code == 503


def test_no_key_is_ever_logged(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(gateway, GOOD)
        post(gateway, GOOD, key=gateway.api_key + "x")
        post(gateway, {**GOOD, "messages": [{"role": "user", "content": "<fail>...."}]})
        with gateway.admin() as admin:
            admin.post(f"/admin/v1/tenants/{gateway.tenant_id}/keys", json={"name": "logged?"})
    server_side = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    told = " ".join(record.getMessage() for record in server_side)
    assert gateway.api_key not in told
    assert gateway.admin_key not in told
    assert "sk-loraplex-" not in told


def _tree(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(_tree(child) for child in root.__subclasses__()))


def test_table_has_a_row_for_every_error_and_no_other() -> None:
    assert auth_errors.AuthError is AuthError
    assert engine_errors.EngineError is EngineError
    assert set(TABLE) == _tree(GatewayError) | _tree(AuthError) | _tree(EngineError)
    codes = [row.code for error, row in TABLE.items() if error is not GatewayError]
    for row in TABLE.values():
        limited = {"requests", "tokens", "insufficient_quota"} if row.status == 429 else {"invalid_request_error"}
        assert row.type in ({"server_error"} if row.status >= 500 else limited)
    assert {"invalid_api_key", "model_not_found", "context_length_exceeded"} <= set(codes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("annotations", [{}]),
        ("audio", {"id": "a"}),
        ("function_call", {"name": "f", "arguments": "{}"}),
    ],
)
def test_message_field_not_offered_is_refused_by_name(gateway: Gateway, field: str, value: Any) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", field: value}]
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json={"model": BASE, "messages": messages})
    assert_problem(response, 400, "unsupported_parameter", f"messages[1].{field}")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": BASE}, "messages"),
        ({"model": BASE, "messages": [{"role": "user"}]}, "messages[0].content"),
        ({"model": BASE, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ],
)
def test_field_missing_is_named(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    with gateway.client() as client:
        message = assert_problem(client.post("/v1/chat/completions", json=body), 400, "invalid_request", param)
    assert param in message
