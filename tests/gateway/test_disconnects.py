"""Clients that leave, stall or break off: their place is free at once, and nobody is blamed for it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import BASE, Gateway, running, settings_in
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraplex.engines.protocol import GenerateRequest, TokenEvent

LONG = {"model": BASE, "messages": [{"role": "user", "content": "<slow>" + "x" * 300}]}


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway that sends its first comment after an hour."""
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    with running(settings_in(tmp_path, keep_alive_seconds=3600), "k") as gateway:
        gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
        yield gateway


def connect(gateway: Gateway, body: Any, *, length: int | None = None, receive_buffer: int | None = None) -> Any:
    """A socket with a chat request written to it, of `length` bytes as it claims."""
    url = httpx.URL(gateway.url)
    raw = json.dumps(body).encode()
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect((url.host, url.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
    client.sendall(head.encode() + f"Content-Length: {length or len(raw)}\r\n\r\n".encode() + raw)
    return client


def wait_for(holds: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_client_gone_before_the_first_token_frees_its_place(
    patient: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    entered, left = [], []

    async def never(request: GenerateRequest) -> Any:
        entered.append(request)
        try:
            await asyncio.sleep(3600)
            yield TokenEvent(request_id=request.request_id, token_ids=(), text="", step=0)
        finally:
            left.append(request)

    monkeypatch.setattr(patient.services.engine, "generate", never)
    client = connect(patient, {**LONG, "stream": stream})
    wait_for(lambda: entered, 5)
    assert not left
    client.close()
    wait_for(lambda: left, 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_client_gone_midway_is_aborted_and_counted(gateway: Gateway, stream: bool, how: str) -> None:
    before = gateway.stats()
    client = connect(gateway, {**LONG, "stream": stream})
    wait_for(lambda: gateway.stats().total_generated_tokens > before.total_generated_tokens + 2, 5)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()
    wait_for(lambda: gateway.stats().num_running == 0, 1)
    after = gateway.stats()
    assert after.total_aborted == before.total_aborted + 1
    assert after.total_finished == before.total_finished


def test_every_choice_of_a_client_that_leaves_is_aborted(gateway: Gateway) -> None:
    before = gateway.stats().total_aborted
    client = connect(gateway, {**LONG, "stream": True, "n": 5})
    wait_for(lambda: gateway.stats().num_running == 5, 5)
    client.close()
    wait_for(lambda: gateway.stats().num_running == 0, 1)
    assert gateway.stats().total_aborted == before + 5


def test_request_that_breaks_off_is_nobodys_error(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(gateway, LONG, length=10_000)
    time.sleep(0.1)
    client.close()
    time.sleep(0.2)
    with gateway.client() as other:
        assert other.get("/v1/models").status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_reader_that_stalls_is_cut_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "k")
    with running(settings_in(tmp_path, send_timeout_seconds=0.5), "k", send_buffer=4096) as gateway:
        _, gateway.api_key = gateway.new_tenant("tests")
        body = {**LONG, "stream": True, "n": 64, "logprobs": True}  # some 400 kB a second
        with connect(gateway, body, receive_buffer=4096) as client:
            wait_for(lambda: gateway.stats().num_running == 64, 5)
            wait_for(lambda: gateway.stats().num_running == 0, 5)  # the whole answer would take 15 seconds
            assert gateway.stats().total_aborted == 64
            received = b"".join(iter(lambda: client.recv(65536), b""))
        assert b"[DONE]" not in received
        with gateway.client() as other:
            assert other.get("/v1/models").status_code == 200
    assert "Traceback" not in caplog.text


def test_reader_that_is_slow_but_reads_is_served_to_the_end(gateway: Gateway) -> None:
    body = {"model": BASE, "stream": True, "messages": [{"role": "user", "content": "x" * 200}]}
    with connect(gateway, body, receive_buffer=4096) as client:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            time.sleep(0.01)
            received += client.recv(1024)
    assert b"data: [DONE]\n\n" in received


STAGES = ("connected", "in the line", "in a header", "before the body", "in the body", "asked", "begun", "at the end")


def leave(gateway: Gateway, stage: str, how: str, *, stream: bool) -> None:
    """Be a client up to this stage, and none any more."""
    url = httpx.URL(gateway.url)
    text = "<slow>" + "x" * (4 if stage == "at the end" else 300)
    body = json.dumps({**LONG, "messages": [{"role": "user", "content": text}], "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    sent = {"connected": 0, "in the line": 9, "in a header": 60, "before the body": -len(body), "in the body": -9}
    with socket.create_connection((url.host, url.port), timeout=20) as client:
        client.sendall(whole[: sent[stage]] if stage in sent else whole)
        if stage == "begun" and stream:
            client.recv(1)
        if stage == "at the end":
            received = b""
            while b"[DONE]" not in received and b"usage" not in received:
                received += client.recv(65536)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        elif how == "half":
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass


@pytest.fixture
def collects_soon() -> Iterator[None]:
    """What other tests left in the process is not looked through again at each collection: it would stop the loop."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


async def held(gateway: Gateway) -> tuple[int, int, int, int]:
    """What a gateway has of its clients: open meters, taken places, tasks, and connections since the test began."""
    gc.collect()
    # by type: asking every object of the process for its `__class__`, as isinstance does, runs code of other libraries
    connections = sum(issubclass(type(each), HttpToolsProtocol) for each in gc.get_objects())
    accounts: Any = gateway.services.accounts
    return len(accounts._open), sum(accounts._admission._store._slots.values()), len(asyncio.all_tasks()), connections


@pytest.mark.usefixtures("collects_soon")
@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_clients_that_leave_at_any_stage_leave_nothing_and_no_mark_on_a_neighbour(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A client that half-closes has left, too: what it can still read is what was sent by then."""

    def now() -> tuple[int, int, int, int]:
        return asyncio.run_coroutine_threadsafe(held(gateway), gateway.loop).result(10)

    tenant, own_key = gateway.new_tenant(f"leaving-{how}")
    leaving = dataclasses.replace(gateway, tenant_id=tenant, api_key=own_key)
    with gateway.admin() as admin:
        limits = {"concurrent_requests": 1000, "tokens_per_day": 10**9}
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    wait_for(lambda: now()[0] == 0, 5)
    text = "x" * 60
    with gateway.client() as neighbour, ThreadPoolExecutor(8) as pool:
        assert neighbour.get("/health").status_code == 200
        before = max(now() for _ in range(10))  # what keeps house has a task more from moment to moment
        assert before[:2] == (0, 0)
        body = {**LONG, "stream": True, "messages": [{"role": "user", "content": f"<slow>{text}"}]}
        with neighbour.stream("POST", "/v1/chat/completions", json=body) as stream:
            visits = [(stage, stream) for stage in STAGES for stream in (True, False) for _ in range(4)]
            list(pool.map(lambda visit: leave(leaving, visit[0], how, stream=visit[1]), visits))
            frames = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        told = "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])
        assert told == f"<slow>{text}"
        wait_for(lambda: gateway.stats().num_running == 0, 5)
        wait_for(lambda: all(left <= had for left, had in zip(now(), before, strict=True)), 5)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("stream", [True, False])
def test_request_that_is_over_leaves_no_cycle(gateway: Gateway, stream: bool) -> None:
    """`rest_garbage_collection` lets a server look for cycles seldom; a request must not need it."""

    def cyclic() -> set[str]:  # not the client's, which runs in this process too
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            found = {f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage}
            return {name for name in found if name.startswith(("loraplex", "uvicorn", "litestar", "sse_starlette"))}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    with gateway.client() as client:
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=body).status_code == 200
            wait_for(lambda: gateway.stats().num_running == 0, 5)
            left = cyclic()
        finally:
            gc.enable()
    assert left == set()
