"""/metrics, read by prometheus-client's own parser."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from support.gateway import BASE, Gateway
from support.problems import assert_problem

from loraplex.engines.errors import EngineDied
from loraplex.engines.protocol import Adapter, AdapterResidency, GenerateRequest, SamplingParams, TokenEvent
from loraplex.engines.stats import OTHERS, SECONDS_BUCKETS, Durations, EngineStats, TierStats
from loraplex.gateway import metrics
from loraplex.gateway.engine_metrics import EngineCollector, Moment
from loraplex.gateway.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


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
    assert ({"model": BASE, "adapter": "", "outcome": "stop"}, 1.0) in found["loraplex_requests_total"]
    assert ({"model": BASE, "adapter": "", "outcome": "GenerationFailed"}, 1.0) in found["loraplex_requests_total"]
    assert found["loraplex_generated_tokens_total"] == [({"model": BASE, "adapter": ""}, 5.0 + 4.0)]
    assert found["loraplex_time_to_first_token_seconds_count"] == [({"model": BASE, "adapter": ""}, 2.0)]
    assert found["loraplex_inter_token_seconds_count"] == [({"model": BASE, "adapter": ""}, 4.0 + 3.0)]


def test_metrics_say_what_they_are_as_prometheus_does(gateway: Gateway) -> None:
    """Prometheus 3 refuses a type that it cannot parse, such as one that says something twice."""
    with gateway.admin() as admin:
        told = [ask("/metrics").headers.get_list("content-type") for ask in (admin.get, admin.head)]
    assert told == [[CONTENT_TYPE_LATEST]] * 2


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
    [found] = [
        one
        for one in families["loraplex_generated_tokens"]["data"]
        if f'total{{adapter="",model="{BASE}"}}' in one["key"]
    ]
    assert families["loraplex_generated_tokens"]["type"] == "counter"
    assert f"{found['key']} {found['value']}" in lines


def test_docs_list_every_metric_and_no_other(gateway: Gateway) -> None:
    with gateway.client() as client:
        client.post("/v1/chat/completions", json={"model": BASE, "messages": [{"role": "user", "content": "a"}]})
    with gateway.admin() as admin:
        families = list(text_string_to_metric_families(admin.get("/metrics").text))
    served = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    served -= {name for name in served if name.endswith("_created")}
    listed = re.findall(r"^\| `([a-z_:]+)` \|", DOCS.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(served)


def test_disk_tier_counts_requests_that_find_files_and_transfers(gateway: Gateway) -> None:
    before = scrape(gateway)
    with gateway.client() as client:
        for _ in range(3):
            body = {"model": "team/echo-one", "messages": [{"role": "user", "content": "a"}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    after = scrape(gateway)

    def grown(name: str, **labels: str) -> float:
        was = sum(value for own, value in before.get(name, []) if own == labels)
        [now] = [value for own, value in after[name] if own == labels]
        return now - was

    name = "team/echo-one"
    assert grown("loraplex_tier_hits_total", tier="disk") == 3.0
    assert grown("loraplex_adapter_hits_total", adapter=name, tier="disk") == 3.0
    assert grown("loraplex_tier_misses_total", tier="disk") == 0.0
    assert grown("loraplex_requests_total", model=name, adapter=name, outcome="stop") == 3.0
    [misses] = [value for own, value in after["loraplex_tier_misses_total"] if own == {"tier": "disk"}]
    [loads] = [value for own, value in after["loraplex_tier_load_seconds_count"] if own == {"tier": "disk"}]
    assert misses == loads >= 1.0


def event(number: int) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=(1,), text="a", step=number, num_cached_tokens=2)


def test_names_beyond_the_bound_are_counted_together() -> None:
    metrics = Metrics(max_names=2)

    for name in ("a", "b", "c", "d", "a"):
        adapter = Adapter(id=name, name=name, path="")
        request = GenerateRequest(
            request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=1), adapter=adapter
        )
        with metrics.watching(name, request) as watch:
            watch.saw(event(1))
    value = metrics.registry.get_sample_value
    for name, count in (("a", 2.0), ("b", 1.0), (OTHERS, 2.0)):
        labels = {"model": name, "adapter": name}
        assert value("loraplex_generated_tokens_total", labels) == count
        assert value("loraplex_prompt_tokens_total", labels) == 3 * count
        assert value("loraplex_cached_prompt_tokens_total", labels) == 2 * count
    assert value("loraplex_generated_tokens_total", {"model": "c", "adapter": "c"}) is None


def resident(name: str, num_requests: int, num_running: int) -> AdapterResidency:
    return AdapterResidency(
        adapter_id=name, name=name, tier="device", pinned=False, num_bytes=10,
        num_requests=num_requests, num_running=num_running,
    )  # fmt: skip


def test_lora_info_tells_running_from_waiting_and_how_many_adapters_fit(gateway: Gateway) -> None:
    stats = msgspec.structs.replace(gateway.stats(), num_adapters_on_device=4)
    tiers = (TierStats(tier="device", num_adapters=4, num_bytes=40, capacity_bytes=75),)
    residency = (resident("a", 2, 2), resident("b", 2, 1), resident("c", 1, 0), resident("d", 0, 0))
    registry = CollectorRegistry()
    registry.register(EngineCollector(Moment(stats, residency, tiers, (), 10)))
    labels = {"max_lora": "7", "running_lora_adapters": "a,b", "waiting_lora_adapters": "b,c"}
    told = registry.get_sample_value("vllm:lora_requests_info", labels)
    assert told == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("trouble", ["silent", "ended"])
def test_gateway_tells_its_own_figures_where_the_engine_does_not(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    async def stats() -> EngineStats:
        if trouble == "ended":
            raise EngineDied("the engine's process ended")
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    monkeypatch.setattr(metrics, "_ENGINE_SECONDS", 0.2)
    monkeypatch.setattr(gateway.services.engine, "stats", stats)
    found = scrape(gateway)
    assert "loraplex_engine_step_seconds_sum" not in found
    assert "loraplex_requests_total" in found
