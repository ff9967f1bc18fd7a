"""An engine that fails: before the first token a status, after it a last frame; the log says which request it was."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.errors import EngineError
from loraplex.engines.protocol import GenerateRequest, TokenEvent
from loraplex.gateway.problems import TABLE

ROUTE = "/v1/chat/completions"
ENGINE_ERRORS = [error for error in TABLE if issubclass(error, EngineError)]


def chat(text: str, **changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **changes}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error", sorted(ENGINE_ERRORS, key=str))
def test_engine_error_before_the_first_token_is_its_status(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, error: type[EngineError], stream: bool
) -> None:
    async def refuse(request: GenerateRequest) -> Any:
        raise error("the reason in words")
        yield

    monkeypatch.setattr(gateway.services.engine, "generate", refuse)
    with gateway.client() as client:
        response = client.post(ROUTE, json=chat("x", stream=stream))
    row = TABLE[error]
    assert assert_problem(response, row.status, row.code) == "the reason in words"
    assert ("retry-after" in response.headers) is (row.retry_after is not None)


@pytest.mark.parametrize("tokens_before", [0, 1])
def test_unforeseen_exception_in_a_stream_tells_nothing_and_is_logged_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tokens_before: int
) -> None:
    async def break_down(request: GenerateRequest) -> Any:
        for _ in range(tokens_before):
            yield TokenEvent(request_id=request.request_id, token_ids=(65,), text="A", step=1)
        raise RuntimeError("an inner secret")

    monkeypatch.setattr(gateway.services.engine, "generate", break_down)
    with gateway.client() as client:
        response = client.post(ROUTE, json=chat("x", stream=True), headers={"x-request-id": "of-the-test"})
    if tokens_before:
        assert response.status_code == 200
        last = json.loads(response.content.split(b"\n\n")[-2].removeprefix(b"data: "))
        assert last["error"]["code"] == "internal_error"
        assert b"[DONE]" not in response.content
    else:
        assert_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    logged = [record for record in caplog.records if "an inner secret" in record.getMessage()]
    assert len(logged) == 1
    assert "of-the-test" in logged[0].getMessage()
    assert logged[0].exc_info is not None


def test_engine_death_midway_is_logged_without_a_traceback(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    with gateway.client() as client:
        client.post(ROUTE, json=chat("<die>......", stream=True), headers={"x-request-id": "of-the-test"})
    logged = [record for record in caplog.records if "of-the-test" in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info is None


def test_one_choice_that_fails_ends_the_whole_answer(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = gateway.services.engine.generate

    def sabotage(request: GenerateRequest) -> Any:
        if request.request_id.endswith("-1"):
            tokens = tuple(b"<fail>......")
            request = GenerateRequest(request_id="bad", prompt_token_ids=tokens, sampling=request.sampling)
        return generate(request)

    monkeypatch.setattr(gateway.services.engine, "generate", sabotage)
    with gateway.client() as client:
        response = client.post(ROUTE, json=chat("<slow>" + "x" * 100, n=3))
    assert_problem(response, 500, "generation_failed")
    deadline = time.monotonic() + 1
    while gateway.stats().num_running:
        assert time.monotonic() < deadline, "the other choices run on"


@pytest.mark.parametrize(("given", "kept"), [("abc.D_1-2", True), ("x" * 129, False), ("a b", False), ("a;b", False)])
def test_request_id_of_the_client_is_kept_if_sane(gateway: Gateway, given: str, kept: bool) -> None:
    with gateway.client() as client:
        found = client.get("/nowhere", headers={"x-request-id": given}).headers["x-request-id"]
    assert (found == given) is kept
    assert kept or found.startswith("req_")
