"""Answers that are long as JSON: encoded in a thread, and settled once whatever their client does meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.work import Work

from loraplex.gateway import embedder
from loraplex.gateway.lorax.replies import LoraxWire
from loraplex.gateway.openai import answers
from loraplex.gateway.openai.chat_stream import ChatWire, SpokenWire
from loraplex.gateway.openai.completions import _CompletionWire
from loraplex.gateway.openai.responses_stream import ResponseWire

TEXT = "x" * 240
CHAT = {"model": BASE, "messages": [{"role": "user", "content": TEXT}]}
TOOL = {"type": "function", "function": {"name": "weather"}}
LOGPROBS = ["message.output_text.logprobs"]


def noting(place: Any, name: str, monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = str) -> list[bool]:
    """Of each call: whether a thread of long work made it."""
    found: list[bool] = []
    original = getattr(place, name)

    def noted(*given: Any) -> Any:
        found.append(threading.current_thread().name.startswith("long-work"))
        before()
        return original(*given)

    monkeypatch.setattr(place, name, noted)
    return found


@pytest.mark.parametrize(
    ("wire", "path", "body", "longer"),
    [
        (ChatWire, "/v1/chat/completions", CHAT, {"n": 5}),
        (ChatWire, "/v1/chat/completions", CHAT, {"n": 2, "logprobs": True, "top_logprobs": 2}),
        (SpokenWire, "/v1/chat/completions", {**CHAT, "tools": [TOOL]}, {"n": 5}),
        (_CompletionWire, "/v1/completions", {"model": BASE, "prompt": TEXT, "max_tokens": 240}, {"n": 5}),
        (
            _CompletionWire,
            "/v1/completions",
            {"model": BASE, "prompt": "x" * 500, "max_tokens": 1},
            {"prompt_logprobs": 3},
        ),
        (ResponseWire, "/v1/responses", {"model": BASE, "input": TEXT}, {"include": LOGPROBS, "top_logprobs": 3}),
        (
            LoraxWire,
            "/generate",
            {"inputs": TEXT, "parameters": {"max_new_tokens": 240}},
            {"best_of": 3, "do_sample": True},
        ),
    ],
)
def test_long_answer_is_encoded_in_a_thread_and_a_short_one_is_not(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, wire: Any, path: str, body: dict[str, Any], longer: Any
) -> None:
    monkeypatch.setattr(answers, "LONG_ANSWER", 500)  # the echo engine's contexts are small
    found = noting(wire, "whole", monkeypatch)
    fuller = {**body, **longer} if path != "/generate" else {**body, "parameters": {**body["parameters"], **longer}}
    with gateway.client() as client:
        for asked in (body, fuller):
            answer = client.post(path, json=asked)
            assert answer.status_code == 200, answer.text
    assert found == [False, True]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_many_vectors_are_encoded_in_a_thread(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    found = noting(embedder, "_shortened", monkeypatch)
    with gateway.client() as client:
        one = client.post("/v1/embeddings", json={"model": BASE, "input": "a", "encoding_format": encoding}).json()
        assert found == [False]
        many = client.post("/v1/embeddings", json={"model": BASE, "input": ["a"] * 2048, "encoding_format": encoding})
    assert set(found[1:]) == {True}
    assert [vector["embedding"] for vector in many.json()["data"]] == [one["data"][0]["embedding"]] * 2048


def test_client_that_leaves_while_its_answer_is_encoded_is_settled_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, key = gateway.new_tenant(f"leaves-{uuid.uuid4().hex[:8]}")
    with gateway.admin() as admin:
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"concurrent_requests": 1})
        work = Work()
        with monkeypatch.context() as patch:
            noting(ChatWire, "whole", patch, work)
            raw = json.dumps({**CHAT, "n": 5}).encode()
            with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
                connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
                assert work.began.wait(20)
            deadline = time.monotonic() + 20

            def rows() -> list[Any]:
                found: list[Any] = admin.get("/admin/v1/usage/requests", params={"tenant_id": tenant}).json()["data"]
                return found

            while not rows():  # before the thread is through
                assert time.monotonic() < deadline
                time.sleep(0.02)
            work.goes.set()
        with gateway.client(key) as client:  # its only place is free again
            assert client.post("/v1/chat/completions", json={**CHAT, "n": 5}).status_code == 200
        while len(rows()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert sorted((row["outcome"], row["num_completion_tokens"]) for row in rows()) == [
            ("aborted", 1205),
            ("completed", 1205),
        ]
