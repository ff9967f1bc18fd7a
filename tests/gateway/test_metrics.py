"""/metrics, read by prometheus-client's own parser."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.protocol import SECONDS_BUCKETS, Durations, EngineStats


def scrape(gateway: Gateway) -> dict[str, list[tuple[dict[str, str], float]]]:
    with gateway.admin() as admin:
        response = admin.get("/metrics")
    assert response.status_code == 200
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def test_metrics_count_requests_tokens_and_outcomes(gateway: Gateway) -> None:
    with gateway.client() as client:
        for prompt in ("abcd", "<fail>...."):
            client.post("/v1/chat/completions", json={"model": BASE, "messages": [{"role": "user", "content": prompt}]})
    found = scrape(gateway)
    assert ({"model": BASE, "outcome": "stop"}, 1.0) in found["loraplex_requests_total"]
    assert ({"model": BASE, "outcome": "GenerationFailed"}, 1.0) in found["loraplex_requests_total"]
    assert found["loraplex_generated_tokens_total"] == [({"model": BASE}, 5.0 + 4.0)]
    assert found["loraplex_time_to_first_token_seconds_count"] == [({"model": BASE}, 2.0)]
    assert found["loraplex_inter_token_seconds_count"] == [({"model": BASE}, 4.0 + 3.0)]


def test_metrics_show_what_routers_route_by(gateway: Gateway) -> None:
    with gateway.client() as client:
        body = {"model": "team/echo-one", "messages": [{"role": "user", "content": "<slow>xxxxxxxxxx"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            chunks = response.iter_bytes()
            next(chunks)
            found = scrape(gateway)
            assert found["vllm:num_requests_running"] == [({}, 1.0)]
            labels, _ = found["vllm:lora_requests_info"][0]
            assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("team/echo-one", "")
            for _ in chunks:
                pass
    assert scrape(gateway)["vllm:num_requests_running"] == [({}, 0.0)]


def test_metrics_take_an_admin_key(gateway: Gateway) -> None:
    with gateway.client() as client:
        assert_problem(client.get("/metrics"), 403, "not_allowed")


def test_engine_times_become_histograms(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gateway.services.engine
    stats = gateway.stats()
    durations = Durations(counts=(1, 2, *(0,) * (len(SECONDS_BUCKETS) - 2), 4), seconds=500.0)
    timed: EngineStats = msgspec.structs.replace(stats, step_durations=durations, phase_seconds={"forward": 1.5})

    async def timed_stats() -> EngineStats:
        return timed

    monkeypatch.setattr(engine, "stats", timed_stats)
    found = scrape(gateway)
    assert found["loraplex_engine_phase_seconds_total"] == [({"phase": "forward"}, 1.5)]
    buckets = {labels["le"]: value for labels, value in found["loraplex_engine_step_seconds_bucket"]}
    assert (buckets["0.0005"], buckets["0.001"], buckets["60.0"], buckets["+Inf"]) == (1, 3, 3, 7)
    assert found["loraplex_engine_step_seconds_sum"] == [({}, 500.0)]


def test_metrics_as_json_say_the_same(gateway: Gateway) -> None:
    with gateway.client() as client:
        client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    with gateway.admin() as admin:
        told = admin.get("/metrics", headers={"accept": "application/json"})
        lines = admin.get("/metrics").text.splitlines()
    assert told.headers["content-type"] == "application/json"
    families = told.json()
    assert all(list(family) == ["type", "data"] for family in families.values())
    [found] = [one for one in families["loraplex_generated_tokens"]["data"] if f'total{{model="{BASE}"}}' in one["key"]]
    assert families["loraplex_generated_tokens"]["type"] == "counter"
    assert f"{found['key']} {found['value']}" in lines
