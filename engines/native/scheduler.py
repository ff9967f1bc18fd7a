"""Who computes what in the next step. Plain Python: never imports torch, never touches weights.

Continuous batching under one token budget: running sequences first (a decode takes one token, a prefill a chunk),
then waiting ones, fairly across tenants. What the prefix cache knows of a prompt's beginning is not computed. KV
blocks are taken as they are needed; when they run out, the youngest running sequence gives its blocks back and is
computed again later. A sequence whose adapter is not on the device waits without delaying anyone, but not for ever
where there is no room for it: past `cold_patience` seconds nothing behind it is admitted, so that running sequences
drain and make room. A sequence
whose beginning a running one is about to compute waits for that too, and shares it: the choices of one request compute
their prompt once. What a step of decodes has room for goes to drafts, where they pay.

A tenant that runs nothing does not wait for another's answers or prompts to end. No place stands empty for it: when its
turn comes in a full house, the tenant that runs most gives up the place of its youngest sequence, which goes on later,
mostly from the prefix cache. And what decodes leave of a step's budget is shared evenly between the tenants that have
prompts to compute, the one whose turn it is among them; what one does not need, the others have. Where a step takes as
long as its rows are many, such a newcomer's prompt has a step of its own, and everybody else's next tokens come after
it; never twice in a row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from loraplex.engines.errors import EngineError, GenerationFailed, InvalidRequest
from loraplex.engines.figures import DurationCounts
from loraplex.engines.native.batch import Batch, Outcome, Sampled, Segment
from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.drafting import Drafter
from loraplex.engines.native.fairness import INPUT_COST, OUTPUT_COST, FairQueue
from loraplex.engines.native.plan import Plan
from loraplex.engines.native.pooling import Pool
from loraplex.engines.native.residency import Residency
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step, in tokens and sequences, and of a draft, in tokens; `cold_patience` in seconds.

    `newcomers_alone` suits machines on which each row of a step costs its share of the step's time.
    """

    max_batch_tokens: int
    max_running: int
    max_draft_tokens: int = 0
    cold_patience: float = 2.0
    newcomers_alone: bool = False


