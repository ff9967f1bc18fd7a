"""A scheduler without a model, for tests of who is in a step."""

from __future__ import annotations

from collections.abc import Set

from loraplex.engines.native.batch import Outcome, Sampled, Segment
from loraplex.engines.native.blocks import BlockPool
from loraplex.engines.native.residency import Residency, Room
from loraplex.engines.native.scheduler import Limits, Scheduler
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

BLOCK = 4


def place(residency: Residency, name: str, size: int, protected: Set[str] = frozenset()) -> Room | None:
    """Reserve and fill at once."""
    room = residency.reserve(name, size, protected)
    if room is not None:
        residency.publish(room.move.adapter_id if room.move else name)
    return room


class Bench:
    """A scheduler with a clock set by hand; `step` plays a model that always answers token 1.

    With `num_drafts` it plays one whose answer repeats itself for a while and then surprises.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        budget: int = 16,
        max_running: int = 8,
        num_drafts: int = 0,
        *,
        newcomers_alone: bool = False,
    ) -> None:
        self.now = 0.0
        self.blocks = BlockPool(num_blocks, BLOCK)
        self.residency = Residency(capacity=100)
        limits = Limits(budget, max_running, num_drafts, newcomers_alone=newcomers_alone)
        self.scheduler = Scheduler(limits, self.blocks, self.residency, lambda: self.now)
        self.surprises = bool(num_drafts)
        self.count = 0
        self.sequences: list[Sequence] = []

    def add(
        self,
        num_prompt: int,
        max_tokens: int = 4,
        adapter: str | None = None,
        *,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
        is_background: bool = False,
        same_prompt: bool = False,
    ) -> Sequence:
        self.count += 1
        self.now += 0.001
        first = 2 if same_prompt else 1000 * self.count
        request = GenerateRequest(
            request_id=str(self.count),
            prompt_token_ids=tuple(range(first, first + num_prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            adapter=Adapter(id=adapter, name=adapter, path="") if adapter else None,
            tenant=tenant,
            weight=weight,
            priority=priority,
            is_background=is_background,
        )
        sequence = Sequence(
            request=request, seed=0, eos_token_ids=frozenset(), arrival=self.now, max_len=self.blocks.num_blocks * BLOCK
        )
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self) -> dict[str, int]:
        """Tokens computed for each request in one step."""
        batch = self.scheduler.next()
        if batch is None:
            return {}
        self.scheduler.commit(batch, [Outcome(self._sampled(segment)) for segment in batch.segments])
        return {segment.sequence.request_id: segment.num_tokens for segment in batch.segments}

    def _sampled(self, segment: Segment) -> tuple[Sampled, ...]:
        first = segment.sequence.num_generated
        return tuple(Sampled(self.answer(first + place)) for place in range(segment.num_sampled))

    def answer(self, place: int) -> int:
        """The token at a place of any answer."""
        return 1 + (place // 5) % 3 * self.surprises
