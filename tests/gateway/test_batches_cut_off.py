"""Lines of batches that are cut off, by whatever: each is answered once and paid for once."""

from __future__ import annotations

import asyncio
import itertools
import json
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
from support.gateway import Gateway, settings_in, wait_running

from loraplex.auth.caller import Caller
from loraplex.auth.store.tables import batches
from loraplex.config.settings import BatchSettings
from loraplex.engines.protocol import GenerateRequest, TokenEvent
from loraplex.gateway.batches import answering
from loraplex.gateway.batches.answering import Answerer
from loraplex.gateway.batches.lines import Line
from loraplex.gateway.batches.records import Answer, Batch, BatchRecords
from loraplex.gateway.batches.runner import BatchRunner
from loraplex.gateway.files.store import UNFINISHED
from loraplex.gateway.inner import post
from loraplex.gateway.services import Services, open_services

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


class Panic(BaseException):
    """As Rust's are: no Exception."""


@pytest.mark.parametrize("error", [Panic, KeyError])
def test_line_that_nobody_foresaw_has_an_error_and_the_batch_goes_on(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    ask = post

    async def fails(app: Any, path: str, body: bytes, *others: Any) -> Any:
        if b"poison" in body:
            raise error("a detail of the insides")
        return await ask(app, path, body, *others)

    monkeypatch.setattr(answering, "post", fails)
    with gateway.client() as client:
        batch = wait(client, begin(client, jsonl(*(request_line(text, text) for text in ("a", "poison", "b")))))
        good, bad = lines_of(client, batch["output_file_id"]), lines_of(client, batch["error_file_id"])
    assert (batch["status"], [line["custom_id"] for line in good]) == ("completed", ["a", "b"])
    (line,) = bad
    assert (line["custom_id"], line["response"]["status_code"]) == ("poison", 500)
    assert line["response"]["body"]["error"]["code"] == "internal_error"
    assert "insides" not in json.dumps(bad)
    assert "insides" in caplog.text


@pytest.mark.parametrize("num_innocent", [0, 20])
async def test_line_that_kills_gateways_is_told_so_and_the_batch_goes_on(tmp_path: Path, num_innocent: int) -> None:
    """Each takes the batch up from one that died; what runs beside the killer when they die is not blamed."""
    texts = [*(f"before {number}" for number in range(num_innocent)), "killer", "after"]
    async with open_services(settings_in(tmp_path)) as services:
        batch_id = await batch_of(services, jsonl(*(request_line(text, text) for text in texts)))
        for _ in range(8):  # five, unless an answer of a life that is over is still written in the next
            await live(services, batch_id)
        batch = await services.batches.get("", batch_id)
        told = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            assert file_id is not None
            for line in services.files.path("", file_id).read_text().splitlines():
                told[json.loads(line)["custom_id"]] = json.loads(line)["error"]
    assert batch.status == "completed"
    assert told.pop("killer") == {
        "code": "gateway_died",
        "message": "The gateway died 3 times while it worked on this.",
    }
    assert set(told.values()) == {None}
    assert set(told) == set(texts) - {"killer"}


async def test_batch_that_kills_gateways_before_its_first_line_fails(tmp_path: Path) -> None:
    async with open_services(settings_in(tmp_path)) as services:
        batch_id = await batch_of(services, jsonl(request_line("a")))
        for _ in range(3):  # and no more comes of it
            await BatchRecords(services.batches._database, services.files).claim(1, 0.0)
        await live(services, batch_id)
        batch = await services.batches.get("", batch_id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors[0].code == "gateway_died"


async def test_runner_ends_though_there_is_news_in_the_same_moment(tmp_path: Path) -> None:
    async with open_services(settings_in(tmp_path)) as services:
        runner = BatchRunner(services.batches, services.files, BatchSettings(), 2**20)
        runner.start(Fatal())
        await asyncio.sleep(0.3)
        runner.notice()
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await runner.close()


class Fatal(Answerer):
    """Answers by itself, but for the line that its gateway dies of."""

    def __init__(self) -> None:
        self.died = asyncio.Event()

    async def width(self, batch: Batch, most: int) -> int:
        return most

    async def answer(self, batch: Batch, line: Line) -> Answer:
        if line.custom_id == "killer":
            self.died.set()
        if self.died.is_set():
            await asyncio.Event().wait()
        return Answer(line=line.number, text=json.dumps({"custom_id": line.custom_id, "error": None}), is_error=False)


class Mortal(BatchRecords):
    """Of a gateway that does not let go of what it worked on."""

    async def release(self, batch_id: str) -> None:
        pass


async def live(services: Services, batch_id: str) -> None:
    """A gateway's life, until the batch is over or it dies of it."""
    records = Mortal(services.batches._database, services.files)
    runner, answerer = BatchRunner(records, services.files, BatchSettings(lease_seconds=0.3), 2**20), Fatal()
    runner.start(answerer)
    while not answerer.died.is_set() and (await records.get("", batch_id)).status in UNFINISHED:
        await asyncio.sleep(0.02)
    await runner.close()


async def batch_of(services: Services, content: bytes) -> str:
    """The id of an admin's batch over this input, which no gateway works on."""
    draft = await services.files.open_draft("")
    await draft.write(content)
    file = await services.files.keep(draft, "", "in.jsonl", "batch", None)
    await draft.close()
    admin = Caller(tenant_id="", tenant_name="", key_id="", role="admin")
    return (await services.batches.create(admin, "/v1/chat/completions", file.id, None, None)).id


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