class Emission(msgspec.Struct, frozen=True):
    """What a step gave one sequence: one token, perhaps its last; its embedding; or the error that ended it.

    With its first token come the prompt's log-probabilities, where asked for.
    """

    sequence: Sequence
    embedding: tuple[float, ...] | None = None
    sampled: Sampled | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: EngineError | None = None

    @property
    def is_last(self) -> bool:
        return bool(self.finish_reason or self.error or self.embedding is not None)


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
        self._preempted: set[Sequence] = set()  # in this step
        self.num_cached_tokens = 0
        self._newcomers_were_alone = False
        self.wait_durations = DurationCounts()
        self.drafter = Drafter(limits.max_draft_tokens)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def make_ready(self, sequence: Sequence) -> None:
        """It has all that it needs besides its adapters from now on."""
        self.waiting.make_ready(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks are free when this returns."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def next(self) -> Batch | None:
        """The next step's batch; None where nothing can be computed now."""
        plan = Plan(self._limits.max_batch_tokens)
        self._preempted.clear()
        self._admit_newcomers(plan)
        if not plan.segments:
            self._plan_all(plan)
        if not plan.segments:
            return None
        self.num_steps += 1
        ordered = sorted(plan.segments.values(), key=lambda segment: segment.sequence.adapter_ids)
        return Batch(step=self.num_steps, segments=tuple(ordered))

    def _plan_all(self, plan: Plan) -> None:
        preemptions = self.num_preemptions
        self._continue_all([sequence for sequence in self.running if sequence.num_uncomputed <= 1], plan)
        self._continue_prompts(plan)
        if self.num_preemptions == preemptions:
            self._admit(plan)
        if self.drafter.max_tokens and plan.only_decodes:
            self._draft(plan)

    def _admit_newcomers(self, plan: Plan) -> None:
        """A step for those whose turn it is and whose tenants run nothing, if it is theirs alone and computes all."""
        wanted = self._limits.newcomers_alone and self.running and not self._newcomers_were_alone
        if wanted and self._has_newcomer():
            self._admit(plan, newcomers_only=True)
        self._newcomers_were_alone = bool(plan.segments)

    def commit(self, batch: Batch, outcomes: Iterable[Outcome]) -> list[Emission]:
        """Record a step; `outcomes` holds what each segment gave, in turn."""
        emissions: list[Emission] = []
        for segment, outcome in zip(batch.segments, outcomes, strict=True):
            sequence = segment.sequence
            sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
            if outcome.error is not None:
                taken = [Emission(sequence=sequence, error=outcome.error)]
            elif sequence.pool is not None:
                taken = self._pool(segment, sequence.pool, outcome)
            else:
                taken = self._take(segment, outcome.sampled)
                self._advance(segment, max(len(taken) - 1, 0))
            if taken and taken[-1].is_last:
                self.remove(sequence)
            emissions += taken
        return emissions

    def _take(self, segment: Segment, sampled: tuple[Sampled, ...]) -> list[Emission]:
        """Append what was sampled, up to the first draft that it contradicts, or to the answer's end."""
        sequence, drafts, taken = segment.sequence, segment.drafts, []
        for place, one in enumerate(sampled):
            taken.append(emission := self._append(sequence, one))
            if emission.is_last or drafts[place : place + 1] != (one.token_id,):
                break
        self.waiting.charge(sequence, OUTPUT_COST * len(taken))
        if drafts:
            self.drafter.learn(sequence, len(drafts), len(taken) - 1)
        return taken

    def _append(self, sequence: Sequence, one: Sampled) -> Emission:
        """A token behind which the sequence's grammar breaks is its error: no answer ends well there."""
        told = () if sequence.num_generated else tuple(sequence.prompt_logprobs)
        try:
            finish_reason = sequence.append(one.token_id)
        except InvalidRequest as error:
            return Emission(sequence=sequence, error=error)
        return Emission(sequence=sequence, sampled=one, prompt_logprobs=told, finish_reason=finish_reason)

    def _pool(self, segment: Segment, pool: Pool, outcome: Outcome) -> list[Emission]:
        """Add a segment's hidden states to its pool, which may complete it."""
        pool.add(outcome.hidden)
        self._advance(segment, 0)
        if not pool.is_complete:
            return []
        values = pool.values
        error = None if values is not None else GenerationFailed("the model's output is not finite for this request")
        return [Emission(sequence=segment.sequence, embedding=values, error=error)]

    def _continue_prompts(self, plan: Plan) -> None:
        """Running sequences' next chunks, the budget shared evenly between tenants: who needs least comes first."""
        prompts: defaultdict[str, list[Sequence]] = defaultdict(list)
        for sequence in self.running:
            if sequence.num_uncomputed > 1:
                prompts[sequence.request.tenant].append(sequence)
        in_turn = sorted(prompts.values(), key=lambda mine: sum(sequence.num_uncomputed for sequence in mine))
        num_others = len(in_turn) + self._has_newcomer()
        for mine in in_turn:
            num_others -= 1
            plan.keep_for(num_others)
            self._continue_all(mine, plan)
        plan.keep_for(0)

    def _has_newcomer(self) -> bool:
        """Whether it is the turn of a tenant that runs nothing, and its request can start now."""
        sequence = self.waiting.first()
        return sequence is not None and self._is_newcomer(sequence)

    def _is_newcomer(self, sequence: Sequence) -> bool:
        if sequence.request.is_background or not self._can_start(sequence):
            return False
        return all(running.request.tenant != sequence.request.tenant for running in self.running)

    def _can_start(self, sequence: Sequence) -> bool:
        return all(adapter_id in self._residency for adapter_id in sequence.adapter_ids)

    def _continue_all(self, sequences: list[Sequence], plan: Plan) -> None:
        for sequence in sequences:
            if plan.room and sequence not in self._preempted:
                self._continue(sequence, plan)

    def _continue(self, sequence: Sequence, plan: Plan) -> None:
        """Plan a running sequence's next tokens, preempting the youngest ones while blocks are short."""
        while not self._blocks.grow(sequence.block_table, sequence.num_computed + (chunk := plan.chunk(sequence))):
            victim = max(self.running, key=lambda running: (running.request.is_background, running.arrival))
            self._preempt(victim)
            plan.drop(victim)
            if victim is sequence:
                return
        plan.add(sequence, chunk)

    def _make_way(self, victim: Sequence, plan: Plan) -> None:
        self._preempt(victim)
        plan.drop(victim)

    def _youngest_in_background(self, sequence: Sequence) -> Sequence | None:
        """Who makes way for it wherever room is short; nobody does for what is in the background itself."""
        background = [running for running in self.running if running.request.is_background]
        if sequence.request.is_background or not background:
            return None
        return max(background, key=lambda running: running.arrival)

    def _place_giver(self, sequence: Sequence) -> Sequence | None:
        """Who gives up its place to it: work in the background, else the tenant that runs most to one that runs none.

        Nobody's last one does, so that two tenants never drive each other out in turn.
        """
        victim = self._youngest_in_background(sequence)
        if victim is not None or sequence.request.is_background:
            return victim
        counts = Counter(running.request.tenant for running in self.running)
        tenant, count = counts.most_common(1)[0]
        if count < 2 or sequence.request.tenant in counts:
            return None
        mine = (running for running in self.running if running.request.tenant == tenant)
        return max(mine, key=lambda running: running.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)
        self._preempted.add(sequence)
        self.num_preemptions += 1

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.queue_seconds is None:
            sequence.queue_seconds = self._clock() - sequence.arrival
            self.wait_durations.add(sequence.queue_seconds)
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

    def _admit(self, plan: Plan, *, newcomers_only: bool = False) -> None:
        """Start waiting sequences, whoever's turn it is, while budget, places and blocks last.

        With `newcomers_only` up to the first that is none, or whose prompt does not fit whole.
        """
        skipped: set[Sequence] = set()
        coming = self._coming_keys() if self.waiting else set()
        turns, num_preemptions = self.waiting.in_turn(), self.num_preemptions
        while plan.budget:
            sequence = next(turns, None)
            if sequence is None:
                return
            if sequence in skipped:
                continue
            if newcomers_only and not (sequence.num_uncomputed <= plan.budget and self._is_newcomer(sequence)):
                return
            if not self._can_start(sequence):
                if self._lacks_room(sequence) and self._has_waited(sequence):
                    return
                skipped.add(sequence)
                continue
            is_full = len(self.running) >= self._limits.max_running
            giver = self._place_giver(sequence) if is_full else None
            if is_full and giver is None:
                return
            self._find_cached(sequence)
            if self._next_key(sequence) in coming:
                self._return_blocks(sequence)
                skipped.add(sequence)
                continue
            if giver is not None:
                self._make_way(giver, plan)
            while not self._blocks.grow(sequence.block_table, sequence.num_computed + (chunk := plan.chunk(sequence))):
                victim = self._youngest_in_background(sequence)
                if victim is None:
                    self._return_blocks(sequence)
                    return
                self._make_way(victim, plan)
            self._start(sequence)
            plan.add(sequence, chunk)
            coming.update(self._keys_to_compute(sequence))
            if self.num_preemptions > num_preemptions:  # whoever made way is waiting again
                turns, num_preemptions = self.waiting.in_turn(), self.num_preemptions

    def _lacks_room(self, sequence: Sequence) -> bool:
        return not self._residency.lacking.isdisjoint(sequence.adapter_ids)

    def _has_waited(self, sequence: Sequence) -> bool:
        return self._clock() - sequence.arrival > self._limits.cold_patience

    def _draft(self, plan: Plan) -> None:
        """Let decodes guess ahead with what is left of the budget, where blocks are free."""
        for sequence, segment in list(plan.segments.items()):
            sampling = sequence.request.sampling
            room = min(plan.budget, sampling.max_tokens - sequence.num_generated - 1,
                       sequence.max_len - len(sequence.token_ids) - 1)  # fmt: skip
            drafts = self._foreseen(sequence, room, len(plan.segments))
            if drafts and self._blocks.grow(sequence.block_table, sequence.num_computed + 1 + len(drafts)):
                plan.extend(segment, drafts)

    def _foreseen(self, sequence: Sequence, room: int, num_in_step: int) -> tuple[int, ...]:
        if room <= 0 or sequence.constraint is None:
            return self.drafter.propose(sequence, room, num_in_step)
        if forced := sequence.constraint.forced() if self.drafter.max_tokens else []:
            return tuple(forced[:room])
        drafts = self.drafter.propose(sequence, room, num_in_step)
        return drafts[: sequence.constraint.num_admitted(drafts)]

    def _coming_keys(self) -> set[bytes]:
        """Of the blocks that running sequences are about to fill with their prompts."""
        return {key for sequence in self.running for key in self._keys_to_compute(sequence)}

    def _keys_to_compute(self, sequence: Sequence) -> list[bytes]:
        if sequence.num_uncomputed <= 1:
            return []
        size = self._blocks.block_size
        return sequence.block_keys(len(sequence.token_ids) // size, size)[sequence.num_computed // size :]

    def _next_key(self, sequence: Sequence) -> bytes | None:
        """Of the first block of its beginning that no cache has; None where it has them all, or must not use any."""
        keys = self._sharable_keys(sequence)
        done = len(sequence.block_table)
        return keys[done] if done < len(keys) else None

    def _return_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.num_computed = 0

    def _sharable_keys(self, sequence: Sequence) -> list[bytes]:
        """Of the blocks it could share; at least one token is left to compute, and those whose logits are wanted."""
        size, end = self._blocks.block_size, len(sequence.token_ids) - 1
        if sequence.pool is not None:
            end = min(end, sequence.pool.next_position)
        if sequence.request.sampling.num_prompt_logprobs is not None:
            end = min(end, len(sequence.prompt_logprobs))
        return sequence.block_keys(end // size, size)

    def _find_cached(self, sequence: Sequence) -> None:
        """Share what the prefix cache has of the sequence's beginning."""
        sequence.block_table.extend(self._blocks.share(self._sharable_keys(sequence)))
        sequence.num_computed = len(sequence.block_table) * self._blocks.block_size

    def _advance(self, segment: Segment, num_accepted: int) -> None:
        """The segment's tokens, and so many drafts, are computed: blocks they filled can be shared from now on."""
        sequence, size = segment.sequence, self._blocks.block_size
        sequence.num_computed = segment.start + segment.num_tokens - len(segment.drafts) + num_accepted
        first, end = segment.start // size, sequence.num_computed // size
        if first == end:
            return
        for block, key in zip(sequence.block_table[first:end], sequence.block_keys(end, size)[first:], strict=True):
            self._blocks.publish(block, key)
