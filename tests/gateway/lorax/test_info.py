"""LoRAX's health, start-up and information routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support.flat import assert_flat
from support.gateway import BASE, Gateway, running, settings_in

from loraplex.engines.errors import GenerationFailed
from loraplex.engines.protocol import GenerateRequest, Health, TokenEvent

FIELDS = {
    "model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag", "max_concurrent_requests",
    "max_best_of", "max_stop_sequences", "max_input_length", "max_total_tokens", "waiting_served_ratio",
    "max_batch_total_tokens", "max_waiting_tokens", "validation_workers", "eager_prefill", "version", "sha",
    "docker_label", "request_logger_url",
}  # fmt: skip


def test_info_has_loraxs_fields(gateway: Gateway) -> None:
    with gateway.client() as client:
        told = client.get("/info").json()
    assert set(told) == FIELDS
    assert (told["model_id"], told["max_input_length"], told["max_total_tokens"]) == (BASE, 511, 512)


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/startup"])
def test_health_without_a_key(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert client.get(path).status_code == 200
        sick = Health(state="restarting", detail="the engine process ended")
        monkeypatch.setattr(gateway.services.engine, "health", lambda: sick)
        found = client.get(path)
        assert found.status_code == 503
        assert (found.json()["error"], found.json()["error_type"]) == ("unhealthy", "healthcheck")
        assert found.json()["detail"] == "the engine process ended"


def test_startup_generates_until_it_has_worked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "an-admin-key-of-the-tests")
    with (
        running(settings_in(tmp_path), "an-admin-key-of-the-tests") as fresh,
        httpx.Client(base_url=fresh.url) as client,
    ):
        generate = fresh.services.engine.generate
        asked: list[GenerateRequest] = []

        def record(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
            asked.append(request)
            return generate(request)

        async def fail(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
            raise GenerationFailed("no token comes out")
            yield

        monkeypatch.setattr(fresh.services.engine, "generate", fail)
        assert "no token comes out" in assert_flat(client.get("/startup"), 424, "generation")
        monkeypatch.setattr(fresh.services.engine, "generate", record)
        assert [client.get("/startup").status_code for _ in range(3)] == [200] * 3
        assert [request.sampling.max_tokens for request in asked] == [1]


def test_engine_that_is_not_ready_is_told_as_such(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.services.engine, "health", lambda: Health(state="starting"))
    with gateway.client() as client:
        for path in ("/generate", "/"):
            refused = client.post(path, json={"inputs": "a"})
            assert_flat(refused, 424, "not_ready")
            assert refused.headers["retry-after"] == "1"
        assert_flat(client.get("/info"), 424, "not_ready")


@pytest.mark.parametrize("path", ["/classify", "/classify_batch"])
def test_classification_is_not_offered(gateway: Gateway, path: str) -> None:
    with gateway.client() as client:
        told = assert_flat(client.post(path, json={"inputs": "a"}), 422, "not_offered")
    assert path in told
