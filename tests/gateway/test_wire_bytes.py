"""What goes over the socket, byte by byte: a chat of two tokens, streamed and not."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from support.gateway import BASE, Gateway, running, settings_in
from support.problems import assert_problem

from loraplex.gateway.openai.chat_wire import ChatRequest
from loraplex.gateway.openai.completions import CompletionRequest

HI: Any = [{"role": "user", "content": "hi"}]


def exchange(gateway: Gateway, head: str, body: bytes) -> tuple[str, bytes]:
    """(head, body) of the response to a request written by hand; the connection is closed after it."""
    url = httpx.URL(gateway.url)
    with socket.create_connection((url.host, url.port), timeout=10) as client:
        lines = [head, "Host: x", f"Authorization: Bearer {gateway.api_key}", "Connection: close", "", ""]
        client.sendall("\r\n".join(lines).encode() + body)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    raw_head, _, raw_body = received.partition(b"\r\n\r\n")
    return raw_head.decode().lower(), raw_body


def dechunk(raw: bytes) -> list[bytes]:
    """The chunks of a chunked body, the final empty one left out."""
    chunks = []
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        chunks.append(raw[: int(size, 16)])
        assert raw[int(size, 16) :].startswith(b"\r\n")
        raw = raw[int(size, 16) + 2 :]
    assert chunks.pop() == b""
    return chunks


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_is_exactly_these_bytes(gateway: Gateway, include_usage: bool) -> None:
    request = {"model": BASE, "messages": HI, "stream": True, "stream_options": {"include_usage": include_usage}}
    body = json.dumps(request).encode()
    head, raw = exchange(gateway, f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}", body)
    assert head.startswith("http/1.1 200 ")
    assert "content-type: text/event-stream" in head
    assert "cache-control: no-" in head
    stream = b"".join(dechunk(raw))
    found = re.match(rb'data: \{"id":"(chatcmpl-[0-9a-f]{24})","object":"[a-z.]+","created":(\d+),', stream)
    assert found is not None
    common = b'data: {"id":"%b","object":"chat.completion.chunk","created":%b,"model":"echo-base","choices":['
    beginning = common % found.groups()
    end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
    choices = [
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{"content":"h"},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{"content":"i"},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}',
    ]
    usage = (
        b'],"usage":{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
    )
    expected = b"".join(beginning + choice + end for choice in choices)
    expected += beginning + usage if include_usage else b""
    assert stream == expected + b"data: [DONE]\n\n"


@pytest.mark.parametrize("framing", ["Content-Length: 1025", "Transfer-Encoding: chunked"])
def test_body_over_the_limit_is_413_however_it_is_framed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    body = b" " * 1025 if "Length" in framing else b"401\r\n" + b" " * 1025 + b"\r\n0\r\n\r\n"
    with running(settings_in(tmp_path, max_body_bytes=1024), "k") as small:
        small.api_key = "k"
        head, raw = exchange(small, f"POST /v1/chat/completions HTTP/1.1\r\n{framing}", body)
    assert head.startswith("http/1.1 413 ")
    assert json.loads(raw)["error"]["code"] == "request_too_large"


def test_content_type_does_not_matter(gateway: Gateway) -> None:
    """Clients forget it, and the body says what it is."""
    with gateway.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
            body = json.dumps({"model": BASE, "messages": HI})
            response = client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/chat/completions"),
        ("GET", "/v1/completions"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models"),
        ("PATCH", "/admin/v1/tenants"),
        ("POST", "/health"),
    ],
)
def test_method_wrong_is_405(gateway: Gateway, method: str, path: str) -> None:
    with gateway.client() as client:
        assert_problem(client.request(method, path), 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/v1", "/v2/models", "/v1/chat", "/admin", "/schema"])
def test_path_unknown_is_404(gateway: Gateway, path: str) -> None:
    with gateway.client() as client:
        assert_problem(client.get(path), 404, "not_found")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"model":5}'])
def test_key_is_asked_for_before_the_body_is_read(gateway: Gateway, path: str, body: bytes) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert_problem(client.post(path, content=body), 401, "invalid_api_key")


@pytest.mark.parametrize("name", sorted(ChatRequest.not_offered))
def test_chat_field_not_offered_matters_or_is_harmless(gateway: Gateway, name: str) -> None:
    _refuses_all_but(gateway, "/v1/chat/completions", {"model": BASE, "messages": HI}, name, ChatRequest.not_offered)


@pytest.mark.parametrize("name", sorted(CompletionRequest.not_offered))
def test_completion_field_not_offered_matters_or_is_harmless(gateway: Gateway, name: str) -> None:
    _refuses_all_but(gateway, "/v1/completions", {"model": BASE, "prompt": "hi"}, name, CompletionRequest.not_offered)


def _refuses_all_but(
    gateway: Gateway, path: str, body: dict[str, Any], name: str, not_offered: dict[str, tuple[Any, ...]]
) -> None:
    with gateway.client() as client:
        for harmless in (None, *not_offered[name]):
            assert client.post(path, json={**body, name: harmless}).status_code == 200, harmless
        for matters in ("surely not", {"a": 1}, [1], 17):
            response = client.post(path, json={**body, name: matters})
            assert_problem(response, 400, "unsupported_parameter", name)


async def test_async_sdk_reads_answers_and_models(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        answer = await client.chat.completions.create(model=BASE, messages=HI, stop="i")
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("h", "stop")
        stream = await client.chat.completions.create(model="team/echo-one", messages=HI, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "team/echo-one: hi"
        assert [model.id async for model in client.models.list()] == [BASE, "team/echo-one"]
