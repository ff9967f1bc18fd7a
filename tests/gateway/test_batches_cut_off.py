"""Lines of batches that are cut off, by whatever: each is answered once and paid for once."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from support.batching import begin, jsonl, lines_of, request_line, show, text_of, wait
from support.command_line import free_port, serving_at
from support.gateway import Gateway, wait_running

from loraplex.auth.store.tables import batches
from loraplex.engines.protocol import GenerateRequest, TokenEvent

SLOW = "<slow>" + "x" * 12  # most of a second


def test_batch_goes_on_after_the_gateway_was_killed_and_answers_each_line_once(tmp_path: Path) -> None:
    texts = {f"line-{number}": f"<slow>{number}" for number in range(60)}
    content = jsonl(*(request_line(custom_id, text) for custom_id, text in texts.items()))
    extra = f'[files]\ndirectory = "{tmp_path / "files"}"\n[batches]\nlease_seconds = 1\nmax_requests = 5\n'
    port = free_port()
    with serving_at(tmp_path, port, extra) as (process, admin):
        headers = headers_of_a_tenant(admin)
        with httpx.Client(base_url=admin.base_url, headers=headers) as client:
            batch_id = begin(client, content)
            before = wait(client, batch_id, answered=10)
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert before["status"] == "in_progress"
    with serving_at(tmp_path, port, extra) as (process, admin):
        with httpx.Client(base_url=admin.base_url, headers=headers) as client:
            resumed = show(client, batch_id)
            assert resumed["request_counts"]["completed"] >= before["request_counts"]["completed"]
            batch = wait(client, batch_id, seconds=60)
            found = lines_of(client, batch["output_file_id"])
        used = admin.get("/admin/v1/engine/stats").json()["total_finished"]
    assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    assert {line["custom_id"]: text_of(line) for line in found} == texts
    assert len(found) == 60
    assert used <= 60 - resumed["request_counts"]["completed"], "what had an answer was asked again"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "sigkill"])
def test_lines_that_the_end_of_a_gateway_cuts_off_are_interrupted_and_cost_nothing(
    tmp_path: Path, end: signal.Signals
) -> None:
    """They are asked again, and paid for then."""
    content = jsonl(*(request_line(f"line-{number}", SLOW) for number in range(12)))
    extra = f'[files]\ndirectory = "{tmp_path / "files"}"\n[batches]\nlease_seconds = 1\nmax_requests = 4\n'
    port = free_port()
    with serving_at(tmp_path, port, extra) as (process, admin):
        headers = headers_of_a_tenant(admin)
        with httpx.Client(base_url=admin.base_url, headers=headers) as client:
            batch_id = begin(client, content)
            wait(client, batch_id, answered=4)
            time.sleep(0.3)  # some tokens of the next ones
            process.send_signal(end)
            assert process.wait(20) == (0 if end == signal.SIGTERM else -end)
    with serving_at(tmp_path, port, extra) as (process, admin):
        with httpx.Client(base_url=admin.base_url, headers=headers) as client:
            assert wait(client, batch_id, seconds=60)["request_counts"]["completed"] == 12
        rows = admin.get("/admin/v1/usage/requests").json()["data"]
    cut = [row for row in rows if row["outcome"] == "interrupted"]
    assert {row["outcome"] for row in rows} == {"completed", "interrupted"}
    assert {(row["num_prompt_tokens"], row["num_completion_tokens"]) for row in cut} == {(0, 0)}
    assert len(rows) - len(cut) == 12


@pytest.mark.parametrize(("how", "status", "num_answered"), [("lease", "completed", 4), ("cancel", "cancelled", 0)])
def test_lines_that_are_cut_off_while_the_gateway_goes_on_cost_nothing(
    gateway: Gateway, how: str, status: str, num_answered: int
) -> None:
    tenant, key = gateway.new_tenant(f"cut-off-by-{how}")
    with gateway.admin() as admin, gateway.client(key) as client:
        batch_id = begin(client, jsonl(*(request_line(str(number), "<slow>" + "y" * 20) for number in range(4))))
        wait_running(gateway)
        time.sleep(0.2)  # some tokens
        if how == "lease":
            asyncio.run_coroutine_threadsafe(take_lease(gateway, batch_id, 1.0), gateway.loop).result(10)
        else:
            client.post(f"/v1/batches/{batch_id}/cancel")
        batch = wait(client, batch_id)
        rows = admin.get("/admin/v1/usage/requests", params={"tenant_id": tenant}).json()["data"]
    assert (batch["status"], batch["request_counts"]["completed"]) == (status, num_answered)
    assert sorted(row["outcome"] for row in rows) == ["completed"] * num_answered + ["interrupted"] * 4
    cut = [row for row in rows if row["outcome"] == "interrupted"]
    assert {(row["num_prompt_tokens"], row["num_completion_tokens"]) for row in cut} == {(0, 0)}


@pytest.mark.parametrize(("step", "call"), [("record", 1), ("look_up_id", 4)], ids=["answer", "key"])
def test_database_that_fails_for_a_moment_has_no_line_asked_twice(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    """An answer that it does not take at first, or a key that it cannot be asked about, while another line runs."""
    owner = gateway.services.batches if step == "record" else gateway.services.tenants._authenticator
    does, calls, asked = getattr(owner, step), itertools.count(1), []
    engine = gateway.services.engine
    generate = engine.generate

    async def fails_once(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OperationalError("INSERT", {}, OSError("the server closed the connection"))
        return await does(*arguments)

    def watching(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        asked.append(bytes(request.prompt_token_ids).decode())
        return generate(request)

    monkeypatch.setattr(owner, step, fails_once)
    monkeypatch.setattr(engine, "generate", watching)
    texts = ["quick", *(f"{SLOW}{number}" for number in range(3))]
    tenant, key = gateway.new_tenant(f"failing-{step}")
    with gateway.admin() as admin, gateway.client(key) as client:
        admin.put(f"/admin/v1/tenants/{tenant}/limits", json={"concurrent_requests": 4})  # two lines at a time
        batch = wait(client, begin(client, jsonl(*(request_line(text, text) for text in texts))))
        rows = admin.get("/admin/v1/usage/requests", params={"tenant_id": tenant}).json()["data"]
    assert next(calls) > call
    assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert sorted(asked) == sorted(texts)
    assert [row["outcome"] for row in rows] == ["completed"] * 4


async def take_lease(gateway: Gateway, batch_id: str, seconds: float) -> None:
    """As a gateway would that finds it run out, and is gone after so long."""
    other = {"owner": "gateway_other", "leased_until": time.time() + seconds}
    async with gateway.services.batches._database.begin() as connection:
        await connection.execute(update(batches).where(batches.c.id == batch_id).values(**other))


def headers_of_a_tenant(admin: httpx.Client) -> dict[str, str]:
    """Of a new one, with a key of its own."""
    tenant = admin.post("/admin/v1/tenants", json={"name": "t"}).json()["id"]
    key = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
    return {"Authorization": f"Bearer {key}"}
