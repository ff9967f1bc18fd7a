"""/v1/embeddings with the official SDK over the echo engine, and what limits and books make of it."""

from __future__ import annotations

import asyncio
import base64
import math
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.protocol import Embedding, EmbedRequest


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def post(gateway: Gateway, key: str | None = None, **body: Any) -> Any:
    with gateway.client(key) as client:
        return client.post("/v1/embeddings", json={"model": BASE, "input": "abc", **body})


@pytest.mark.parametrize(
    ("said", "num"),
    [("abc", 1), (["abc", "abc"], 2), ([97, 98, 99], 1), ([[97, 98, 99], [97, 98, 99], [97, 98, 99]], 3)],
    ids=str,
)
@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit], ids=["float", "base64", "sdk default"])
def test_input_in_each_form_and_encoding(client: OpenAI, said: Any, num: int, encoding: Any) -> None:
    answer = client.embeddings.create(model=BASE, input=said, encoding_format=encoding)
    assert (answer.object, answer.model) == ("list", BASE)
    assert [one.index for one in answer.data] == list(range(num))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3 * num, 3 * num)
    vectors: list[Any] = [one.embedding for one in answer.data]
    if encoding == "base64":  # the SDK decodes it only where it asked for it by itself
        vectors = [struct.unpack(f"<{len(base64.b64decode(one)) // 4}f", base64.b64decode(one)) for one in vectors]
    expected = client.embeddings.create(model=BASE, input="abc", encoding_format="float").data[0].embedding
    for vector in vectors:
        assert list(vector) == pytest.approx(expected, abs=1e-7)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_adapter_has_vectors_of_its_own(client: OpenAI) -> None:
    base = client.embeddings.create(model=BASE, input="abc").data[0].embedding
    adapter = client.embeddings.create(model="team/echo-one", input="abc")
    assert adapter.model == "team/echo-one"
    assert adapter.data[0].embedding != base


