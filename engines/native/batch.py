"""What one step computes: for each sequence a run of its tokens. Plain Python; the runner makes tensors of it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import msgspec
import numpy as np
from numpy.typing import NDArray

from loraplex.engines.errors import EngineError
from loraplex.engines.native.sequence import Sequence
from loraplex.engines.protocol import TokenLogprobs

_NONE = range(0)


class Segment(msgspec.Struct, frozen=True):
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
            return _NONE
        end = min(self.start + self.num_tokens, sequence.num_prompt_tokens - 1)
        return range(max(self.start, len(sequence.prompt_logprobs)), end)

    @property
    def pooled(self) -> range:
        """The positions whose hidden states are wanted for an embedding."""
        pool = self.sequence.pool
        return pool.missing(self.start, self.start + self.num_tokens) if pool is not None else _NONE

    @property
    def num_sampled(self) -> int:
        """At how many of its last positions a token is sampled."""
        return len(self.drafts) + 1 if self.samples else 0

    @property
    def rows(self) -> SequenceOf[int]:
        """Which of its positions the logits of are needed, counted from `start`: the scored, then the sampled ones."""
        sampled = range(self.num_tokens - self.num_sampled, self.num_tokens)
        return [*(position - self.start for position in self.scored), *sampled] if self.scored else sampled


class Sampled(msgspec.Struct, frozen=True):
    """One token; log-probabilities where its request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Outcome(msgspec.Struct, frozen=True):
    """What one segment gave: a token for each position that samples, the prompt's log-probabilities, or an error.

    `hidden` are the hidden states of the positions that are pooled, each: Shape [H].
    """

    sampled: tuple[Sampled, ...] = ()
    hidden: Iterable[NDArray[np.float32]] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: EngineError | None = None


class Batch(msgspec.Struct, frozen=True):
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
