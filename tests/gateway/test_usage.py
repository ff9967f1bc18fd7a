"""Usage as an admin, a tenant and a key see it: sums, downloads, and OpenAI's own shape through OpenAI's own client."""

from __future__ import annotations

import csv
import io
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.errors import EngineOverloaded
from loraplex.engines.protocol import GenerateRequest, TokenEvent

DAY = 86400


class Customer:
    """A tenant with a key for its admin and two that infer."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        with gateway.admin() as admin:
            self.id = admin.post("/admin/v1/tenants", json={"name": f"usage-{uuid.uuid4().hex[:12]}"}).json()["id"]
            path = f"/admin/v1/tenants/{self.id}/keys"
            made = [admin.post(path, json={"role": role}).json() for role in ("tenant-admin", "inference", "inference")]
        self.key_ids = [key["id"] for key in made]
        self.boss, self.one, self.two = (key["key"] for key in made)

    def ask(self, key: str, prompt: str, **fields: Any) -> Any:
        with self.gateway.client(key) as client:
            answer = client.post("/v1/completions", json={"model": BASE, "prompt": prompt, **fields})
            assert answer.status_code == 200, answer.text
            return answer.json()

    def usage(self, key: str, path: str = "", **params: Any) -> Any:
        with self.gateway.client(key) as client:
            return client.get(f"/admin/v1/usage{path}", params=params)


@pytest.fixture(scope="module")
def customer(gateway: Gateway) -> Customer:
    """Three requests: 3+4, 5+2 and 2+3 tokens."""
    customer = Customer(gateway)
    customer.ask(customer.one, "abc")
    customer.ask(customer.two, "abcde", max_tokens=2)
    customer.ask(customer.two, "ab", model="team/echo-one", max_tokens=3)
    return customer


def test_sums_are_there_as_soon_as_the_answer(customer: Customer) -> None:
    answer = customer.usage(customer.gateway.admin_key, tenant_id=customer.id)
    sums = {"num_requests": 3, "num_prompt_tokens": 10, "num_cached_tokens": 0, "num_completion_tokens": 9}
    assert answer.json() == {"data": [sums]}
    assert customer.usage(customer.boss).json() == {"data": [sums]}  # a tenant's admin sees its own


def test_sums_are_grouped_and_filtered(customer: Customer) -> None:
    found = customer.usage(customer.boss, group_by=["key", "model", "tenant", "day"]).json()["data"]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert {(one["day"], one["tenant_id"]) for one in found} == {(today, customer.id)}
    assert {(one["key_id"], one["model"]): one["num_prompt_tokens"] for one in found} == {
        (customer.key_ids[1], BASE): 3,
        (customer.key_ids[2], BASE): 5,
        (customer.key_ids[2], "team/echo-one"): 2,
    }
    (one,) = customer.usage(customer.boss, key_id=customer.key_ids[2], model=[BASE, "none"]).json()["data"]
    assert one["num_completion_tokens"] == 2
    assert customer.usage(customer.boss, last_day="2020-01-01", group_by="model").json()["data"] == []
    assert len(customer.usage(customer.boss, first_day=today, last_day=today, group_by="model").json()["data"]) == 2


def test_sums_as_csv(customer: Customer) -> None:
    answer = customer.usage(customer.boss, group_by="model", format="csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert list(csv.DictReader(io.StringIO(answer.text))) == [
        {"model": BASE, "num_requests": "2", "num_prompt_tokens": "8", "num_cached_tokens": "0",
         "num_completion_tokens": "6"},
        {"model": "team/echo-one", "num_requests": "1", "num_prompt_tokens": "2", "num_cached_tokens": "0",
         "num_completion_tokens": "3"},
    ]  # fmt: skip


def test_requests_are_downloaded_as_json_and_as_csv(customer: Customer) -> None:
    rows = customer.usage(customer.boss, "/requests").json()["data"]
    assert [(row["num_prompt_tokens"], row["num_completion_tokens"]) for row in rows] == [(3, 4), (5, 2), (2, 3)]
    assert {row["outcome"] for row in rows} == {"completed"}
    assert [bool(row["adapter_id"]) for row in rows] == [False, False, True]
    assert all(row["began_at"] <= row["first_token_at"] <= row["ended_at"] for row in rows)
    answer = customer.usage(customer.boss, "/requests", format="csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    read = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["request_id"] for row in read] == [row["request_id"] for row in rows]
    assert [float(row["began_at"]) for row in read] == [row["began_at"] for row in rows]
    assert list(read[0]) == list(rows[0])
    assert customer.usage(customer.boss, "/requests", first_day="2100-01-01").json() == {"data": []}


def test_failed_request_is_there_with_its_reason(gateway: Gateway) -> None:
    customer = Customer(gateway)
    with gateway.client(customer.one) as client:
        client.post("/v1/completions", json={"model": BASE, "prompt": "<fail> x"})
    (row,) = customer.usage(customer.boss, "/requests").json()["data"]
    assert (row["outcome"], row["num_completion_tokens"]) == ("GenerationFailed", 4)


def test_request_that_the_engine_sheds_costs_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gets none of what was generated, and is told to ask again."""
    customer, engine = Customer(gateway), gateway.services.engine
    generate = engine.generate

    async def shedding(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        async for event in generate(request):
            yield event
            if request.request_id.endswith("-1"):
                raise EngineOverloaded("1 requests are waiting already")

    monkeypatch.setattr(engine, "generate", shedding)
    with gateway.client(customer.one) as client:
        answer = client.post("/v1/completions", json={"model": BASE, "prompt": "abc", "n": 2})
    assert_problem(answer, 503, "engine_overloaded", None)
    (row,) = customer.usage(customer.boss, "/requests").json()["data"]
    assert row["outcome"] == "EngineOverloaded"
    assert (row["num_prompt_tokens"], row["num_cached_tokens"], row["num_completion_tokens"]) == (0, 0, 0)


def test_usage_outlives_its_tenant(gateway: Gateway) -> None:
    customer = Customer(gateway)
    customer.ask(customer.one, "abc")
    with gateway.admin() as admin:
        assert admin.delete(f"/admin/v1/tenants/{customer.id}").status_code == 204
        (one,) = admin.get("/admin/v1/usage", params={"tenant_id": customer.id}).json()["data"]
    assert one["num_prompt_tokens"] == 3


def test_foreign_usage_looks_nonexistent(customer: Customer, gateway: Gateway) -> None:
    other = Customer(gateway)
    for path in ("", "/requests"):
        assert_problem(other.usage(other.boss, path, tenant_id=customer.id), 404, "tenant_not_found")
        assert_problem(other.usage(other.one, path), 403, "not_allowed")
        assert_problem(other.usage("nonsense", path), 401, "invalid_api_key")
    assert other.usage(other.boss, "/requests", key_id=customer.key_ids[1]).json() == {"data": []}


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({"first_day": "yesterday"}, "invalid_request", "first_day"),
        ({"group_by": "colour"}, "invalid_request", "group_by[0]"),
        ({"format": "xml"}, "invalid_request", "format"),
        ({"since": "1"}, "unknown_parameter", "since"),
        ({"format": ["csv", "json"]}, "invalid_request", "format"),
        ({"tenant_id": "a\0b"}, "invalid_request", "tenant_id"),
    ],
)
def test_query_that_cannot_be_is_refused_by_name(
    customer: Customer, params: dict[str, Any], code: str, param: str
) -> None:
    assert_problem(customer.usage(customer.gateway.admin_key, **params), 400, code, param)