def test_dimensions_are_the_first_ones_at_length_one(client: OpenAI) -> None:
    whole = client.embeddings.create(model=BASE, input="abc").data[0].embedding
    short = client.embeddings.create(model=BASE, input="abc", dimensions=3).data[0].embedding
    length = math.hypot(*whole[:3])
    assert short == pytest.approx([value / length for value in whole[:3]], abs=1e-6)
    raw = client.embeddings.create(model=BASE, input="abc", dimensions=3, extra_body={"normalize": False})
    unscaled = client.embeddings.create(model=BASE, input="abc", extra_body={"normalize": False})
    assert raw.data[0].embedding == unscaled.data[0].embedding[:3]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooling_reaches_the_engine(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    asked: list[EmbedRequest] = []
    embed = gateway.services.engine.embed

    async def record(request: EmbedRequest) -> Embedding:
        asked.append(request)
        return await embed(request)

    monkeypatch.setattr(gateway.services.engine, "embed", record)
    assert post(gateway, pooling=pooling, normalize=False, model="team/echo-one", user="someone").status_code == 200
    assert post(gateway).status_code == 200
    assert [(request.pooling, request.normalize) for request in asked] == [(pooling, False), ("mean", True)]
    assert [request.tenant for request in asked] == [gateway.tenant_id] * 2
    assert [part.adapter.name for part in asked[0].parts] == ["team/echo-one"]


def test_files_of_the_adapter_are_kept_on_disk_until_it_is_answered(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eviction is tried while the request runs: the last thing that could take the files from under the engine."""
    embed, disk = gateway.services.engine.embed, gateway.services.store._disk
    is_gone: list[bool] = []

    async def evict(request: EmbedRequest) -> Embedding:
        [part] = request.parts
        is_gone.append(await asyncio.to_thread(disk.drop, part.adapter.id))
        return await embed(request)

    monkeypatch.setattr(gateway.services.engine, "embed", evict)
    assert post(gateway, model="team/echo-one", input=["a", "b"]).status_code == 200
    assert is_gone == [False, False]
    monkeypatch.undo()
    with gateway.admin() as admin:
        [adapter] = [one for one in admin.get("/admin/v1/adapters").json()["data"] if one["name"] == "team/echo-one"]
    assert disk.drop(adapter["adapter_id"]), "nobody holds it any more"
    assert post(gateway, model="team/echo-one").status_code == 200, "it was fetched again"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_request"),
        ({"input": []}, "input", "invalid_request"),
        ({"input": ["a", ""]}, "input", "invalid_request"),
        ({"input": [[]]}, "input", "invalid_request"),
        ({"input": ["a", 1]}, "input", "invalid_request"),
        ({"input": [257]}, "input", "invalid_request"),
        ({"input": [-1]}, "input", "invalid_request"),
        ({"input": ["a"] * 2049}, "input", "invalid_request"),
        ({"input": "a" * 513}, "input", "context_length_exceeded"),
        ({"input": None}, "input", "invalid_request"),
        ({"dimensions": 0}, "dimensions", "invalid_request"),
        ({"dimensions": 10**6}, "dimensions", "invalid_request"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_request"),
        ({"pooling": "max"}, "pooling", "invalid_request"),
        ({"truncate": 5}, "truncate", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_request_refused_by_name(gateway: Gateway, body: dict[str, Any], param: str, code: str) -> None:
    assert_problem(post(gateway, **body), 400, code, param)


def test_model_unknown_is_404(gateway: Gateway) -> None:
    assert_problem(post(gateway, model="none"), 404, "model_not_found", "model")


def test_many_inputs_come_back_in_order(client: OpenAI) -> None:
    texts = [f"text {number}" for number in range(300)]
    answer = client.embeddings.create(model=BASE, input=texts, encoding_format="float")
    backwards = client.embeddings.create(model=BASE, input=texts[::-1], encoding_format="float")
    assert [one.embedding for one in backwards.data] == [one.embedding for one in answer.data][::-1]
    assert answer.data[0].embedding != answer.data[299].embedding
    for number in (0, 150, 299):
        alone = client.embeddings.create(model=BASE, input=texts[number], encoding_format="float")
        assert answer.data[number].embedding == alone.data[0].embedding


def test_one_that_fails_fails_the_request_and_costs_nothing(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("embeddings-fail")
    with gateway.admin() as admin:
        limits = {"tokens_per_day": 7}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    assert_problem(post(gateway, key, input=["a", "<fail>"]), 500, "generation_failed")
    assert post(gateway, key, input="abcdefg").status_code == 200
    assert_problem(post(gateway, key, input="a"), 429, "insufficient_quota")


def test_limits_count_the_prompts_alone(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("embeddings-limits")
    with gateway.admin() as admin:
        limits = {"tokens_per_day": 10, "output_tokens_per_minute": 1}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    assert post(gateway, key, input=["abc", "de"]).status_code == 200
    assert post(gateway, key, input="fghij").status_code == 200
    assert_problem(post(gateway, key, input="k"), 429, "insufficient_quota")


def test_key_that_is_revoked_ends_the_request(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant, _ = gateway.new_tenant("embeddings-revoked")
    with gateway.admin() as admin:
        made = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()
        began = threading.Event()

        async def never(request: EmbedRequest) -> Embedding:
            began.set()
            await asyncio.Event().wait()
            raise AssertionError("it is cancelled")

        monkeypatch.setattr(gateway.services.engine, "embed", never)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, gateway, made["key"])
            assert began.wait(30)
            assert admin.delete(f"/admin/v1/tenants/{tenant}/keys/{made['id']}").status_code == 204
            assert_problem(waiting.result(30), 401, "invalid_api_key")


def test_client_that_leaves_ends_its_embeddings(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = threading.Event(), threading.Event()

    async def never(request: EmbedRequest) -> Embedding:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("it is cancelled")

    monkeypatch.setattr(gateway.services.engine, "embed", never)
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        body = b'{"model":"echo-base","input":"x"}'
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert began.wait(30)
    assert ended.wait(30)
