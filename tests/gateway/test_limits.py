"""Limits as clients meet them: statuses, headers, streams that are cut, changes while requests run."""

from __future__ import annotations

import json
import uuid
from typing import Any

import openai
import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}


class Tenant:
    """A tenant of the test's own with limits, and a key of it."""

    def __init__(self, gateway: Gateway, **limits: object) -> None:
        self.gateway = gateway
        with gateway.admin() as admin:
            made = admin.post("/admin/v1/tenants", json={"name": f"limits-{uuid.uuid4().hex[:12]}", "limits": limits})
            assert made.status_code == 201, made.text
            self.id = made.json()["id"]
        self.key_id, self.key = self.new_key()

    def new_key(self, **fields: object) -> tuple[str, str]:
        with self.gateway.admin() as admin:
            made = admin.post(f"/admin/v1/tenants/{self.id}/keys", json=fields)
            assert made.status_code == 201, made.text
            return made.json()["id"], made.json()["key"]

    def limit(self, **limits: object) -> Any:
        with self.gateway.admin() as admin:
            answer = admin.put(f"/admin/v1/tenants/{self.id}/limits", json=limits)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def ask(self, text: str = "x", key: str | None = None, **fields: object) -> Any:
        with self.gateway.client(key or self.key) as client:
            return client.post("/v1/chat/completions", json=chat(text, **fields))


def test_requests_per_minute_in_headers_and_at_the_end(gateway: Gateway) -> None:
    tenant = Tenant(gateway, requests_per_minute=2)
    first = tenant.ask()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] in ("29s", "30s")
    assert tenant.ask(stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    refused = tenant.ask()
    assert_problem(refused, 429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert "x-request-id" in refused.headers


def test_tokens_per_minute_count_prompt_and_answer(gateway: Gateway) -> None:
    tenant = Tenant(gateway, input_tokens_per_minute=100, output_tokens_per_minute=40)
    answer = tenant.ask("y" * 20, max_tokens=40)
    assert answer.headers["x-ratelimit-limit-tokens"] == "40"
    assert answer.json()["usage"]["completion_tokens"] == 21
    refused = tenant.ask("y", max_tokens=30)  # 19 and what refilled are left
    assert_problem(refused, 429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "tokens"
    too_large = tenant.ask("y" * 101, max_tokens=1)
    assert_problem(too_large, 429, "rate_limit_exceeded")
    assert too_large.headers["x-should-retry"] == "false"


def test_budget_spent_is_insufficient_quota_and_not_tried_again(gateway: Gateway) -> None:
    tenant = Tenant(gateway, tokens_per_day=20)
    assert tenant.ask("x" * 8, max_tokens=12).status_code == 200  # 17 used
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=tenant.key)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "xx"}], max_tokens=2)
    client.close()
    assert (refused.value.code, refused.value.type) == ("insufficient_quota", "insufficient_quota")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert tenant.ask("x", max_tokens=2).status_code == 200  # all that was not used had come back


def test_budget_that_a_running_request_reserved_is_worth_another_try(gateway: Gateway) -> None:
    tenant = Tenant(gateway, tokens_per_day=500)
    with gateway.client(tenant.key) as client:
        body = chat("<slow>" + "x" * 60, stream=True, max_tokens=300)
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()  # one that is collected closes the stream
            next(lines)
            refused = tenant.ask(max_tokens=300)
    assert_problem(refused, 429, "insufficient_quota")
    assert (refused.headers["retry-after"], refused.headers.get("x-should-retry")) == ("1", None)


def test_stream_beyond_its_budget_ends_with_the_reason(gateway: Gateway) -> None:
    tenant = Tenant(gateway, tokens_per_day=60)
    frames = tenant.ask("z" * 40, stream=True).text.split("\n\n")
    parts = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame.startswith("data: {")]
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert parts[-1]["error"]["code"] == "insufficient_quota"
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts[:-1]) == "z" * 20
    assert "[DONE]" not in frames[-2]
    assert_problem(tenant.ask("z", max_tokens=1), 429, "insufficient_quota")


def test_whole_answer_beyond_its_budget_is_cut_and_says_so(gateway: Gateway) -> None:
    tenant = Tenant(gateway, tokens_per_day=60)
    answer = tenant.ask("z" * 40)
    assert answer.json()["choices"][0] | {"message": None} == {
        "index": 0, "finish_reason": "length", "logprobs": None, "message": None,
    }  # fmt: skip
    assert answer.json()["usage"]["total_tokens"] == 60
    assert answer.headers["x-loraplex-cut-short"] == "insufficient_quota"


