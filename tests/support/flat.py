"""LoRAX's wire in one place: a request, and the shape of an error."""

from __future__ import annotations

from typing import Any

import httpx
from support.gateway import Gateway


def assert_flat(response: httpx.Response, status: int, error_type: str) -> str:
    """`{"error", "error_type"}` and nothing beside it; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body: dict[str, str] = response.json()
    assert list(body) == ["error", "error_type"]
    assert body["error_type"] == error_type, body
    assert body["error"]
    return body["error"]


def post(gateway: Gateway, path: str, inputs: str, stream: bool | None = None, **parameters: Any) -> httpx.Response:
    with gateway.client() as client:
        body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
        return client.post(path, json=body if stream is None else {**body, "stream": stream})
