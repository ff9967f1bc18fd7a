"""LoRAX's generate routes: what its clients send and read, byte by byte over the echo engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from support.flat import assert_flat, post
from support.gateway import BASE, Gateway

from loraplex.engines.echo_speech import Speech
from loraplex.engines.protocol import GenerateRequest

CLIENTS_NULLS: dict[str, Any] = dict.fromkeys(
    ("adapter_id", "adapter_source", "merged_adapters", "api_token", "max_new_tokens", "best_of", "repetition_penalty",
     "seed", "temperature", "top_k", "top_p", "truncate", "typical_p", "return_k_alternatives", "response_format")
)  # fmt: skip
CLIENTS_FALSE = dict.fromkeys(
    ("do_sample", "ignore_eos_token", "return_full_text", "watermark", "details", "decoder_input_details"), False
)
SCHEMAS: list[dict[str, Any]] = [
    {}, {"schema": None}, {"schema": {}}, {"schema": {"type": "string"}}, {"schema": '{"type": "string"}'}
]  # fmt: skip


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.fixture
def asked(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[GenerateRequest]:
    """What reaches the engine."""
    seen: list[GenerateRequest] = []
    generate = gateway.services.engine.generate

    def record(request: GenerateRequest) -> Any:
        seen.append(request)
        return generate(request)

    monkeypatch.setattr(gateway.services.engine, "generate", record)
    return seen


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_compatible_route_answers_with_a_list_of_one(gateway: Gateway, path: str) -> None:
    response = post(gateway, path, "abc", stream=False, **CLIENTS_NULLS, **CLIENTS_FALSE, stop=[])
    assert (response.status_code, response.json()) == (200, [{"generated_text": "abc"}])


def test_generate_answers_with_an_object(gateway: Gateway) -> None:
    assert post(gateway, "/generate", "abc").json() == {"generated_text": "abc"}


@pytest.mark.parametrize("body", [{"inputs": "ab"}, {"inputs": "ab", "parameters": None, "stream": None}])
def test_everything_but_inputs_may_be_missing_or_null(gateway: Gateway, body: dict[str, Any]) -> None:
    with gateway.client() as client:
        assert client.post("/generate", json=body).json() == {"generated_text": "ab"}


def test_details_tell_every_token(gateway: Gateway) -> None:
    response = post(gateway, "/generate", "hé", details=True, decoder_input_details=True, return_k_alternatives=1)
    details = response.json()["details"]
    tokens = details.pop("tokens")
    assert details == {
        "finish_reason": "eos_token", "prompt_tokens": 3, "generated_tokens": 4, "skipped_tokens": 0, "seed": None,
        "prefill": [{"id": 104, "text": "h", "logprob": None}, {"id": 195, "text": "\ufffd", "logprob": 0.0},
                    {"id": 169, "text": "\ufffd", "logprob": 0.0}],
    }  # fmt: skip
    assert [(token["id"], token["text"], token["special"]) for token in tokens] == [
        (104, "h", False), (195, "", False), (169, "é", False), (256, "<eos>", True)]  # fmt: skip
    for token in tokens:
        assert (token["logprob"], token["skipped"]) == (0.0, False)
        assert [other["id"] for other in token["alternative_tokens"]] == [token["id"]]


def test_prompt_of_one_token_has_a_prefill_of_one(gateway: Gateway) -> None:
    details = post(gateway, "/generate", "a", decoder_input_details=True).json()["details"]
    assert details["prefill"] == [{"id": 97, "text": "a", "logprob": None}]


@pytest.mark.parametrize(
    ("parameters", "text", "reason"),
    [
        ({"max_new_tokens": 2}, "on", "length"),
        ({"stop": ["."]}, "one.", "stop_sequence"),
        ({"stop": [" tw", "."]}, "one.", "stop_sequence"),
        ({"stop": ["x"]}, "one. two", "eos_token"),
        ({"truncate": 3}, "two", "eos_token"),
        ({"return_full_text": True}, "one. twoone. two", "eos_token"),
        ({"return_full_text": True, "truncate": 3, "stop": ["t"]}, "one. twot", "stop_sequence"),
    ],
    ids=str,
)
@pytest.mark.parametrize("streams", [False, True])
def test_text_and_its_end(gateway: Gateway, parameters: dict[str, Any], text: str, reason: str, streams: bool) -> None:
    if streams:
        told = events(post(gateway, "/generate_stream", "one. two", details=True, **parameters))[-1]
    else:
        told = post(gateway, "/generate", "one. two", details=True, **parameters).json()
    assert (told["generated_text"], told["details"]["finish_reason"]) == (text, reason)


def test_stream_tells_a_token_an_event_and_the_rest_with_the_last(gateway: Gateway) -> None:
    told = events(post(gateway, "/", "hé", stream=True, details=True))
    assert [event["token"]["text"] for event in told] == ["h", "", "é", "<eos>"]
    assert all(event["generated_text"] is None and event["details"] is None for event in told[:-1])
    assert told[-1]["generated_text"] == "hé"
    assert told[-1]["details"] == {
        "finish_reason": "eos_token", "prompt_tokens": 3, "generated_tokens": 4, "seed": None}  # fmt: skip
    assert [list(event) for event in told] == [["token", "generated_text", "details"]] * 4
    assert all(list(event["token"]) == ["id", "text", "logprob", "special", "skipped"] for event in told)


def test_stream_without_details_tells_none(gateway: Gateway) -> None:
    assert events(post(gateway, "/generate_stream", "a"))[-1]["details"] is None


@pytest.mark.parametrize(("prompt", "error_type"), [("ab<fail>", "generation"), ("ab<die>", "incomplete_generation")])
def test_error_in_a_stream_is_its_last_event(gateway: Gateway, prompt: str, error_type: str) -> None:
    told = events(post(gateway, "/generate_stream", prompt))
    assert len(told) == 5
    assert told[-1]["error_type"] == error_type
    assert list(told[-1]) == ["error", "error_type"]


def test_best_of_tells_the_others_too(gateway: Gateway, asked: list[GenerateRequest]) -> None:
    details = post(gateway, "/generate", "ab", best_of=3, do_sample=True, details=True).json()["details"]
    others = details["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["ab", "ab"]
    assert [set(other) for other in others] == [
        {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}] * 2  # fmt: skip
    seeds = {details["seed"], *(other["seed"] for other in others)}
    assert seeds == {request.sampling.seed for request in asked}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.3}, 0.3),
        ({"temperature": 0, "do_sample": True}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"typical_p": 0.5}, 1.0),
        ({"repetition_penalty": 1.2}, 0.0),
    ],
    ids=str,
)
def test_sampling_begins_where_lorax_begins_it(
    gateway: Gateway, asked: list[GenerateRequest], parameters: dict[str, Any], temperature: float
) -> None:
    seed = post(gateway, "/generate", "a", details=True, **parameters).json()["details"]["seed"]
    assert asked[0].sampling.temperature == temperature
    assert (seed is None) == (temperature == 0)


def test_every_parameter_reaches_the_engine(gateway: Gateway, asked: list[GenerateRequest]) -> None:
    parameters: dict[str, Any] = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "typical_p": 0.8, "repetition_penalty": 1.5,
        "frequency_penalty": 0.25, "presence_penalty": -0.5, "seed": 2**64 - 1, "max_new_tokens": 9,
        "ignore_eos_token": True, "stop": ["x", "y"], "return_k_alternatives": 4, "details": True,
    }  # fmt: skip
    details = post(gateway, "/generate", "abc", **parameters).json()["details"]
    [request] = asked
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 7, 0.9, 0.8)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, 0.25, -0.5)
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.stop) == (9, True, ("x", "y"))
    assert (sampling.num_logprobs, sampling.includes_stop) == (4, True)
    assert (sampling.seed, details["seed"]) == (-1, 2**64 - 1)
    assert request.tenant == gateway.tenant_id


@pytest.mark.parametrize("kind", ["json_object", "JsonObject", "json_schema", "JsonSchema"])
@pytest.mark.parametrize(
    "said", [{}, {"schema": None}, {"schema": {"type": "string"}}, {"schema": '{"type": "string"}'}]
)
def test_response_format_becomes_a_grammar(
    gateway: Gateway, asked: list[GenerateRequest], kind: str, said: dict[str, Any]
) -> None:
    response = post(gateway, "/generate", "a", response_format={"type": kind, **said})
    assert_flat(response, 422, "validation")  # the echo engine follows no grammar
    grammar = asked[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source) == {"type": "string" if said.get("schema") else "object"}


def test_response_format_text_is_no_form(gateway: Gateway, asked: list[GenerateRequest]) -> None:
    assert post(gateway, "/generate", "a", response_format={"type": "text"}).status_code == 200
    assert asked[0].sampling.grammar is None


def test_adapter_of_the_catalogue(gateway: Gateway) -> None:
    response = post(gateway, "/generate", "abc", adapter_id="team/echo-one")
    assert response.json() == {"generated_text": "team/echo-one: abc"}
    assert response.headers["x-adapter-id"] == "team/echo-one"
    for base in (None, "", BASE):
        assert post(gateway, "/generate", "abc", adapter_id=base).json() == {"generated_text": "abc"}


def test_merged_adapters_of_the_catalogue(gateway: Gateway, asked: list[GenerateRequest]) -> None:
    merged = {"ids": ["team/echo-one"], "weights": [0.5], "merge_strategy": None, "density": 1.0,
              "majority_sign_method": None}  # fmt: skip
    response = post(gateway, "/generate", "abc", merged_adapters=merged)
    assert response.status_code == 200, response.text
    assert [(part.adapter.name, part.weight) for part in asked[0].composition] == [("team/echo-one", 0.5)]
    assert response.headers["x-adapter-id"] == "team/echo-one"


@pytest.mark.parametrize("adapter_id", ["no/such", "a\r\nx-injected: 1", "../../etc", "é\u0000"])
def test_unknown_adapter_is_404(gateway: Gateway, adapter_id: str) -> None:
    response = post(gateway, "/generate", "abc", adapter_id=adapter_id)
    assert_flat(response, 404, "adapter_not_found")
    assert "x-injected" not in response.headers


def test_adapter_source_of_a_tenant_without_any_is_403(gateway: Gateway) -> None:
    response = post(gateway, "/generate", "abc", adapter_id="org/name", adapter_source="hub")
    assert "request_adapters" in assert_flat(response, 403, "validation")
    response = post(gateway, "/generate", "abc", adapter_id="org/name", adapter_source="pbase")
    assert "adapter_source" in assert_flat(response, 422, "not_offered")


def test_refused_source_is_told_as_it_was_sent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it leads on the server, nor whether there is anything."""
    monkeypatch.chdir(gateway.adapter_dir)
    for name in ("shared", "nothing-here", "../local/shared"):
        response = post(gateway, "/generate", "abc", adapter_id=name, adapter_source="local")
        told = assert_flat(response, 403, "validation")
        assert told == f"{name}: this tenant may not use unregistered adapters from here (limits: request_adapters)"


