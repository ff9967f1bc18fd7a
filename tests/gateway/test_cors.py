"""Pages of other origins: every answer says who may read it, as a browser checks that and as Starlette would say it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from support.gateway import BASE, Gateway, running, settings_in

PAGE, OTHER = "https://app.example.com", "http://localhost:5173"
SETTINGS: dict[str, tuple[str, ...]] = {"any": ("*",), "listed": (PAGE, OTHER), "other": (OTHER,), "none": ()}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
# what the OpenAI SDK for browsers sends
WANTED = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"


@contextmanager
def serving(home: Path, origins: tuple[str, ...] | None) -> Iterator[Gateway]:
    """Of `None` with the setting left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
        said: dict[str, Any] = {} if origins is None else {"cors_origins": origins}
        with running(settings_in(home, **said), "k") as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("pages")
            yield gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """As it is without a setting."""
    with serving(tmp_path_factory.mktemp("cors"), None) as gateway:
        yield gateway


@pytest.fixture(scope="module", params=SETTINGS)
def origins_and_gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[str, ...], Gateway]]:
    origins = SETTINGS[request.param]
    with serving(tmp_path_factory.mktemp("cors"), origins) as gateway:
        yield origins, gateway


def may_read(answer: httpx.Response, origin: str) -> bool:
    """The Fetch standard's "CORS check" of a request whose browser adds no credentials."""
    return answer.headers.get("access-control-allow-origin") in ("*", origin)


def may_send(answer: httpx.Response, origin: str, method: str, wanted: str) -> bool:
    """Its check of a preflight's answer; `*` never stands for Authorization, which we always want."""
    methods = [one.strip() for one in answer.headers.get("access-control-allow-methods", "").split(",")]
    headers = [one.strip().lower() for one in answer.headers.get("access-control-allow-headers", "").split(",")]
    is_good = may_read(answer, origin) and 200 <= answer.status_code < 300
    return is_good and method in methods and set(wanted.split(",")) <= set(headers)


def preflight(gateway: Gateway, path: str, origin: str = PAGE, method: str = "POST", **headers: str) -> httpx.Response:
    """Without a key, as browsers send it."""
    asked = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": WANTED}
    return httpx.request("OPTIONS", gateway.url + path, headers={**asked, **headers})


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
@pytest.mark.parametrize("origin", [PAGE, OTHER, "https://evil.example.com", "null", PAGE + ".evil.com"])
async def test_origin_is_let_in_as_starlette_lets_it(
    origins_and_gateway: tuple[tuple[str, ...], Gateway], origin: str, method: str
) -> None:
    origins, gateway = origins_and_gateway
    reference = CORSMiddleware(PlainTextResponse("x"), allow_origins=origins, allow_headers=WANTED.split(","))
    headers = {"origin": origin}
    if method == "OPTIONS":
        headers |= {"access-control-request-method": "POST", "access-control-request-headers": WANTED}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(reference), base_url="http://reference") as client:
        expected = await client.request(method, "/", headers=headers)
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        answer = await client.request(method, "/health", headers=headers)
    said = "access-control-allow-origin"
    assert answer.headers.get(said) == expected.headers.get(said)
    assert may_read(answer, origin) is may_read(expected, origin) is ("*" in origins or origin in origins)
    is_varied = "origin" in answer.headers.get("vary", "").lower()
    assert is_varied is bool(origins and "*" not in origins)  # or a cache would give one page's answer to another


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/chat/completions", "POST"),
        ("/v1/responses", "POST"),
        ("/v1/models", "GET"),
        ("/v1/files/file-1", "DELETE"),
        ("/generate", "POST"),
        ("/v1/nothing", "POST"),
    ],
)
def test_preflight_without_a_key_lets_a_page_send_its_own(gateway: Gateway, path: str, method: str) -> None:
    answer = preflight(gateway, path, method=method)
    assert may_send(answer, PAGE, method, WANTED)
    assert answer.content == b""
    assert int(answer.headers["access-control-max-age"]) > 0
    assert answer.headers["x-request-id"].startswith("req_")
    assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-private-network" not in answer.headers


def test_options_that_is_no_preflight_is_the_routes_own(gateway: Gateway) -> None:
    answer = httpx.options(f"{gateway.url}/v1/chat/completions", headers={"origin": PAGE})
    assert "POST" in answer.headers["allow"]
    assert may_read(answer, PAGE)


ANSWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "answered": (200, {"path": "/v1/chat/completions", "json": CHAT}),
    "streamed": (200, {"path": "/v1/chat/completions", "json": {**CHAT, "stream": True}}),
    "streamed by LoRAX": (200, {"path": "/generate_stream", "json": {"inputs": "x"}}),
    "malformed": (400, {"path": "/v1/chat/completions", "json": {}}),
    "no key": (401, {"path": "/v1/chat/completions", "json": CHAT, "key": "sk-nobody"}),
    "no model": (404, {"path": "/v1/chat/completions", "json": {**CHAT, "model": "nobody"}}),
    "no route": (404, {"path": "/v1/nothing", "json": {}}),
    "no such method": (405, {"path": "/v1/models", "json": {}}),
    "too large": (413, {"path": "/v1/chat/completions", "json": {"model": "x" * 17 * 2**20}}),
    "LoRAX's error": (404, {"path": "/generate", "json": {"inputs": "x", "parameters": {"adapter_id": "nobody"}}}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_page_may_read_every_answer_and_its_headers(gateway: Gateway, name: str) -> None:
    status, asked = ANSWERS[name]
    with gateway.client(asked.get("key")) as client:
        answer = client.post(asked["path"], json=asked["json"], headers={"origin": PAGE})
    assert answer.status_code == status, answer.text
    assert may_read(answer, PAGE)
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]  # a browser refuses two
    assert answer.headers["access-control-expose-headers"] == "*"  # x-request-id, x-ratelimit-*, retry-after and all
    assert answer.headers["x-request-id"]


def test_page_may_read_that_a_limit_is_reached_and_when_to_come_again(gateway: Gateway) -> None:
    tenant, key = gateway.new_tenant("limited pages")
    with gateway.admin() as admin:
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"requests_per_minute": 1}).status_code == 200
    with gateway.client(key) as client:
        answers = [client.post("/v1/chat/completions", json=CHAT, headers={"origin": PAGE}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert all(may_read(answer, PAGE) for answer in answers)
    assert {"retry-after", "x-ratelimit-limit-requests", "access-control-expose-headers"} <= set(answers[1].headers)


def test_page_may_read_what_is_replayed(gateway: Gateway) -> None:
    with gateway.client() as client:
        headers = {"origin": PAGE, "idempotency-key": "page"}
        for _ in range(2):
            answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert may_read(answer, PAGE)
    assert answer.headers["idempotent-replayed"] == "true"


def test_what_is_no_page_is_told_nothing(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer = client.post("/v1/chat/completions", json=CHAT)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    [
        "/admin/v1/tenants",
        "/admin/v1/nothing",
        "/metrics",
        "/v1/load_lora_adapter",
        "/v1/organization/usage/completions",
    ],
)
def test_what_administers_answers_no_page(gateway: Gateway, path: str) -> None:
    assert not may_send(preflight(gateway, path), PAGE, "POST", WANTED)
    assert not may_read(preflight(gateway, path), PAGE)
    with gateway.admin() as admin:
        assert not may_read(admin.get(path, headers={"origin": PAGE}), PAGE)
