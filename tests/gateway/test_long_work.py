"""Long work before a request is counted: limits first, threads for every tenant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from support.asking import accounts, asked_by
from support.gateway import BASE, Gateway
from support.problems import assert_problem
from support.work import Work

from loraplex.auth.caller import Caller
from loraplex.auth.errors import RequestsLimited
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.metering import Demand
from loraplex.gateway.openai.dialogue import LONG_TEXT
from loraplex.gateway.prompts import apart

LONG = "x" * (LONG_TEXT + 1)


def caller(name: str, **limits: int) -> Caller:
    policy = Policy(tenant=Limits(**limits))  # type: ignore[arg-type]
    return Caller(tenant_id=name, tenant_name=name, key_id=name, role="inference", policy=policy)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_long_work_holds_what_it_takes_of_the_limits_and_gives_it_back() -> None:
    books, one, work = accounts(), caller("t", concurrent_requests=1, requests_per_minute=1), Work()
    request = asked_by(one, books)
    first = asyncio.create_task(apart(request, work, is_long=True))
    await until(work.began.is_set)
    with pytest.raises(RequestsLimited, match=r"is 1 requests per minute\."):
        await apart(request, lambda: pytest.fail("refused work is not done"), is_long=True)
    assert await apart(request, lambda: 3, is_long=True, is_counted=False) == 3
    assert await apart(request, lambda: 4, is_long=False) == 4
    work.goes.set()
    assert await first == "done"
    demand = Demand(
        request_id="r", trace_id="r", route="/", model="m", adapter_id="", num_prompt_tokens=1, max_completion_tokens=1
    )
    meter = await books.open(one, demand, lambda headers: None)  # all of it is there for the request itself
    with pytest.raises(RequestsLimited):
        await apart(request, lambda: pytest.fail("refused work is not done"), is_long=True)
    meter.settle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/responses/input_tokens", {"input": LONG}),
        ("/v1/embeddings", {"input": LONG}),
        ("/generate", {"inputs": LONG}),
        ("/embed", {"inputs": LONG}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_long_prompt_of_a_tenant_without_requests_left_is_never_encoded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object]
) -> None:
    with gateway.admin() as admin:
        limits = {"name": f"long{path}", "limits": {"requests_per_minute": 1}}
        tenant = admin.post("/admin/v1/tenants", json=limits).json()["id"]
        key = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
    named = body if path in ("/generate", "/embed") else {**body, "model": BASE}
    with gateway.client(key) as client:
        used = client.post("/v1/completions", json={"model": BASE, "prompt": "x", "max_tokens": 1})
        assert used.status_code == 200, used.text
        for name in ("encode", "encode_chat"):
            monkeypatch.setattr(gateway.services.engine.tokenizer, name, lambda *_, **__: pytest.fail("encoded"))
        refused = client.post(path, json=named)
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert refused.headers["x-ratelimit-limit-requests"] == "1"
    if path.startswith("/v1/"):
        assert_problem(refused, 429, "rate_limit_exceeded")


def test_stored_response_of_a_large_body_needs_one_place_only(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        limits = {"name": "one place", "limits": {"concurrent_requests": 1}}
        tenant = admin.post("/admin/v1/tenants", json=limits).json()["id"]
        key = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
    items = [{"role": "user", "content": "x", "type": "message"} for _ in range(100)]
    body = json.dumps({"model": BASE, "input": items}) + " " * 70_000  # which makes it large
    with gateway.client(key) as client:
        made = client.post("/v1/responses", content=body, headers={"content-type": "application/json"})
        assert made.status_code == 200, made.text
        listed = client.get(f"/v1/responses/{made.json()['id']}/input_items").json()
    assert len(listed["data"]) == 20
    assert listed["has_more"]
