"""The engine without its process: requests in, three verbs a step, emissions out.

    batch = scheduler.next()  →  outcomes = runner.run(batch)  →  emissions = scheduler.commit(batch, outcomes)

One request's error ends that request alone; only a broken machine ends the process.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from loraplex.engines.errors import AdapterError, EngineOverloaded, InvalidRequest, PromptTooLong
from loraplex.engines.native.adapters import AdapterTiers
from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.loading import Machine
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.scheduler import Emission, Limits, Scheduler
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import EngineStats, GenerateRequest


class EngineCore:
    """One model, its scheduler and its adapters. Not thread-safe: one loop calls it."""

    def __init__(self, machine: Machine, clock: Callable[[], float] = time.monotonic) -> None:
        settings = machine.settings
        self._machine = machine
        self._clock = clock
        self._max_waiting = settings.engine.max_waiting
        self.blocks = BlockPool(machine.num_kv_blocks, settings.engine.kv_block_size)
        residency = Residency(machine.arena_capacity)
        self.adapters = AdapterTiers(
            machine.base, machine.arena, residency, settings.adapters.host_bytes, self._fail_adapter
        )
        limits = Limits(settings.engine.max_batch_tokens, settings.engine.max_running)
        self.scheduler = Scheduler(limits, self.blocks, residency, clock)
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[Emission] = []
        self._prompt_tokens = self._generated = self._num_finished = self._num_aborted = self._num_failed = 0

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises InvalidRequest or EngineOverloaded, and then nothing is kept of it."""
        info = self._machine.info
        if len(request.prompt_token_ids) >= info.max_model_len:
            length = len(request.prompt_token_ids)
            raise PromptTooLong(f"the prompt has {length} tokens; at most {info.max_model_len - 1} fit", "messages")
        _check_token_ids(request, info.vocab_size)
        if len(self.scheduler.waiting) >= self._max_waiting:
            raise EngineOverloaded(f"{self._max_waiting} requests are waiting already")
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            seed=random.SystemRandom().getrandbits(63) if seed is None else seed,
            eos_token_ids=self._machine.eos_token_ids,
            arrival=self._clock(),
            max_len=info.max_model_len,
        )
        self._sequences[request.request_id] = sequence
        self._prompt_tokens += sequence.num_prompt_tokens
        if request.adapter is not None:
            self.adapters.enter(request.adapter)
        self.scheduler.add(sequence)

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
        self.adapters.poll(sequence.adapter_id for sequence in self.scheduler.waiting if sequence.adapter_id)
        emissions, self._failed = self._failed, []
        if (batch := self.scheduler.next()) is not None:
            outcomes = self._machine.runner.run(batch)
            emissions += self._record(self.scheduler.commit(batch, outcomes))
        return emissions

    @property
    def has_work(self) -> bool:
        """Whether a step may compute something right now."""
        return self.scheduler.has_work or bool(self._failed)

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
            num_restarts=0,
        )

    def _record(self, emissions: list[Emission]) -> list[Emission]:
        for emission in emissions:
            self._generated += emission.sampled is not None
            if emission.finish_reason or emission.error:
                self._forget(emission.sequence)
                self._num_finished += emission.error is None
                self._num_failed += emission.error is not None
        return emissions

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.adapter_id is not None:
            self.adapters.leave(sequence.adapter_id)

    def _fail_adapter(self, adapter_id: str, error: AdapterError) -> None:
        """An adapter cannot be had: every request that waits for it ends with the reason."""
        for sequence in [s for s in self._sequences.values() if s.adapter_id == adapter_id]:
            self.scheduler.remove(sequence)
            self._forget(sequence)
            self._num_failed += 1
            self._failed.append(Emission(sequence=sequence, error=error))


def _check_token_ids(request: GenerateRequest, vocab_size: int) -> None:
    """Raises InvalidRequest naming the field: an id outside the vocabulary would break the whole batch."""
    sampling = request.sampling
    fields = {
        "prompt": request.prompt_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": tuple(sampling.logit_bias),
    }
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens", "prompt")
    for field, token_ids in fields.items():
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequest(f"{field} has a token id outside 0 … {vocab_size - 1}", field)
