"""GET /metrics: what the gateway saw of requests, and the engine's own figures at the moment of the scrape.

The names beginning with `vllm:` are those that llm-d and the Gateway API inference extension route by.
"""

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from itertools import accumulate
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import Guard
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from loraplex.engines.protocol import SECONDS_BUCKETS, AdapterResidency, Engine, EngineStats, TokenEvent
from loraplex.gateway.guards import require_admin

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The gateway's own counts, by model name (only names the catalogue knows become labels)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "loraplex_requests", "Generations by outcome.", ["model", "outcome"], registry=self.registry
        )
        self._tokens = Counter("loraplex_generated_tokens", "Tokens generated.", ["model"], registry=self.registry)
        self._ttft = Histogram(
            "loraplex_time_to_first_token_seconds", "From submission to the first token.", ["model"],
            buckets=_TTFT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._gap = Histogram(
            "loraplex_inter_token_seconds", "Between the tokens of one answer.", ["model"],
            buckets=_GAP_BUCKETS, registry=self.registry,
        )  # fmt: skip

    async def watch(self, model: str, events: AsyncIterator[TokenEvent]) -> AsyncIterator[TokenEvent]:
        """The same events, counted; outcomes are `stop`, `length`, `aborted`, or the error's class."""
        tokens, gap = self._tokens.labels(model), self._gap.labels(model)
        outcome = "aborted"
        last = began = time.perf_counter()
        try:
            async with aclosing(events) as closing:  # type: ignore[type-var]
                async for event in closing:
                    now = time.perf_counter()
                    if last == began:
                        self._ttft.labels(model).observe(now - began)
                    else:
                        gap.observe(now - last)
                    last = now
                    tokens.inc(len(event.token_ids))
                    outcome = event.finish_reason or outcome
                    yield event
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._requests.labels(model, outcome).inc()

    @contextmanager
    def counted(self, model: str) -> Iterator[None]:
        """A request without tokens of its own; outcomes are `embedded`, `aborted`, or the error's class."""
        outcome = "aborted"
        try:
            yield
            outcome = "embedded"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._requests.labels(model, outcome).inc()


class _EngineCollector(Collector):
    """The engine's figures as metric families."""

    def __init__(self, stats: EngineStats, residency: list[AdapterResidency]) -> None:
        self._stats = stats
        self._residency = residency

    def collect(self) -> Iterable[Metric]:
        stats = self._stats
        used = stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0
        yield GaugeMetricFamily("vllm:num_requests_running", "Sequences in the current step.", stats.num_running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks held, from 0 to 1.", used)
        yield self._lora_info()
        yield from self._times()
        for name in EngineStats.__struct_fields__:
            value = getattr(stats, name)
            if not isinstance(value, int):
                continue
            if name.startswith("total_") or name in ("num_steps", "num_restarts"):
                plain = name.removeprefix("total_").removeprefix("num_")
                yield CounterMetricFamily(f"loraplex_engine_{plain}", "Since the engine process started.", value)
            else:
                yield GaugeMetricFamily(f"loraplex_engine_{name}", "At this moment.", value)
        tiers = GaugeMetricFamily("loraplex_adapter_bytes", "Bytes of an adapter and where they are.",
                                  labels=["adapter", "tier"])  # fmt: skip
        for found in self._residency:
            tiers.add_metric([found.name, found.tier], found.num_bytes)
        yield tiers

    def _times(self) -> Iterable[Metric]:
        phases = CounterMetricFamily("loraplex_engine_phase_seconds", "Time of steps by phase.", labels=["phase"])
        for phase, seconds in self._stats.phase_seconds.items():
            phases.add_metric([phase], seconds)
        yield phases
        for name, found, help in (
            ("step", self._stats.step_durations, "Whole steps of the engine."),
            ("queue", self._stats.wait_durations, "From a request's arrival to its first step."),
        ):
            bounds = [*(str(bound) for bound in SECONDS_BUCKETS), "+Inf"]
            buckets = list(zip(bounds, accumulate(found.counts), strict=True))
            yield HistogramMetricFamily(f"loraplex_engine_{name}_seconds", help, buckets, found.seconds)

    def _lora_info(self) -> Metric:
        wanted = [found for found in self._residency if found.num_requests]
        running = sorted({found.name for found in wanted if found.tier == "device"})
        waiting = sorted({found.name for found in wanted if found.tier != "device"})
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use; the value is the time.", labels=labels)
        info.add_metric([str(self._stats.num_adapters_on_device), ",".join(running), ",".join(waiting)], time.time())
        return info


def metric_routes(metrics: Metrics, engine: Engine, *, is_open: bool) -> list[HTTPRouteHandler]:
    """The handler of this resource; without `is_open` it takes an admin key."""
    guards: list[Guard] = [] if is_open else [require_admin]

    @get("/metrics", guards=guards)
    async def get_metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        registries = [metrics.registry]
        if engine.health().state == "ready":
            at_the_moment = CollectorRegistry()
            at_the_moment.register(_EngineCollector(await engine.stats(), await engine.residency()))
            registries.append(at_the_moment)
        if "application/json" in request.headers.get("accept", ""):
            return Response(_as_json(registries), media_type="application/json")
        shown = b"".join(generate_latest(registry) for registry in registries)
        return Response(shown, media_type=CONTENT_TYPE_LATEST)

    return [get_metrics]


def _as_json(registries: Iterable[CollectorRegistry]) -> bytes:
    """LoRAX's JSON: by name the type and the samples, each under what Prometheus would call it."""
    told = {
        family.name: {
            "type": family.type,
            "data": [{"key": _key(sample), "value": sample.value} for sample in family.samples],
        }
        for registry in registries
        for family in registry.collect()
    }
    return msgspec.json.encode(told)


def _key(sample: Sample) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name
