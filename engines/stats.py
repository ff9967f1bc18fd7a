"""An engine's figures, as `Engine.stats` gives them: part of the protocol, and as free of torch."""

from __future__ import annotations

from typing import Literal

import msgspec

OTHERS = "(others)"  # the name of all that are not told apart
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram: how many durations were at most each of SECONDS_BUCKETS and more than the one before.

    The last count is of longer ones; `seconds` is the sum of all.
    """

    counts: tuple[int, ...] = (0,) * (len(SECONDS_BUCKETS) + 1)
    seconds: float = 0.0


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of adapters: what is in it, and since the process started how requests found theirs there or not.

    `load_durations` are the ways of adapters into the tier, from when it was their turn.
    """

    tier: Literal["disk", "host", "device"]
    num_adapters: int
    num_bytes: int
    capacity_bytes: int
    total_hits: int = 0
    total_misses: int = 0
    total_evictions: int = 0
    load_durations: Durations = Durations()


class AdapterTierStats(msgspec.Struct, frozen=True, kw_only=True):
    """The same of one adapter in one tier. `name` is OTHERS for all that are not told apart."""

    name: str
    tier: Literal["disk", "host", "device"]
    total_hits: int = 0
    total_misses: int = 0
    total_evictions: int = 0
    total_loads: int = 0
    load_seconds: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and gauges of an engine. Counters (`total_*`, `num_steps`) restart with the engine process.

    `phase_seconds` says where its steps' time went; `step_durations` are whole steps, `wait_durations` the waits of
    requests from their arrival to their first step.
    """

    num_steps: int
    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    num_kv_blocks: int
    num_adapters_on_device: int
    total_prompt_tokens: int
    total_cached_prompt_tokens: int
    total_generated_tokens: int
    total_finished: int
    total_aborted: int
    total_failed: int
    total_preemptions: int
    num_restarts: int
    total_draft_tokens: int = 0
    total_accepted_draft_tokens: int = 0
    phase_seconds: dict[str, float] = {}
    step_durations: Durations = Durations()
    wait_durations: Durations = Durations()
    tiers: tuple[TierStats, ...] = ()
    adapter_tiers: tuple[AdapterTierStats, ...] = ()
