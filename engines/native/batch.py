"""What one step computes: for each sequence a run of its tokens. Plain Python; the runner makes tensors of it."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions `start … start + num_tokens - 1` of one sequence; `samples` where the last is the newest."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one sampling segment gave; log-probabilities where its request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The segments of step number `step`, those of one adapter side by side."""

    step: int
    segments: tuple[Segment, ...]

    @property
    def sampling_segments(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.samples)
