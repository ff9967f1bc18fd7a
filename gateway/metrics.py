"""GET /metrics: what the gateway saw of requests, and the engine's own figures at the moment of the scrape.

The names beginning with `vllm:` are those that llm-d and the Gateway API inference extension route by.
`docs/metrics.md` lists every metric.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import Guard
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from loraplex.engines.errors import EngineError
from loraplex.engines.figures import DurationCounts
from loraplex.engines.protocol import EmbedRequest, Engine, GenerateRequest, TokenEvent
from loraplex.engines.stats import OTHERS
from loraplex.gateway.engine_metrics import EngineCollector, Moment, buckets
from loraplex.gateway.guards import require_admin
from loraplex.gateway.holding import DiskTier

COMPOSITION = "(composition)"
_LABELS = ("model", "adapter")
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class _Generations:
    """Those of one pair of names. Plain numbers: prometheus-client's own take a lock for every token."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.num_tokens = self.num_prompt_tokens = self.num_cached_tokens = 0
        self.first_tokens = DurationCounts(_FIRST_TOKEN_BUCKETS)
        self.gaps = DurationCounts(_GAP_BUCKETS)


class Watch:
    """Counts the events of one generation."""

    __slots__ = ("_counts", "_last", "_num_prompt_tokens", "outcome")

    def __init__(self, counts: _Generations, num_prompt_tokens: int) -> None:
        self._counts = counts
        self._num_prompt_tokens: int | None = num_prompt_tokens  # None once they are counted
        self._last = time.perf_counter()
        self.outcome: str = "aborted"

    def saw(self, event: TokenEvent) -> None:
        now, counts = time.perf_counter(), self._counts
        if self._num_prompt_tokens is None:
            counts.gaps.add(now - self._last)
        else:
            counts.first_tokens.add(now - self._last)
            counts.num_prompt_tokens += self._num_prompt_tokens
            counts.num_cached_tokens += event.num_cached_tokens
            self._num_prompt_tokens = None
        self._last = now
        counts.num_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self.outcome = event.finish_reason


class Metrics(Collector):
    """The gateway's own counts, by the model's name and the adapter that it led to.

    The first `max_names` pairs are told apart, all later ones are counted together.
    """

    def __init__(self, max_names: int) -> None:
        self.max_names = max_names
        self._generations: dict[tuple[str, str], _Generations] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    @contextmanager
    def watching(self, model: str, request: GenerateRequest) -> Iterator["Watch"]:
        """What is to see each event of a request; outcomes are `stop`, `length`, `aborted`, or the error's class."""
        counts = self._of(model, request)
        watch = Watch(counts, len(request.prompt_token_ids))
        try:
            yield watch
        except Exception as error:
            watch.outcome = type(error).__name__
            raise
        finally:
            counts.outcomes[watch.outcome] += 1

    @contextmanager
    def counted(self, model: str, request: EmbedRequest) -> Iterator[None]:
        """A request without tokens of its own; outcomes are `embedded`, `aborted`, or the error's class."""
        counts = self._of(model, request)
        outcome = "aborted"
        try:
            yield
            outcome = "embedded"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            counts.outcomes[outcome] += 1

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("loraplex_requests", "Generations by outcome.", labels=[*_LABELS, "outcome"])
        tokens = _counter("loraplex_generated_tokens", "Tokens generated.")
        prompt_tokens = _counter("loraplex_prompt_tokens", "Tokens of prompts that got an answer.")
        cached_tokens = _counter("loraplex_cached_prompt_tokens", "Of these, found in the prefix cache.")
        first = _histogram("loraplex_time_to_first_token_seconds", "From submission to the first token.")
        gaps = _histogram("loraplex_inter_token_seconds", "Between the tokens of one answer.")
        for names, counts in self._generations.items():
            for outcome, number in counts.outcomes.items():
                requests.add_metric([*names, outcome], float(number))
            tokens.add_metric(names, float(counts.num_tokens))
            prompt_tokens.add_metric(names, float(counts.num_prompt_tokens))
            cached_tokens.add_metric(names, float(counts.num_cached_tokens))
            for family, found, bounds in (
                (first, counts.first_tokens, _FIRST_TOKEN_BUCKETS),
                (gaps, counts.gaps, _GAP_BUCKETS),
            ):
                durations = found.snapshot()
                family.add_metric(names, buckets(durations, bounds), durations.seconds)
        return requests, tokens, prompt_tokens, cached_tokens, first, gaps

    def _of(self, model: str, request: GenerateRequest | EmbedRequest) -> _Generations:
        adapter = request.adapter.name if request.adapter else COMPOSITION if request.composition else ""
        names = (model, adapter)
        if (known := self._generations.get(names)) is not None:
            return known
        if len(self._generations) >= self.max_names:
            names = (OTHERS, OTHERS)
        return self._generations.setdefault(names, _Generations())


_ENGINE_SECONDS = 2.0  # that a scrape waits for what the engine counts


def _counter(name: str, help: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, help, labels=_LABELS)


def _histogram(name: str, help: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, help, labels=_LABELS)


def metric_routes(metrics: Metrics, engine: Engine, store: DiskTier, *, is_open: bool) -> list[HTTPRouteHandler]:
    """The handler of this resource; without `is_open` it takes an admin key."""
    guards: list[Guard] = [] if is_open else [require_admin]

    async def at_the_moment() -> CollectorRegistry:
        stats, (disk, by_adapter) = await engine.stats(), await store.stats()
        moment = Moment(
            stats,
            await engine.residency(),
            (disk, *stats.tiers),
            (*by_adapter, *stats.adapter_tiers),
            metrics.max_names,
        )
        registry = CollectorRegistry()
        registry.register(EngineCollector(moment))
        return registry

    @get("/metrics", guards=guards)
    async def get_metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        registries = [metrics.registry]
        if engine.health().state == "ready":
            with suppress(EngineError, OSError, TimeoutError):  # what the gateway counts is told all the same
                async with asyncio.timeout(_ENGINE_SECONDS):
                    registries.append(await at_the_moment())
        if "application/json" in request.headers.get("accept", ""):
            return Response(_as_json(registries), media_type="application/json")
        shown = b"".join(generate_latest(registry) for registry in registries)
        # not as a media type, to which Litestar would add a charset that is in it
        return Response(shown, headers={"content-type": CONTENT_TYPE_LATEST})

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
