"""Every answer of every route of OpenAI's, held to the SDK's own types: nothing missing, wrong or unknown to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai.pagination import SyncCursorPage, SyncPage
from openai.types import (
    Batch,
    Completion,
    CreateEmbeddingResponse,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter
from support.batching import jsonl, request_line
from support.gateway import BASE, Gateway
from support.strict import strictly, unknown_fields

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hé"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
CALLS = {**CHAT, "messages": [{"role": "user", "content": CALL}], "tools": [TOOL]}
RESPONSE_TOOL = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
SLOW = request_line("a", "<slow>" + "x" * 40)  # a batch of it is not over before it is cancelled
BATCH = {"input_file_id": "{file}", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
CARD = frozenset({"root", "parent", "state", "max_model_len", "adapter"})
# what OpenAI's API answers with as well, and the SDK's types leave out
PAGE = frozenset({"object", "first_id", "last_id"})
STORE = frozenset({"store"})
OF_EVENTS = {"response.store", "name"}  # a call's name: the SDK's second major version demands it, the third lacks it


@dataclass(frozen=True)
class Row:
    """A request that succeeds, and the type of its answer. Words in braces are objects of the tenant's."""

    method: str
    path: str
    kind: Any
    body: Any = None
    beyond: frozenset[str] = frozenset()

    def __str__(self) -> str:
        said = ",".join(sorted(set(self.body) - {"model", "messages", "input", "prompt"})) if self.body else ""
        return f"{self.method} {self.path} {said}".strip()


ROWS = (
    Row("POST", "/v1/chat/completions", ChatCompletion, CHAT),
    Row("POST", "/v1/chat/completions", ChatCompletion, {**CHAT, "logprobs": True, "top_logprobs": 1, "n": 2}),
    Row("POST", "/v1/chat/completions", ChatCompletion, CALLS),
    Row("POST", "/v1/chat/completions", ChatCompletion, {**CHAT, "max_completion_tokens": 1, "service_tier": "flex"}),
    Row("POST", "/v1/completions", Completion, {"model": BASE, "prompt": "hé"}),
    # not both: an echoed prompt's first token has null for its probability, as OpenAI tells it, and the type knows none
    Row("POST", "/v1/completions", Completion, {"model": BASE, "prompt": ["a", "b"], "logprobs": 1}),
    Row("POST", "/v1/completions", Completion, {"model": BASE, "prompt": ["a", "b"], "echo": True}),
    Row("POST", "/v1/responses", Response, {"model": BASE, "input": "hé"}, beyond=STORE),
    Row(
        "POST",
        "/v1/responses",
        Response,
        {"model": BASE, "input": "hé", "max_output_tokens": 1, "store": False},
        beyond=STORE,
    ),
    Row("POST", "/v1/responses", Response, {"model": BASE, "input": CALL, "tools": [RESPONSE_TOOL]}, beyond=STORE),
    Row("POST", "/v1/responses/input_tokens", InputTokenCountResponse, {"model": BASE, "input": "hé"}),
    Row("GET", "/v1/responses/{response}", Response, beyond=STORE),
    Row("GET", "/v1/responses/{response}/input_items", SyncCursorPage[ResponseItem], beyond=PAGE),
    Row("POST", "/v1/embeddings", CreateEmbeddingResponse, {"model": BASE, "input": ["a", "b"]}),
    Row("GET", "/v1/models", SyncPage[Model], beyond=frozenset(f"data.{name}" for name in CARD)),
    Row("GET", f"/v1/models/{BASE}", Model, beyond=CARD),
    Row("GET", "/v1/models/team%2Fecho-one", Model, beyond=CARD),
    Row("DELETE", "/v1/models/{adapter}", ModelDeleted),
    Row("GET", "/v1/files", SyncCursorPage[FileObject], beyond=PAGE),
    Row("GET", "/v1/files/{file}", FileObject),
    Row("DELETE", "/v1/files/{file}", FileDeleted),
    Row("POST", "/v1/batches", Batch, BATCH),
    Row("GET", "/v1/batches", SyncCursorPage[Batch], beyond=PAGE),
    Row("GET", "/v1/batches/{batch}", Batch),
    Row("POST", "/v1/batches/{batch}/cancel", Batch),
)


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    """Of a key that may also delete its tenant's models."""
    with gateway.admin() as admin:
        path = f"/admin/v1/tenants/{gateway.tenant_id}/keys"
        key = admin.post(path, json={"role": "tenant-admin"}).json()["key"]
    with gateway.client(key) as client:
        yield client


