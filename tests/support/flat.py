"""LoRAX's shape of an error, asserted in one place."""

from __future__ import annotations

import httpx


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
