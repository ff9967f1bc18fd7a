"""GET /metrics: what the gateway saw of requests, and the engine's own figures at the moment of the scrape.

The names beginning with `vllm:` are those that llm-d and the Gateway API inference extension route by.
`docs/metrics.md` lists every metric.
"""

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import Guard
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.samples import Sample

from loraplex.engines.protocol import OTHERS, EmbedRequest, Engine, GenerateRequest, TokenEvent
from loraplex.gateway.engine_metrics import EngineCollector, Moment
from loraplex.gateway.guards import require_admin
from loraplex.gateway.holding import DiskTier

COMPOSITION = "(composition)"
_LABELS = ("model", "adapter")
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The gateway's own counts, by the model's name and the adapter that it led to.

    The first `max_names` pairs are told apart, all later ones are counted together.
    """

    def __init__(self, max_names: int) -> None:
        self.registry = CollectorRegistry()
        self.max_names = max_names
        self._known: set[tuple[str, str]] = set()
        self._requests = Counter(
            "loraplex_requests", "Generations by outcome.", [*_LABELS, "outcome"], registry=self.registry
        )
        self._tokens = self._counter("loraplex_generated_tokens", "Tokens generated.")
        self._prompt_tokens = self._counter("loraplex_prompt_tokens", "Tokens of prompts that got an answer.")
        self._cached_tokens = self._counter("loraplex_cached_prompt_tokens", "Of these, found in the prefix cache.")
        self._ttft = Histogram(
            "loraplex_time_to_first_token_seconds", "From submission to the first token.", _LABELS,
            buckets=_TTFT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._gap = Histogram(
            "loraplex_inter_token_seconds", "Between the tokens of one answer.", _LABELS,
            buckets=_GAP_BUCKETS, registry=self.registry,
        )  # fmt: skip

    async def watch(
        self, model: str, request: GenerateRequest, events: AsyncIterator[TokenEvent]
    ) -> AsyncIterator[TokenEvent]:
        """The same events, counted; outcomes are `stop`, `length`, `aborted`, or the error's class."""
        names = self._names(model, request)
        tokens, gap = self._tokens.labels(*names), self._gap.labels(*names)
        outcome = "aborted"
        last = began = time.perf_counter()
        try:
            async with aclosing(events) as closing:  # type: ignore[type-var]
                async for event in closing:
                    now = time.perf_counter()
                    if last == began:
                        self._ttft.labels(*names).observe(now - began)
                        self._prompt_tokens.labels(*names).inc(len(request.prompt_token_ids))
                        self._cached_tokens.labels(*names).inc(event.num_cached_tokens)
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
            self._requests.labels(*names, outcome).inc()

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, _LABELS, registry=self.registry)

    def _names(self, model: str, request: GenerateRequest | EmbedRequest) -> tuple[str, str]:
        adapter = request.adapter.name if request.adapter else COMPOSITION if request.composition else ""
        names = (model, adapter)
        if names not in self._known:
            if len(self._known) >= self.max_names:
                return OTHERS, OTHERS
            self._known.add(names)
        return names

    @contextmanager
    def counted(self, model: str, request: EmbedRequest) -> Iterator[None]:
        """A request without tokens of its own; outcomes are `embedded`, `aborted`, or the error's class."""
        names = self._names(model, request)
        outcome = "aborted"
        try:
            yield
            outcome = "embedded"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._requests.labels(*names, outcome).inc()


def metric_routes(metrics: Metrics, engine: Engine, store: DiskTier, *, is_open: bool) -> list[HTTPRouteHandler]:
    """The handler of this resource; without `is_open` it takes an admin key."""
    guards: list[Guard] = [] if is_open else [require_admin]

    @get("/metrics", guards=guards)
    async def get_metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        registries = [metrics.registry]
        if engine.health().state == "ready":
            stats, (disk, by_adapter) = await engine.stats(), await store.stats()
            moment = Moment(
                stats,
                await engine.residency(),
                (disk, *stats.tiers),
                (*by_adapter, *stats.adapter_tiers),
                metrics.max_names,
            )
            at_the_moment = CollectorRegistry()
            at_the_moment.register(EngineCollector(moment))
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
