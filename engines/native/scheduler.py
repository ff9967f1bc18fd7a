"""Who computes what in the next step. Plain Python: never imports torch, never touches weights.

Continuous batching under one token budget: running sequences first (a decode takes one token, a prefill a chunk),
then waiting ones, fairly across tenants. What the prefix cache knows of a prompt's beginning is not computed. KV
blocks are taken as they are needed; when they run out, the youngest running sequence gives its blocks back and is
computed again later. A sequence whose adapter is not on the device waits without delaying anyone, but not for ever:
past `cold_patience` seconds nothing behind it is admitted, so that running sequences drain and make room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loraplex.engines.errors import EngineError
from loraplex.engines.native.batch import Batch, Sampled, Segment
from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST, FairQueue
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.native.stopwatch import DurationCounts
from loraplex.engines.protocol import FinishReason


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step, in tokens and sequences; `cold_patience` in seconds."""

    max_batch_tokens: int
    max_running: int
    cold_patience: float = 2.0


@dataclass(frozen=True, slots=True)
class Emission:
    """What a step gave one sequence: one token, perhaps its last; or the error that ended it."""

    sequence: Sequence
    sampled: Sampled | None = None
    finish_reason: FinishReason | None = None
    error: EngineError | None = None


class Scheduler:
    """Who waits and who runs. A running sequence holds its adapter on the device; a waiting one does not."""

    def __init__(self, limits: Limits, blocks: BlockPool, residency: Residency, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._blocks = blocks
        self._residency = residency
        self._clock = clock
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.wait_durations = DurationCounts()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks are free when this returns."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def next(self) -> Batch | None:
        """The next step's batch; None where nothing can be computed now."""
        plan = _Plan(self._limits.max_batch_tokens)
        preemptions = self.num_preemptions
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_uncomputed > 1):
            if plan.budget and sequence in self.running:
                self._continue(sequence, plan)
        if self.num_preemptions == preemptions:
            self._admit(plan)
        if not plan.segments:
            return None
        self.num_steps += 1
        ordered = sorted(plan.segments.values(), key=lambda segment: segment.sequence.adapter_ids)
        return Batch(step=self.num_steps, segments=tuple(ordered))

    def commit(self, batch: Batch, outcomes: Iterable[Sampled | EngineError]) -> list[Emission]:
        """Record a step; `outcomes` holds the token, or the error, of each sampling segment in turn."""
        for segment in batch.segments:
            self._advance(segment)
        emissions = []
        for segment, outcome in zip(batch.sampling_segments, outcomes, strict=True):
            self.waiting.charge(segment.sequence, OUTPUT_COST)
            emission = _emit(segment.sequence, outcome)
            if emission.finish_reason or emission.error:
                self.remove(segment.sequence)
            emissions.append(emission)
        return emissions

    def _continue(self, sequence: Sequence, plan: _Plan) -> None:
        """Plan a running sequence's next tokens, preempting the youngest ones while blocks are short."""
        while not self._blocks.grow(sequence.block_table, sequence.num_computed + plan.chunk(sequence)):
            victim = max(self.running, key=lambda running: running.arrival)
            self._preempt(victim)
            plan.drop(victim)
            if victim is sequence:
                return
        plan.add(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self.wait_durations.add(self._clock() - sequence.arrival)
            sequence.num_cached_tokens = sequence.num_computed
            self.num_cached_tokens += sequence.num_computed
            self.waiting.charge(sequence, INPUT_COST * sequence.num_prompt_tokens)
        for adapter_id in sequence.adapter_ids:
            self._residency.start(adapter_id)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence.block_table)
        for adapter_id in sequence.adapter_ids:
            self._residency.stop(adapter_id)

    def _admit(self, plan: _Plan) -> None:
        """Start waiting sequences, whoever's turn it is, while budget, places and blocks last."""
        cold: set[Sequence] = set()
        while plan.budget and len(self.running) < self._limits.max_running:
            sequence = self.waiting.first(skipped=cold)
            if sequence is None:
                return
            if not all(adapter_id in self._residency for adapter_id in sequence.adapter_ids):
                if self._clock() - sequence.arrival > self._limits.cold_patience:
                    return
                cold.add(sequence)
                continue
            self._find_cached(sequence)
            if not self._blocks.grow(sequence.block_table, sequence.num_computed + plan.chunk(sequence)):
                self._blocks.release(sequence.block_table)
                sequence.num_computed = 0
                return
            self._start(sequence)
            plan.add(sequence)

    def _find_cached(self, sequence: Sequence) -> None:
        """Share what the prefix cache has of the sequence's beginning; at least one token is left to compute."""
        size = self._blocks.block_size
        keys = sequence.block_keys((len(sequence.token_ids) - 1) // size, size)
        sequence.block_table.extend(self._blocks.share(keys))
        sequence.num_computed = len(sequence.block_table) * size

    def _advance(self, segment: Segment) -> None:
        """The segment's tokens are computed: blocks they filled can be shared from now on."""
        sequence, size = segment.sequence, self._blocks.block_size
        sequence.num_computed = segment.start + segment.num_tokens
        first, end = segment.start // size, sequence.num_computed // size
        for block, key in zip(sequence.block_table[first:end], sequence.block_keys(end, size)[first:], strict=True):
            self._blocks.publish(block, key)


class _Plan:
    """A step being put together: segments so far, and what is left of the token budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.segments: dict[Sequence, Segment] = {}

    def chunk(self, sequence: Sequence) -> int:
        return min(sequence.num_uncomputed, self.budget)

    def add(self, sequence: Sequence) -> None:
        num_tokens = self.chunk(sequence)
        samples = num_tokens == sequence.num_uncomputed
        segment = Segment(sequence=sequence, start=sequence.num_computed, num_tokens=num_tokens, samples=samples)
        self.segments[sequence] = segment
        self.budget -= segment.num_tokens

    def drop(self, sequence: Sequence) -> None:
        segment = self.segments.pop(sequence, None)
        self.budget += segment.num_tokens if segment else 0


def _emit(sequence: Sequence, outcome: Sampled | EngineError) -> Emission:
    if isinstance(outcome, EngineError):
        return Emission(sequence=sequence, error=outcome)
    return Emission(sequence=sequence, sampled=outcome, finish_reason=sequence.append(outcome.token_id))
