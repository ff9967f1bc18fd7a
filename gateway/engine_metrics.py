"""The engine's and the adapter store's figures at one moment, as Prometheus' metric families."""

import time
from collections.abc import Iterable, Sequence
from itertools import accumulate

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.engines.protocol import AdapterResidency
from loraplex.engines.stats import OTHERS, SECONDS_BUCKETS, AdapterTierStats, Durations, EngineStats, TierStats

_COUNTERS = ("num_steps", "num_restarts")


class Moment(msgspec.Struct, frozen=True):
    """Everything asked for one scrape; `tiers` and `adapter_tiers` hold the disk's, host's and device's."""

    stats: EngineStats
    residency: Sequence[AdapterResidency]
    tiers: Sequence[TierStats]
    adapter_tiers: Sequence[AdapterTierStats]
    max_names: int


class EngineCollector(Collector):
    """One moment's families."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment

    def collect(self) -> Iterable[Metric]:
        stats = self._moment.stats
        used = stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0
        yield GaugeMetricFamily("vllm:num_requests_running", "Sequences in the current step.", stats.num_running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks held, from 0 to 1.", used)
        yield self._lora_info()
        yield from _counts(stats)
        phases = CounterMetricFamily("loraplex_engine_phase_seconds", "Time of steps by phase.", labels=["phase"])
        for phase, seconds in stats.phase_seconds.items():
            phases.add_metric([phase], seconds)
        yield phases
        yield _histogram("loraplex_engine_step_seconds", "Whole steps of the engine.", stats.step_durations)
        yield _histogram("loraplex_engine_queue_seconds", "From arrival to the first step.", stats.wait_durations)
        yield from self._tiers()
        yield from self._adapters()

    def _tiers(self) -> Iterable[Metric]:
        tiers = self._moment.tiers
        yield _family(GaugeMetricFamily, "loraplex_tier_adapters", "Adapters in a tier.",
                      {(tier.tier,): tier.num_adapters for tier in tiers})  # fmt: skip
        yield _family(GaugeMetricFamily, "loraplex_tier_bytes", "Their bytes.",
                      {(tier.tier,): tier.num_bytes for tier in tiers})  # fmt: skip
        yield _family(GaugeMetricFamily, "loraplex_tier_capacity_bytes", "The most that a tier may hold.",
                      {(tier.tier,): tier.capacity_bytes for tier in tiers})  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_tier_hits", "Requests that found their adapter in a tier.",
                      {(tier.tier,): tier.total_hits for tier in tiers})  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_tier_misses", "Requests that did not; on disk: transfers.",
                      {(tier.tier,): tier.total_misses for tier in tiers})  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_tier_evictions", "Adapters that made room for others.",
                      {(tier.tier,): tier.total_evictions for tier in tiers})  # fmt: skip
        loads = HistogramMetricFamily("loraplex_tier_load_seconds", "Ways of adapters into a tier.", labels=["tier"])
        for tier in tiers:
            loads.add_metric([tier.tier], buckets(tier.load_durations), tier.load_durations.seconds)
        yield loads

    def _adapters(self) -> Iterable[Metric]:
        found = {(one.name, one.tier): one for one in self._moment.adapter_tiers}
        labels = ("adapter", "tier")
        yield _family(CounterMetricFamily, "loraplex_adapter_hits", "The tiers' hits by adapter.",
                      {key: one.total_hits for key, one in found.items()}, labels)  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_adapter_misses", "The tiers' misses by adapter.",
                      {key: one.total_misses for key, one in found.items()}, labels)  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_adapter_evictions", "The tiers' evictions by adapter.",
                      {key: one.total_evictions for key, one in found.items()}, labels)  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_adapter_loads", "Ways into a tier by adapter.",
                      {key: one.total_loads for key, one in found.items()}, labels)  # fmt: skip
        yield _family(CounterMetricFamily, "loraplex_adapter_load_seconds", "How long they took.",
                      {key: one.load_seconds for key, one in found.items()}, labels)  # fmt: skip
        sizes: dict[tuple[str, ...], float] = {}
        largest = sorted(self._moment.residency, key=lambda one: one.num_bytes, reverse=True)
        for place, one in enumerate(largest):
            key = (one.name if place < self._moment.max_names else OTHERS, one.tier)
            sizes[key] = sizes.get(key, 0.0) + one.num_bytes
        yield _family(GaugeMetricFamily, "loraplex_adapter_bytes", "Bytes and place of the largest adapters here.",
                      sizes, labels)  # fmt: skip

    def _lora_info(self) -> Metric:
        residency = self._moment.residency
        running = sorted({one.name for one in residency if one.num_running})
        waiting = sorted({one.name for one in residency if one.num_requests > one.num_running})
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use; the value is the time.", labels=labels)
        info.add_metric([str(self._max_lora()), ",".join(running), ",".join(waiting)], time.time())
        return info

    def _max_lora(self) -> int:
        """How many adapters fit the device: those there, and as many more of their mean size as there is room for."""
        count = self._moment.stats.num_adapters_on_device
        device = next((tier for tier in self._moment.tiers if tier.tier == "device"), None)
        if device is None or not device.num_bytes:
            return max(count, 1)
        return count + (device.capacity_bytes - device.num_bytes) * count // device.num_bytes


def _counts(stats: EngineStats) -> Iterable[Metric]:
    for name in EngineStats.__struct_fields__:
        value = getattr(stats, name)
        if not isinstance(value, int):
            continue
        if name.startswith("total_") or name in _COUNTERS:
            plain = name.removeprefix("total_").removeprefix("num_")
            yield CounterMetricFamily(f"loraplex_engine_{plain}", "Since the engine process started.", value)
        else:
            yield GaugeMetricFamily(f"loraplex_engine_{name.removeprefix('num_')}", "At this moment.", value)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    help: str,
    values: dict[tuple[str, ...], float],
    labels: tuple[str, ...] = ("tier",),
) -> Metric:
    family = kind(name, help, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _histogram(name: str, help: str, found: Durations) -> Metric:
    return HistogramMetricFamily(name, help, buckets(found), found.seconds)


def buckets(found: Durations, bounds: Sequence[float] = SECONDS_BUCKETS) -> list[tuple[str, float]]:
    """By the upper end of each bucket how many were no longer."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(found.counts), strict=True))