def test_adapter_that_nobody_registered_where_the_tenant_may(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("request-adapters")
    source = str(gateway.adapter_dir / "shared")
    with gateway.admin() as admin:
        limits = {"request_adapters": ["file://*"]}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    parameters: dict[str, Any] = {"adapter_id": source, "adapter_source": "local"}
    with gateway.client(key) as client:
        response = client.post("/generate", json={"inputs": "abc", "parameters": parameters})
    assert response.json() == {"generated_text": f"{source}: abc"}
    assert (response.headers["x-adapter-id"], response.headers["x-adapter-source"]) == (source, "local")
    assert_flat(post(gateway, "/generate", "abc", **parameters), 403, "validation")


def test_headers_tell_what_was_used_and_how_long_it_took(gateway: Gateway) -> None:
    headers = post(gateway, "/generate", "héx", max_new_tokens=2).headers
    assert headers["x-compute-characters"] == "3"
    assert headers["x-model-id"] == BASE
    assert headers["x-compute-type"] == "cpu"
    counts = [headers[f"x-{name}-tokens"] for name in ("prompt", "generated", "skipped", "total")]
    assert counts == ["4", "2", "0", "6"]
    names = ("compute-time", "total-time", "validation-time", "queue-time", "inference-time", "time-per-token",
             "time-to-first-token", "time-per-output-token")  # fmt: skip
    assert all(0 <= int(headers[f"x-{name}"]) < 60_000 for name in names)
    streamed = post(gateway, "/generate_stream", "abc").headers
    assert (streamed["x-compute-characters"], streamed["x-model-id"]) == ("3", BASE)
    assert streamed["x-accel-buffering"] == "no"


def test_queue_time_is_the_engines_own(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    say = Speech.say
    monkeypatch.setattr(Speech, "say", lambda *given: msgspec.structs.replace(say(*given), queue_seconds=0.002))
    assert post(gateway, "/generate", "abc").headers["x-queue-time"] == "2"


def test_key_is_needed(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        for path in ("/", "/generate", "/generate_stream", "/invocations", "/classify"):
            assert_flat(client.post(path, json={"inputs": "a"}), 401, "invalid_api_key")
        assert_flat(client.get("/info"), 401, "invalid_api_key")


def test_model_out_of_the_keys_limits_is_403(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        keys = f"/admin/v1/tenants/{gateway.tenant_id}/keys"
        made = admin.post(keys, json={}).json()
        limited = admin.put(f"{keys}/{made['id']}/limits", json={"allowed_models": ["nothing"]})
        assert limited.status_code == 200, limited.text
    with gateway.client(made["key"]) as client:
        assert_flat(client.post("/generate", json={"inputs": "a"}), 403, "validation")


def test_limits_hold_here_too(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("lorax-limits")
    with gateway.admin() as admin:
        limits = {"requests_per_minute": 1}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    with gateway.client(key) as client:
        first = client.post("/generate", json={"inputs": "a"})
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        refused = client.post("/generate", json={"inputs": "a"})
    assert_flat(refused, 429, "rate_limited")
    assert int(refused.headers["retry-after"]) >= 1


def test_spent_budget_cuts_a_stream_with_an_error_of_loraxs_own(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("lorax-budget")
    with gateway.admin() as admin:
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"tokens_per_day": 10}).status_code == 200
    with gateway.client(key) as client:
        told = events(client.post("/generate_stream", json={"inputs": "abcdefg"}))
    assert [event["token"]["text"] for event in told[:-1]] == ["a", "b", "c"]
    assert told[-1]["error_type"] == "overloaded"
