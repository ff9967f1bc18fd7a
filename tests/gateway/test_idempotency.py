"""A request sent again under its `Idempotency-Key`: answered from the first one's answer, and billed once."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import httpx
import openai
import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.config.settings import UsageSettings
from loraplex.gateway.errors import IdempotencyKeyInUse, IdempotencyKeyReused
from loraplex.gateway.idempotency import Answer, Replays


class Tenant:
    """A tenant of the test's own, and what it is billed."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.id, self.key = gateway.new_tenant(f"once-{uuid.uuid4().hex[:12]}")

    def ask(self, text: str, idempotency_key: str, **fields: Any) -> httpx.Response:
        with self.gateway.client(self.key) as client:
            headers = {"Idempotency-Key": idempotency_key}
            return client.post("/v1/chat/completions", json=chat(text, **fields), headers=headers)

    def rows(self) -> list[Any]:
        with self.gateway.admin() as admin:
            found: list[Any] = admin.get("/admin/v1/usage/requests", params={"tenant_id": self.id}).json()["data"]
            return found

    def wait_for_rows(self, count: int) -> list[Any]:
        deadline = time.monotonic() + 20
        while len(rows := self.rows()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return rows


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_answer_is_given_again_and_billed_once(gateway: Gateway, stream: bool) -> None:
    tenant = Tenant(gateway)
    first = tenant.ask("hello", "k1", stream=stream)
    again = tenant.ask("hello", "k1", stream=stream)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(tenant.rows()) == 1


def test_key_stands_for_one_request(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    assert tenant.ask("hello", "k1").status_code == 200
    message = assert_problem(tenant.ask("hello!", "k1"), 422, "idempotency_key_reused")
    assert "hello" not in message
    assert tenant.ask("hello!", "k2").status_code == 200
    with gateway.client(tenant.key) as client:
        body = {"model": BASE, "prompt": "x"}
        answer = client.post("/v1/completions", json=body, headers={"Idempotency-Key": "k1"})
        assert_problem(answer, 422, "idempotency_key_reused")


def test_key_is_its_tenants_own(gateway: Gateway) -> None:
    one, other = Tenant(gateway), Tenant(gateway)
    first = one.ask("hello", "k1").json()["id"]
    assert other.ask("hello", "k1").json()["id"] != first
    with gateway.admin() as admin:
        made = admin.post(f"/admin/v1/tenants/{one.id}/keys", json={}).json()
        one.key = made["key"]
        assert one.ask("hello", "k1").json()["id"] == first  # another key of the same tenant
        admin.delete(f"/admin/v1/tenants/{one.id}/keys/{made['id']}")
    assert_problem(one.ask("hello", "k1"), 401, "invalid_api_key")


def test_request_under_way_answers_another_try_with_409(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    with gateway.client(tenant.key) as client:
        body, headers = chat("<slow>" + "x" * 20, stream=True), {"Idempotency-Key": "k1"}
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
            first = next(stream.iter_raw())
            refused = tenant.ask("<slow>" + "x" * 20, "k1", stream=True)
            assert_problem(refused, 409, "idempotency_key_in_use")
            assert refused.headers["retry-after"] == "1"
        assert first
    (row,) = tenant.wait_for_rows(1)
    assert (row["outcome"], row["num_completion_tokens"]) == ("completed", 27)
    again = tenant.ask("<slow>" + "x" * 20, "k1", stream=True)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content.startswith(first)
    assert again.content.endswith(b"data: [DONE]\n\n")
    assert b"keep-alive" not in again.content


def test_client_that_leaves_finds_its_answer_later(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    with gateway.client(tenant.key) as client:
        body, headers = chat("<slow>" + "x" * 8), {"Idempotency-Key": "k1"}
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, headers=headers, timeout=0.2)
    assert [row["outcome"] for row in tenant.wait_for_rows(1)] == ["completed"]
    again = tenant.ask("<slow>" + "x" * 8, "k1")
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["choices"][0]["message"]["content"] == "<slow>" + "x" * 8
    assert len(tenant.rows()) == 1


def test_openai_client_that_gives_up_waiting_is_billed_once(gateway: Gateway) -> None:
    """Its own retries: a time-out, then 409 while the first is under way, then the answer."""
    tenant = Tenant(gateway)
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=tenant.key, max_retries=10)
    done = client.with_options(timeout=0.3).chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "<slow>" + "x" * 20}],
        extra_headers={"Idempotency-Key": "k1"},
    )
    client.close()
    assert done.choices[0].message.content == "<slow>" + "x" * 20
    assert len(tenant.rows()) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_failed_is_tried_anew(gateway: Gateway, stream: bool) -> None:
    tenant = Tenant(gateway)
    for _ in range(2):
        answer = tenant.ask("<fail> x", "k1", stream=stream)
        assert "generation_failed" in answer.text
        assert "idempotent-replayed" not in answer.headers
    assert len(tenant.rows()) == 2
    assert_problem(tenant.ask("x", "k2", max_tokens=0), 400, "invalid_request", "max_tokens")
    assert tenant.ask("x", "k2", max_tokens=1).status_code == 200


