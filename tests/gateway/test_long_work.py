"""Long work before a request is counted: limits first, threads for every tenant."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial

import pytest
from support.asking import accounts, asked_by
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.auth.caller import Caller
from loraplex.auth.errors import RequestsLimited
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.metering import Demand
from loraplex.gateway.long_work import FairThreads
from loraplex.gateway.openai.dialogue import LONG_TEXT
from loraplex.gateway.prompts import apart

LONG = "x" * (LONG_TEXT + 1)


class Work:
    """Lasts until it is let go."""

    def __init__(self) -> None:
        self.goes, self.began = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.goes.wait(20)
        return "done"


def caller(name: str, **limits: int) -> Caller:
    policy = Policy(tenant=Limits(**limits))  # type: ignore[arg-type]
    return Caller(tenant_id=name, tenant_name=name, key_id=name, role="inference", policy=policy)


def noted(order: list[str], name: str) -> str:
    order.append(name)
    return name


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_owner_with_much_work_leaves_threads_to_others() -> None:
    threads = FairThreads(3, 2)
    heavy = [Work() for _ in range(6)]
    tasks = [asyncio.create_task(threads.do("heavy", work)) for work in heavy]
    await until(lambda: sum(work.began.is_set() for work in heavy) == 2)
    assert await threads.do("light", lambda: 7) == 7
    assert [work.began.is_set() for work in heavy] == [True, True, False, False, False, False]
    for work in heavy:
        work.goes.set()
    assert await asyncio.gather(*tasks) == ["done"] * 6


async def test_owners_take_turns() -> None:
    threads, first = FairThreads(1, 1), Work()
    order: list[str] = []
    tasks = [asyncio.create_task(threads.do("a", first))]
    await until(first.began.is_set)
    tasks += [asyncio.create_task(threads.do(name, partial(noted, order, name))) for name in "aaabbc"]
    await asyncio.sleep(0)
    first.goes.set()
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcaba"


async def test_thread_of_whom_left_is_free_when_its_work_is_over() -> None:
    threads, work = FairThreads(1, 1), Work()
    left = asyncio.create_task(threads.do("a", work))
    await until(work.began.is_set)
    waiting = [asyncio.create_task(threads.do("b", lambda: 1)) for _ in range(2)]
    await asyncio.sleep(0)
    left.cancel()
    waiting[0].cancel()
    await asyncio.wait([left, waiting[0]])
    assert left.cancelled()
    assert waiting[0].cancelled()
    assert not waiting[1].done()
    work.goes.set()
    assert await waiting[1] == 1
    assert await threads.do("a", lambda: 2) == 2


async def test_work_that_fails_gives_its_thread_back() -> None:
    threads = FairThreads(1, 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.do("a", lambda: 1 // 0)


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
