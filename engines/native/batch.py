"""What one step computes: for each sequence a run of its tokens. Plain Python; the runner makes tensors of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraplex.engines.errors import EngineError
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions `start … start + num_tokens - 1` of one sequence; `samples` where they reach its newest token.

    The last positions may hold `drafts`, guesses of the tokens that follow its newest one: what is sampled at a
    position says whether the draft behind it was right.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids[self.start : self.start + self.num_tokens], *self.drafts]

    @property
    def scored(self) -> range:
        """The positions behind which a token of the prompt stands whose log-probability is still to be told."""
        sequence = self.sequence
        if sequence.request.sampling.num_prompt_logprobs is None:
            return range(0)
        end = min(self.start + self.num_tokens, sequence.num_prompt_tokens - 1)
        return range(max(self.start, len(sequence.prompt_logprobs)), end)

    @property
    def pooled(self) -> range:
        """The positions whose hidden states are wanted for an embedding."""
        pool = self.sequence.pool
        return pool.missing(self.start, self.start + self.num_tokens) if pool is not None else range(0)

    @property
    def num_sampled(self) -> int:
        """At how many of its last positions a token is sampled."""
        return len(self.drafts) + 1 if self.samples else 0

    @property
    def rows(self) -> list[int]:
        """Which of its positions the logits of are needed, counted from `start`: the scored, then the sampled ones."""
        scored = [position - self.start for position in self.scored]
        return [*scored, *range(self.num_tokens - self.num_sampled, self.num_tokens)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token; log-probabilities where its request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one segment gave: a token for each position that samples, the prompt's log-probabilities, or an error.

    `hidden` are the hidden states of the positions that are pooled, each: Shape [H].
    """

    sampled: tuple[Sampled, ...] = ()
    hidden: Iterable[NDArray[np.float32]] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The segments of step number `step`, those of one adapter side by side."""

    step: int
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def only_decodes(self) -> bool:
        """Whether no segment computes a prompt."""
        return all(segment.num_tokens == segment.num_sampled for segment in self.segments)
