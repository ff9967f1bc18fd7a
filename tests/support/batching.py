"""Input files of batches, and what came of them."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

OVER = {"completed", "failed", "expired", "cancelled"}


def request_line(custom_id: str, text: str = "hi", *, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    """One line of an input file: a chat that the echo engine answers with its own text."""
    messages = [{"role": "user", "content": text}]
    return {"custom_id": custom_id, "method": "POST", "url": url,
            "body": {"model": "echo-base", "messages": messages, **body}}  # fmt: skip


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: httpx.Client, content: bytes) -> str:
    parts = [("purpose", (None, "batch")), ("file", ("input.jsonl", content))]
    response = client.post("/v1/files", files=parts)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def begin(client: httpx.Client, content: bytes, endpoint: str = "/v1/chat/completions", **fields: Any) -> str:
    """The id of a batch over an input file."""
    body = {"input_file_id": upload(client, content), "endpoint": endpoint, "completion_window": "24h", **fields}
    response = client.post("/v1/batches", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def show(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
    return found


def wait(client: httpx.Client, batch_id: str, *, answered: int | None = None, seconds: float = 30) -> dict[str, Any]:
    """The batch once it is over, or once so many of its lines are answered."""
    deadline = time.monotonic() + seconds
    while True:
        batch = show(client, batch_id)
        counts = batch["request_counts"]
        if batch["status"] in OVER or (answered is not None and counts["completed"] + counts["failed"] >= answered):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def lines_of(client: httpx.Client, file_id: str | None) -> list[dict[str, Any]]:
    """What stands in an output or error file; nothing where there is none."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.get(f"/v1/files/{file_id}/content").content.splitlines()]


def text_of(line: dict[str, Any]) -> str:
    """What the answer to a chat says."""
    content: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return content
