"""Every request that reaches the engine is begun once in the books and settled once, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.auth.metering import Entry, UsageRecord


class WitnessedEntry:
    """Implements `Entry`."""

    def __init__(self, witness: Witness, request_id: str) -> None:
        self._witness = witness
        self._request_id = request_id

    def progress(self, num_completion_tokens: int, num_cached_tokens: int) -> None:
        self._witness.told[self._request_id] = num_completion_tokens


class Witness:
    """Implements `Books` and remembers."""

    def __init__(self) -> None:
        self.begun: list[UsageRecord] = []
        self.told: dict[str, int] = {}
        self.settled: list[UsageRecord] = []
        self.news = threading.Condition()

    def begin(self, record: UsageRecord) -> Entry:
        self.begun.append(record)
        return WitnessedEntry(self, record.request_id)

    def settle(self, record: UsageRecord) -> None:
        with self.news:
            self.settled.append(record)
            self.news.notify_all()

    async def spent(self, tenant_id: str, key_id: str | None, since: float) -> int:
        return 0

    def wait(self) -> UsageRecord:
        with self.news:
            assert self.news.wait_for(lambda: self.settled, 20)
        return self.settled[-1]


@pytest.fixture
def books(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Witness]:
    witness = Witness()
    monkeypatch.setattr(gateway.services.accounts, "_books", witness)
    yield witness
    assert len(witness.begun) == len(witness.settled)


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_answer_is_settled_with_its_tokens(gateway: Gateway, books: Witness, stream: bool) -> None:
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=chat("hello", stream=stream, n=2)).status_code == 200
    record = books.wait()
    assert (record.tenant_id, record.model, record.adapter_id) == (gateway.tenant_id, BASE, "")
    assert (record.num_prompt_tokens, record.num_completion_tokens, record.outcome) == (5, 12, "completed")
    assert books.told == {record.request_id: 12}
    assert record.ended_at is not None
    assert record.first_token_at is not None
    assert record.began_at <= record.first_token_at <= record.ended_at


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "outcome"), [("<fail> x", "GenerationFailed"), ("<die> x", "EngineDied")])
def test_failure_is_settled_with_what_was_generated(
    gateway: Gateway, books: Witness, text: str, outcome: str, stream: bool
) -> None:
    with gateway.client() as client:
        client.post("/v1/chat/completions", json=chat(text, stream=stream))
    assert (books.wait().outcome, books.wait().num_completion_tokens) == (outcome, 4)


def test_stream_that_is_left_is_settled_as_aborted(gateway: Gateway, books: Witness) -> None:
    with gateway.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=chat("<slow>" + "x" * 100, stream=True)) as answer:
            next(answer.iter_lines())
    record = books.wait()
    assert record.outcome == "aborted"
    assert 0 < record.num_completion_tokens < 100


def test_request_refused_before_the_engine_is_in_no_book(gateway: Gateway, books: Witness) -> None:
    with gateway.client() as client:
        assert client.post("/v1/chat/completions", json=chat("x" * 1000)).status_code == 400
    assert books.begun == []


@pytest.mark.parametrize("stream", [False, True])
def test_database_that_vanishes_after_admission_is_503_and_holds_nothing(
    gateway: Gateway, books: Witness, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Keys changed since the caller was let in, and whether its own still lives cannot be asked."""
    tenants = gateway.services.tenants
    admission = gateway.services.accounts._admission
    reserve = admission.reserve

    async def gone(key_ids: object) -> set[str]:
        raise OperationalError("SELECT", None, OSError("postgresql://u:hush@h"))

    async def reserve_before_a_change(*arguments: Any) -> Any:
        reservation = await reserve(*arguments)
        tenants._authenticator.forget()
        return reservation

    with gateway.admin() as admin:
        body = {"name": f"vanishing-{stream}", "limits": {"concurrent_requests": 1}}
        tenant = admin.post("/admin/v1/tenants", json=body).json()["id"]
        key = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).json()["key"]
    with gateway.client(key) as client:
        with monkeypatch.context() as patch:
            patch.setattr(tenants._authenticator, "living", gone)
            patch.setattr(admission, "reserve", reserve_before_a_change)
            refused = client.post("/v1/chat/completions", json=chat("x", stream=stream))
        assert "hush" not in assert_problem(refused, 503, "keys_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (books.wait().outcome, books.wait().num_prompt_tokens) == ("KeysUnavailable", 0)
        assert client.post("/v1/chat/completions", json=chat("x")).status_code == 200  # the one place is free