def test_answer_that_a_budget_cut_is_not_kept(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    with gateway.admin() as admin:
        admin.put(f"/admin/v1/tenants/{tenant.id}/limits", json={"tokens_per_day": 60})
        cut = tenant.ask("z" * 40, "k1")
        assert cut.headers["x-loraplex-cut-short"] == "insufficient_quota"
        admin.put(f"/admin/v1/tenants/{tenant.id}/limits", json={})
    assert tenant.ask("z" * 40, "k1").json()["choices"][0]["message"]["content"] == "z" * 40


@pytest.mark.parametrize("key", ["", "a\tb", "k" * 256, "ü"])
def test_what_is_no_key_is_refused_by_name(gateway: Gateway, key: str) -> None:
    tenant = Tenant(gateway)
    with gateway.client(tenant.key) as client:
        headers = [(b"Idempotency-Key", key.encode())]
        answer = client.post("/v1/chat/completions", json=chat("x"), headers=headers)
    assert_problem(answer, 400, "invalid_request", "Idempotency-Key")


def test_bad_key_bad_body_and_long_body_are_refused_as_ever(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    with gateway.client(tenant.key) as client:
        headers = {"Idempotency-Key": "k1"}
        assert_problem(client.post("/v1/chat/completions", content=b"{", headers=headers), 400, "invalid_request")
        long = b" " * (16 * 2**20 + 1)
        assert_problem(client.post("/v1/chat/completions", content=long, headers=headers), 413, "request_too_large")
        headers["Authorization"] = "Bearer nonsense"
        assert_problem(client.post("/v1/chat/completions", json=chat("x"), headers=headers), 401, "invalid_api_key")


def test_many_at_once_are_one(gateway: Gateway) -> None:
    tenant = Tenant(gateway)
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(tenant.ask("<slow>xx", "k1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    statuses = sorted(answer.status_code for answer in answers)
    assert len(statuses) == 8
    assert statuses[0] == 200
    assert set(statuses) <= {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert len(tenant.rows()) == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_answers_leave_by_age_and_by_size() -> None:
    clock = Clock()
    replays = Replays(UsageSettings(replay_seconds=10, replay_bytes=100), clock)

    def answer(name: bytes, size: int) -> None:
        assert replays.claim(("t", name), b"f") is None
        replays.keep(("t", name), Answer(200, [], b"x" * size))

    answer(b"a", 40)
    clock.now = 5
    answer(b"b", 40)
    assert replays.claim(("t", b"a"), b"f") is not None
    answer(b"c", 40)  # the oldest leaves for it
    with pytest.raises(IdempotencyKeyReused):
        replays.claim(("t", b"b"), b"other")
    assert replays.claim(("t", b"a"), b"f") is None
    with pytest.raises(IdempotencyKeyInUse):
        replays.claim(("t", b"a"), b"f")
    replays.release(("t", b"a"))
    assert replays.claim(("t", b"a"), b"f") is None
    clock.now = 15
    assert replays.claim(("t", b"b"), b"f") is None
    answer(b"huge", 101)
    assert replays.claim(("t", b"huge"), b"f") is None