def make(kind: str, gateway: Gateway, client: httpx.Client) -> str:
    """The id of a new object."""
    if kind == "response":
        made = client.post("/v1/responses", json={"model": BASE, "input": "hé"})
    elif kind == "batch":
        made = client.post("/v1/batches", json={**BATCH, "input_file_id": make("file", gateway, client)})
    elif kind == "adapter":
        body = {"name": "gone/soon", "source": str(gateway.adapter_dir / "shared"), "tenant_id": gateway.tenant_id}
        with gateway.admin() as admin:
            assert admin.post("/admin/v1/adapters", json=body).status_code == 201
        return "gone/soon"
    else:
        made = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", jsonl(SLOW))})
        strictly(FileObject, made)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_answer_is_strictly_the_sdks_type(gateway: Gateway, client: httpx.Client, row: Row) -> None:
    filled = re.sub(r"\{([a-z]+)\}", lambda match: make(match[1], gateway, client), json.dumps([row.path, row.body]))
    path, body = json.loads(filled)
    strictly(row.kind, client.request(row.method, path, json=body), extensions=row.beyond)


# a streamed completion is of no type of the SDK's: its own says that every choice has a reason for its end
@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/chat/completions", ChatCompletionChunk, {**CHAT, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", ChatCompletionChunk, {**CHAT, "logprobs": True, "top_logprobs": 1, "n": 2}),
        ("/v1/chat/completions", ChatCompletionChunk, CALLS),
        ("/v1/responses", ResponseStreamEvent, {"model": BASE, "input": "hé"}),
        ("/v1/responses", ResponseStreamEvent, {"model": BASE, "input": CALL, "tools": [RESPONSE_TOOL]}),
        ("/v1/responses", ResponseStreamEvent, {"model": BASE, "input": "<fail>......"}),
    ],
)
def test_frame_is_strictly_the_sdks_type(client: httpx.Client, path: str, kind: Any, body: dict[str, Any]) -> None:
    raw = client.post(path, json={**body, "stream": True}).content
    data = re.findall(rb"^data: (.*)$", raw, re.MULTILINE)
    frames = [frame for frame in data if frame != b"[DONE]"]
    assert len(frames) > 2
    for frame in frames:
        assert set(unknown_fields(TypeAdapter(kind).validate_json(frame, strict=True))) <= OF_EVENTS


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", {}, 400),
        ("POST", "/v1/chat/completions", {**CHAT, "colour": 1}, 400),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "nobody"}, 404),
        ("POST", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "<fail>......"}]}, 500),
        ("POST", "/v1/completions", {"model": BASE, "prompt": "x" * 600}, 400),
        ("POST", "/v1/embeddings", {"model": BASE, "input": []}, 400),
        ("POST", "/v1/responses", {"model": BASE, "input": "x", "background": True}, 400),
        ("GET", "/v1/responses/resp_0", None, 404),
        ("GET", "/v1/models/nobody", None, 404),
        ("DELETE", f"/v1/models/{BASE}", None, 400),
        ("DELETE", "/v1/models/nobody", None, 404),
        ("GET", "/v1/files/file-0", None, 404),
        ("GET", "/v1/batches/batch_0", None, 404),
        ("POST", "/v1/batches", {}, 400),
        ("PUT", "/v1/models", None, 405),
        ("GET", "/v1/nothing", None, 404),
    ],
)
def test_error_is_strictly_the_sdks_type(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    response = client.request(method, path, json=body)
    assert response.status_code == status, response.text
    told = response.json()
    assert set(told) == {"error"}
    strictly(ErrorObject, json.dumps(told["error"]).encode())
