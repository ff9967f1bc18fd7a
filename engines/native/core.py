"""The engine without its process: requests in, three verbs a step, emissions out.

    batch = scheduler.next()  →  outcomes = runner.run(batch)  →  emissions = scheduler.commit(batch, outcomes)

One request's error ends that request alone; only a broken machine ends the process.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import msgspec

from loraplex.engines.errors import (
    AdapterError,
    AdapterUnsupported,
    DeadlineExceeded,
    EngineError,
    EngineOverloaded,
    InvalidRequest,
    PromptTooLong,
)
from loraplex.engines.figures import DurationCounts
from loraplex.engines.native.adapters import AdapterTiers
from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.deadlines import Deadlines
from loraplex.engines.native.grammar import Grammars
from loraplex.engines.native.loading import Machine
from loraplex.engines.native.pooling import Pool
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.scheduler import Emission, Limits, Scheduler
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import AdapterResidency, EmbedRequest, GenerateRequest, Grammar, SamplingParams
from loraplex.engines.stats import EngineStats
from loraplex.engines.uses import uses_of

# How much longer than without them steps may take while adapters are brought; how long between two looks at commands.
ADAPTER_SHARE = 0.12
IDLE_SECONDS = 0.005


class EngineCore:
    """One model, its scheduler and its adapters. Not thread-safe: one loop calls it."""

    def __init__(self, machine: Machine, clock: Callable[[], float] = time.monotonic) -> None:
        settings = machine.settings
        self._machine = machine
        self._clock = clock
        self._stopwatch = machine.runner.stopwatch
        self._step_durations = DurationCounts()
        self._recent_seconds = (0.0, 0.0)
        self._max_waiting = settings.engine.max_waiting
        self._max_wait = settings.engine.max_wait_seconds
        self.blocks = BlockPool(machine.num_kv_blocks, settings.engine.kv_block_size)
        residency = Residency(machine.arena_capacity)
        self.adapters = AdapterTiers(
            machine.base,
            machine.arena,
            residency,
            settings.adapters.host_bytes,
            self._fail_adapter,
            max_names=settings.adapters.max_names_in_figures,
        )
        limits = Limits(
            settings.engine.max_batch_tokens,
            settings.engine.max_running,
            settings.engine.max_draft_tokens,
            newcomers_alone=machine.info.device == "cpu",
        )
        self.scheduler = Scheduler(limits, self.blocks, residency, clock)
        self._grammars = Grammars(settings.model.directory, machine.info.vocab_size, machine.eos_token_ids)
        self._deadlines = Deadlines(settings.engine.max_wait_seconds)
        self._sequences: dict[str, Sequence] = {}
        self._unsettled: dict[str, Sequence] = {}  # whose adapters were not known together so far
        self._num_pins = 0
        self._unconstrained: dict[Grammar, dict[str, Sequence]] = {}  # by the grammar that each waits for
        self._failed: list[Emission] = []
        self._prompt_tokens = self._generated = self._num_finished = self._num_aborted = self._num_failed = 0

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises InvalidRequest, and then nothing is kept of it.

        Where the queue is full, the tenant with most requests in it loses its last one to EngineOverloaded.
        """
        self._enqueue(request, self._machine.info.max_model_len - 1)

    def embed(self, request: EmbedRequest) -> None:
        """Queue a text to be embedded; everything else is as for `submit`. It never samples."""
        info = self._machine.info
        if not info.embedding_width:
            raise InvalidRequest(f"{info.architecture} gives no embeddings: it has no decoder of its own", "model")
        pool = Pool(request.pooling, request.normalize, len(request.prompt_token_ids))
        self._enqueue(_as_generation(request), info.max_model_len, pool)

    def _enqueue(self, request: GenerateRequest, max_prompt: int, pool: Pool | None = None) -> None:
        info = self._machine.info
        if len(request.prompt_token_ids) > max_prompt:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt_token_ids)} tokens; at most {max_prompt} fit",
                "messages" if pool is None else "input",
            )
        _check_token_ids(request, info.vocab_size)
        _check_composition(request)
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            seed=random.SystemRandom().getrandbits(63) if seed is None else seed,
            eos_token_ids=self._machine.eos_token_ids.union(request.sampling.end_token_ids),
            arrival=self._clock(),
            max_len=info.max_model_len,
            pool=pool,
        )
        self._sequences[request.request_id] = sequence
        self._prompt_tokens += sequence.num_prompt_tokens
        for part in request.parts:
            self.adapters.enter(part.adapter)
        if request.parts:
            self._unsettled[request.request_id] = sequence
        if (grammar := request.sampling.grammar) is not None:
            self._grammars.begin(grammar, request.tenant)
            self._unconstrained.setdefault(grammar, {})[request.request_id] = sequence
        self.scheduler.add(sequence)
        self._deadlines.add(sequence)
        self._shed()

    def end(self, request_id: str, *, aborted: bool) -> None:
        """Stop a request between steps; its place and blocks are free when this returns. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self.scheduler.remove(sequence)
        self._forget(sequence)
        self._num_aborted += aborted
        self._num_finished += not aborted

    def step(self) -> list[Emission]:
        """One step, or nothing where none can be made; what it gave each sequence, errors since the last one first."""
        self._expire()
        self._move_adapters()
        self._settle()
        self._constrain()
        emissions, self._failed = self._failed, []
        began = time.perf_counter()
        with self._stopwatch.phase("schedule"):
            batch = self.scheduler.next()
        if batch is not None:
            outcomes = self._machine.runner.run(batch)
            with self._stopwatch.phase("commit"):
                emissions += self._record(self.scheduler.commit(batch, outcomes))
            seconds = time.perf_counter() - began
            self._step_durations.add(seconds)
            self._recent_seconds = (self._recent_seconds[-1], seconds)
            if self._machine.runner.is_settled:
                self.scheduler.drafter.time(batch, seconds)
        return emissions

    @property
    def has_work(self) -> bool:
        """Whether a step may compute something right now."""
        return self.scheduler.has_work or bool(self._failed)

    @property
    def is_busy(self) -> bool:
        """Whether a step has something to do that waits for nobody."""
        return bool(self.scheduler.running or self.adapters.is_copying)

    @property
    def is_preparing(self) -> bool:
        """Whether something that requests wait for is being read or compiled."""
        return self.adapters.is_loading or self._grammars.is_compiling

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self.scheduler.num_steps,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_kv_blocks_used=self.blocks.num_used,
            num_kv_blocks=self.blocks.num_blocks,
            num_adapters_on_device=self.adapters.num_on_device,
            total_prompt_tokens=self._prompt_tokens,
            total_cached_prompt_tokens=self.scheduler.num_cached_tokens,
            total_generated_tokens=self._generated,
            total_finished=self._num_finished,
            total_aborted=self._num_aborted,
            total_failed=self._num_failed,
            total_preemptions=self.scheduler.num_preemptions,
            total_draft_tokens=self.scheduler.drafter.num_drafted,
            total_accepted_draft_tokens=self.scheduler.drafter.num_accepted,
            num_restarts=0,
            phase_seconds=dict(self._stopwatch.seconds),
            step_durations=self._step_durations.snapshot(),
            wait_durations=self.scheduler.wait_durations.snapshot(),
            tiers=self.adapters.stats(),
            adapter_tiers=tuple(self.adapters.stats_by_adapter()),
        )

    def residency(self) -> list[AdapterResidency]:
        """Every adapter known here, and whose requests name it."""
        uses = uses_of(sequence.request for sequence in self._sequences.values())
        found = self.adapters.residents()
        return [msgspec.structs.replace(one, uses=uses.get(one.adapter_id, ())) for one in found]

    def _move_adapters(self) -> None:
        """Within a share of the shorter of the last two steps, so that the streams hardly notice."""
        seconds = ADAPTER_SHARE * min(self._recent_seconds) if self.scheduler.running else IDLE_SECONDS
        with self._stopwatch.phase("adapters"):
            self.adapters.poll((id for sequence in self.scheduler.waiting for id in sequence.adapter_ids), seconds)

    def _record(self, emissions: list[Emission]) -> list[Emission]:
        for emission in emissions:
            self._generated += emission.sampled is not None
            if emission.is_last:
                self._forget(emission.sequence)
                self._num_finished += emission.error is None
                self._num_failed += emission.error is not None
        return emissions

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._unsettled.pop(sequence.request_id, None)
        if (grammar := sequence.request.sampling.grammar) is not None:
            self._await_no_more(sequence.request_id, grammar)
        for adapter_id in sequence.adapter_ids:
            self.adapters.leave(adapter_id)

    def _await_no_more(self, request_id: str, grammar: Grammar) -> None:
        waiting = self._unconstrained.get(grammar, {})
        if waiting.pop(request_id, None) is not None and not waiting:
            del self._unconstrained[grammar]
            self._grammars.give_up(grammar)

    def _shed(self) -> None:
        if len(self.scheduler.waiting) > self._max_waiting:
            victim = self.scheduler.waiting.last_of_the_longest()
            if victim is not None:
                self._fail(victim, EngineOverloaded(f"{self._max_waiting} requests are waiting already"))

    def _expire(self) -> None:
        now = self._clock()
        for request_id in self._deadlines.passed(now):
            if (sequence := self._sequences.get(request_id)) is None:
                continue
            limit, age = sequence.request.timeout_seconds, now - sequence.arrival
            if limit is not None and age >= limit:
                self._fail(sequence, DeadlineExceeded(f"the request was not finished within {limit:g} s"))
            elif age >= self._max_wait and not sequence.was_admitted:
                self._fail(sequence, EngineOverloaded(f"the request waited {self._max_wait:g} s for its first step"))

    def _settle(self) -> None:
        """Once its adapters are known: from where on each is active in a sequence, and whether they can be composed.

        Behind each new pin those that wait are looked at once more, or one without room beside it would wait in vain.
        """
        if self.adapters.num_pins > self._num_pins:
            self._num_pins = self.adapters.num_pins
            self._unsettled |= {one.request_id: one for one in self.scheduler.waiting if one.request.composition}
        for sequence in list(self._unsettled.values()):
            plans = self.adapters.plans(sequence.adapter_ids)
            if len(plans) < len(sequence.adapter_ids):
                continue
            if len(plans) > 1 and (error := self.adapters.lack_of_room(plans)) is not None:
                self._fail(sequence, error)
            elif sequence.request.composition and (plan := next((plan for plan in plans if plan.why_alone), None)):
                # the plan is named as whoever brought the content named it, who may be another tenant
                name = next(part.adapter.name for part in sequence.request.parts if part.adapter.id == plan.adapter.id)
                self._fail(sequence, AdapterUnsupported(f"{name} {plan.why_alone}"))
            else:
                sequence.starts = tuple(plan.config.active_from(sequence.request.prompt_token_ids) for plan in plans)
                del self._unsettled[sequence.request_id]

    def _constrain(self) -> None:
        """Give sequences their grammars, as soon as these are compiled."""
        for grammar in self._grammars.ready():
            for sequence in self._unconstrained.pop(grammar, {}).values():
                try:
                    sequence.constraint = self._grammars.constraint(grammar, sequence.request.sampling.end_token_ids)
                except InvalidRequest as error:
                    self._fail(sequence, error)
                else:
                    self.scheduler.make_ready(sequence)

    def _fail_adapter(self, adapter_id: str, error: AdapterError) -> None:
        """An adapter cannot be had: every request that waits for it ends with the reason."""
        for sequence in [s for s in self._sequences.values() if adapter_id in s.adapter_ids]:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        """End a request between steps; the next step tells."""
        self.scheduler.remove(sequence)
        self._forget(sequence)
        self._num_failed += 1
        self._failed.append(Emission(sequence=sequence, error=error))


def _as_generation(request: EmbedRequest) -> GenerateRequest:
    """As the scheduler knows it."""
    return GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        adapter=request.adapter,
        composition=request.composition,
        tenant=request.tenant,
        weight=request.weight,
        priority=request.priority,
        is_background=request.is_background,
        timeout_seconds=request.timeout_seconds,
    )


def _check_composition(request: GenerateRequest) -> None:
    """Raises InvalidRequest where it names an adapter twice, or beside another field, or with a weight that is none."""
    ids = [part.adapter.id for part in request.composition]
    if request.adapter is not None and ids:
        raise InvalidRequest("a request has either an adapter or a composition", "composition")
    if len(set(ids)) < len(ids):
        raise InvalidRequest("a composition names one adapter twice", "composition")
    if not all(math.isfinite(part.weight) for part in request.composition):
        raise InvalidRequest("a composition's weights must be finite", "composition")


def _check_token_ids(request: GenerateRequest, vocab_size: int) -> None:
    """Raises InvalidRequest naming the field: an id outside the vocabulary would break the whole batch."""
    sampling = request.sampling
    fields = {
        "prompt": request.prompt_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": tuple(sampling.logit_bias),
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words_ids": tuple(token_id for word in sampling.bad_words_ids for token_id in word),
    }
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens", "prompt")
    if not all(sampling.bad_words_ids):
        raise InvalidRequest("bad_words_ids has a word without tokens", "bad_words_ids")
    for field, token_ids in fields.items():
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequest(f"{field} has a token id outside 0 … {vocab_size - 1}", field)
