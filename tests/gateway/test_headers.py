"""What every answer carries beside its body, admitted or refused, streamed or whole: one table."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, NamedTuple

import asyncpg
import httpx
import msgspec
import pytest
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem
from support.services import POSTGRES, own_postgres_database

from loraplex.config.settings import Database, Settings

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
REQUESTS = frozenset(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))
TOKENS = frozenset(f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset"))
LATER = frozenset({"retry-after", "retry-after-ms"})
NEVER = frozenset({"x-should-retry"})
TOLD = REQUESTS | TOKENS | LATER | NEVER | {"www-authenticate"}  # those that depend on what became of the request


class Case(NamedTuple):
    """What is asked under which limits, so many times; how the last one ends, and the headers it has of `TOLD`."""

    limits: dict[str, Any]
    times: int
    max_tokens: int
    status: int
    code: str
    told: frozenset[str]
    model: str = BASE
    key: str | None = None
    state: str = "ready"


CASES = {
    "unlimited": Case({}, 1, 20, 200, "", frozenset()),
    "within": Case({"requests_per_minute": 5, "output_tokens_per_minute": 99}, 1, 20, 200, "", REQUESTS | TOKENS),
    "within a budget": Case({"tokens_per_day": 9999}, 1, 20, 200, "", frozenset()),
    "requests": Case({"requests_per_minute": 1}, 2, 20, 429, "rate_limit_exceeded", REQUESTS | LATER),
    "tokens": Case({"output_tokens_per_minute": 25}, 9, 20, 429, "rate_limit_exceeded", TOKENS | LATER),
    "too large": Case({"output_tokens_per_minute": 9}, 1, 20, 429, "rate_limit_exceeded", TOKENS | NEVER),
    "budget": Case(
        {"tokens_per_day": 9, "requests_per_minute": 5}, 1, 20, 429, "insufficient_quota", REQUESTS | LATER | NEVER
    ),
    "no such model": Case({"requests_per_minute": 5}, 1, 20, 404, "model_not_found", frozenset(), model="none"),
    "no such key": Case({}, 1, 20, 401, "invalid_api_key", frozenset({"www-authenticate"}), key="sk-nobody"),
    "not ready": Case({}, 1, 20, 503, "engine_unavailable", LATER, state="restarting"),
}


def body_of(route: str, case: Case, stream: bool) -> dict[str, Any]:
    text = "x" * 10
    if route == "/v1/chat/completions":
        return {"model": case.model, "messages": [{"role": "user", "content": text}], "max_tokens": case.max_tokens,
                "stream": stream}  # fmt: skip
    if route == "/v1/completions":
        return {"model": case.model, "prompt": text, "max_tokens": case.max_tokens, "stream": stream}
    return {"model": case.model, "input": text, "max_output_tokens": case.max_tokens, "stream": stream}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES[:3])
@pytest.mark.parametrize("name", CASES)
def test_headers_of_answers_and_of_refusals(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, name: str, route: str, stream: bool
) -> None:
    case = CASES[name]
    key = case.key or key_with(gateway, case.limits)
    monkeypatch.setattr(gateway.services.engine, "_state", case.state)
    with gateway.client(key) as client:
        for _ in range(case.times):
            answer = client.post(route, json=body_of(route, case, stream), headers={"x-request-id": "of-the-test"})
            if answer.status_code != 200:
                break
    assert answer.headers["x-request-id"] == "of-the-test"
    assert answer.headers["openai-processing-ms"].isdecimal()
    if case.status == 200:
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    else:
        assert_problem(answer, case.status, case.code, "model" if case.status == 404 else None)
    assert TOLD & set(answer.headers) == case.told
    check_values(answer, case)


def check_values(answer: httpx.Response, case: Case) -> None:
    headers = answer.headers
    if case.told >= LATER:
        assert int(headers["retry-after"]) - 1 < int(headers["retry-after-ms"]) / 1000 <= int(headers["retry-after"])
    if case.told >= NEVER:
        assert headers["x-should-retry"] == "false"
    if case.told >= REQUESTS:
        assert headers["x-ratelimit-limit-requests"] == str(case.limits["requests_per_minute"])
        remaining = {200: "4", 429: "0" if case.times > 1 else "5"}[case.status]  # a refusal takes nothing
        assert headers["x-ratelimit-remaining-requests"] == remaining
    if case.told >= TOKENS:
        assert headers["x-ratelimit-limit-tokens"] == str(case.limits["output_tokens_per_minute"])
        assert int(headers["x-ratelimit-remaining-tokens"]) <= case.limits["output_tokens_per_minute"]


def test_refused_embedding_tells_the_limits_as_well(gateway: Gateway) -> None:
    with gateway.client(key_with(gateway, {"requests_per_minute": 1})) as client:
        answers = [client.post("/v1/embeddings", json={"model": BASE, "input": "x"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert TOLD & set(answers[0].headers) == REQUESTS
    assert TOLD & set(answers[1].headers) == REQUESTS | LATER


def test_what_no_route_answers_has_an_id_as_well(gateway: Gateway) -> None:
    with gateway.client() as client:
        found = client.get("/v1/models", headers={"x": "y" * 100_000})
    assert found.status_code == 431
    assert found.headers["x-request-id"].startswith("req_")
    assert found.headers["openai-processing-ms"] == "0"


async def test_key_that_cannot_be_looked_up_is_503(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its database a gateway knows nobody, which is not the client's fault."""
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    async with own_postgres_database() as url:
        settings = msgspec.structs.replace(settings_in(tmp_path), database=Database(url=url))
        await asyncio.to_thread(ask_without_database, settings, url.rpartition("/")[2])


def ask_without_database(settings: Settings, name: str) -> None:
    async def drop() -> None:
        server = await asyncpg.connect(POSTGRES)
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()

    with running(settings, "k") as gateway:
        _, key = gateway.new_tenant("t")
        asyncio.run_coroutine_threadsafe(drop(), gateway.loop).result(30)
        with gateway.client(key) as client:
            for route in ROUTES[:2]:
                for _ in range(2):  # over connections that have broken, and over none
                    answer = client.post(route, json=body_of(route, CASES["unlimited"], stream=True))
                    assert_problem(answer, 503, "keys_unavailable")
                    assert set(answer.headers) >= LATER
            assert client.get("/health").status_code == 200


def key_with(gateway: Gateway, limits: dict[str, Any]) -> str:
    with gateway.admin() as admin:
        body = {"name": f"headers-{uuid.uuid4().hex[:12]}", "limits": limits}
        tenant = admin.post("/admin/v1/tenants", json=body).json()["id"]
        key: str = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
        return key