class OpenAI:
    """OpenAI's client over its usage endpoint."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self._client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, admin_api_key=key)

    def __call__(self, **params: Any) -> Any:
        params.setdefault("start_time", int(time.time()) // DAY * DAY)
        return self._client.admin.organization.usage.completions(**params)

    def close(self) -> None:
        self._client.close()


@pytest.mark.parametrize("width", ["1d", "1h", "1m"])
def test_openai_client_reads_usage(customer: Customer, width: Any) -> None:
    ask = OpenAI(customer.gateway, customer.boss)
    limit = {"1d": 1, "1h": 24, "1m": 1440}[width]
    page = ask(bucket_width=width, limit=limit, group_by=["project_id", "model"])
    ask.close()
    assert not page.has_more
    results = [result for bucket in page.data for result in bucket.results]
    assert {(one.project_id, one.model, one.input_tokens, one.output_tokens, one.num_model_requests)
            for one in results} == {(customer.id, BASE, 8, 6, 2), (customer.id, "team/echo-one", 2, 3, 1)}  # fmt: skip
    assert all(bucket.start_time < bucket.end_time for bucket in page.data)


def test_openai_pages_lead_through_every_bucket_once(customer: Customer) -> None:
    ask = OpenAI(customer.gateway, customer.gateway.admin_key)
    now = int(time.time())
    start = now - 5 * 3600
    seen, page_name = [], openai.omit
    while True:
        page = ask(start_time=start, end_time=now + 60, bucket_width="1h", limit=2, page=page_name,
                   project_ids=[customer.id])  # fmt: skip
        seen += page.data
        if not page.has_more:
            break
        page_name = page.next_page
    ask.close()
    assert [bucket.start_time for bucket in seen] == list(range(start // 3600 * 3600, now + 60, 3600))
    assert sum(result.num_model_requests for bucket in seen for result in bucket.results) == 3


def test_openai_usage_shows_each_role_its_own(customer: Customer, gateway: Gateway) -> None:
    def requests(key: str, **params: Any) -> int:
        ask = OpenAI(gateway, key)
        page = ask(**params)
        ask.close()
        return sum(result.num_model_requests for bucket in page.data for result in bucket.results)

    other = Customer(gateway)
    assert requests(customer.gateway.admin_key, project_ids=[customer.id]) == 3
    assert requests(customer.boss) == 3
    assert requests(customer.one) == 1
    assert requests(customer.two, models=[BASE]) == 1
    assert requests(customer.one, api_key_ids=[customer.key_ids[2]]) == 0
    assert requests(other.boss, project_ids=[customer.id]) == 0


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({}, "invalid_request", "start_time"),
        ({"start_time": "x"}, "invalid_request", "start_time"),
        ({"start_time": 5, "end_time": 5}, "invalid_request", "end_time"),
        ({"start_time": 5, "bucket_width": "1y"}, "invalid_request", "bucket_width"),
        ({"start_time": 5, "limit": 32}, "invalid_request", "limit"),
        ({"start_time": 5, "page": "page_7"}, "invalid_request", "page"),
        ({"start_time": 5, "group_by[]": "user_id"}, "unsupported_parameter", "group_by"),
        ({"start_time": 5, "user_ids[]": "u"}, "unsupported_parameter", "user_ids"),
        ({"start_time": 5, "batch": "true"}, "unsupported_parameter", "batch"),
    ],
)
def test_openai_usage_refuses_by_name(customer: Customer, params: dict[str, Any], code: str, param: str) -> None:
    with customer.gateway.client(customer.boss) as client:
        assert_problem(client.get("/v1/organization/usage/completions", params=params), 400, code, param)