def test_failed_request_gives_everything_back(gateway: Gateway) -> None:
    tenant = Tenant(gateway, concurrent_requests=1, tokens_per_day=500)
    for _ in range(5):
        assert tenant.ask("<fail>", max_tokens=400).status_code == 500
    with gateway.client(tenant.key) as client:
        for _ in range(3):
            body = chat("<slow>" + "x" * 50, stream=True, max_tokens=60)
            with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                next(stream.iter_lines())


def test_concurrent_requests_are_bounded(gateway: Gateway) -> None:
    tenant = Tenant(gateway, concurrent_requests=1)
    with gateway.client(tenant.key) as client:
        with client.stream("POST", "/v1/chat/completions", json=chat("<slow>" + "x" * 60, stream=True)) as stream:
            lines = stream.iter_lines()  # one that is collected closes the stream
            next(lines)
            refused = tenant.ask()
            assert_problem(refused, 429, "rate_limit_exceeded")
            assert refused.json()["error"]["type"] == "requests"


def test_max_tokens_is_capped(gateway: Gateway) -> None:
    tenant = Tenant(gateway, max_tokens=5)
    assert_problem(tenant.ask(max_tokens=6), 400, "invalid_request", "max_tokens")
    assert tenant.ask("long enough").json()["usage"]["completion_tokens"] == 5
    _, key = tenant.new_key(limits={"max_tokens": 3})
    assert tenant.ask("long enough", key).json()["usage"]["completion_tokens"] == 3


def test_models_outside_the_patterns_are_not_allowed_and_not_listed(gateway: Gateway) -> None:
    tenant = Tenant(gateway, allowed_models=["team/*"])
    assert_problem(tenant.ask(), 403, "model_not_allowed", "model")
    assert tenant.ask(model="team/echo-one").status_code == 200
    assert_problem(tenant.ask(model="team/none"), 404, "model_not_found", "model")
    with gateway.client(tenant.key) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["team/echo-one"]
        assert_problem(client.get(f"/v1/models/{BASE}"), 404, "model_not_found", "model")


def test_address_outside_the_list_is_refused_whatever_a_header_says(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    _, key = tenant.new_key(limits={"allowed_ips": ["192.0.2.0/24"]})
    with gateway.client(key) as client:
        assert_problem(client.get("/v1/models", headers={"x-forwarded-for": "192.0.2.1"}), 403, "address_not_allowed")
    _, key = tenant.new_key(limits={"allowed_ips": ["127.0.0.0/8"]})
    with gateway.client(key) as client:
        assert client.get("/v1/models").status_code == 200


def test_limits_change_while_requests_run(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    with gateway.admin() as admin:
        path = f"/admin/v1/tenants/{tenant.id}/limits"
        assert admin.get(path).json()["limits"]["tokens_per_day"] is None
        assert tenant.ask("x" * 10).status_code == 200
        assert tenant.limit(tokens_per_day=1)["effective"]["tokens_per_day"] == 1
        assert_problem(tenant.ask(max_tokens=1), 429, "insufficient_quota")
        tenant.limit()
        assert tenant.ask().status_code == 200
        key = f"/admin/v1/tenants/{tenant.id}/keys/{tenant.key_id}/limits"
        shown = admin.put(key, json={"requests_per_minute": 1}).json()
        assert shown["limits"]["requests_per_minute"] == shown["effective"]["requests_per_minute"] == 1
        tenant.ask()
        assert_problem(tenant.ask(), 429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"weight": 1000}, "weight"),
        ({"allowed_ips": ["nowhere"]}, "allowed_ips"),
        ({"tokens_per_day": "5"}, "tokens_per_day"),
    ],
)
def test_limits_that_cannot_be_are_refused_by_name(gateway: Gateway, limits: dict[str, Any], param: str) -> None:
    tenant = Tenant(gateway)
    with gateway.admin() as admin:
        answer = admin.put(f"/admin/v1/tenants/{tenant.id}/limits", json=limits)
        assert_problem(answer, 400, "invalid_request", param)
        answer = admin.put(f"/admin/v1/tenants/{tenant.id}/limits", json={"nonsense": 1})
        assert_problem(answer, 400, "unknown_parameter", "nonsense")


def test_key_is_rotated_with_an_overlap(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    path = f"/admin/v1/tenants/{tenant.id}/keys/{tenant.key_id}"
    with gateway.admin() as admin:
        rotated = admin.post(f"{path}/rotate", json={}).json()
        assert rotated["id"] == tenant.key_id
        assert tenant.ask().status_code == tenant.ask(key=rotated["key"]).status_code == 200
        again = admin.post(f"{path}/rotate", json={"overlap_seconds": 0}).json()
        for old in (tenant.key, rotated["key"]):
            assert_problem(tenant.ask(key=old), 401, "invalid_api_key")
        assert tenant.ask(key=again["key"]).status_code == 200
        assert admin.get(path).json()["key"] is None
        assert again["key"] not in admin.get(path).text
