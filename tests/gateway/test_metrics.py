"""/metrics, read by prometheus-client's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from support.gateway import BASE, Gateway
from support.problems import assert_problem


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
