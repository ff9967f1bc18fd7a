"""What one step is to compute, while the scheduler puts it together. Plain Python, like the scheduler."""

from __future__ import annotations

import msgspec

from loraplex.engines.native.batch import Segment
from loraplex.engines.native.sequence import Sequence


class Plan:
    """A step being put together: segments so far, and what is left of the token budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.segments: dict[Sequence, Segment] = {}
        self._kept = 0

    @property
    def room(self) -> int:
        """Tokens that may be planned now."""
        return self.budget - self._kept

    def keep_for(self, num_others: int) -> None:
        """Leave even shares of what is left to so many others; the odd tokens are for who comes first."""
        self._kept = self.budget * num_others // (num_others + 1)

    def chunk(self, sequence: Sequence) -> int:
        """As many of its next tokens as there is room for."""
        return min(sequence.num_uncomputed, self.room)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Its next tokens, so many of them."""
        samples = num_tokens == sequence.num_uncomputed and sequence.pool is None
        segment = Segment(sequence=sequence, start=sequence.num_computed, num_tokens=num_tokens, samples=samples)
        self.segments[sequence] = segment
        self.budget -= num_tokens

    def drop(self, sequence: Sequence) -> None:
        segment = self.segments.pop(sequence, None)
        self.budget += segment.num_tokens if segment else 0

    def extend(self, segment: Segment, drafts: tuple[int, ...]) -> None:
        """Let a decode compute these after its token."""
        longer = msgspec.structs.replace(segment, num_tokens=segment.num_tokens + len(drafts), drafts=drafts)
        self.segments[segment.sequence] = longer
        self.budget -= len(drafts)

    @property
    def only_decodes(self) -> bool:
        return all(segment.samples and segment.num_tokens == 1 for segment in self.segments.values())
