"""Prompt-lookup drafting: what followed the newest tokens when they last occurred may follow them again.

A draft is computed in the same step as the token before it and kept where the token sampled there is the same, so an
answer does not depend on its drafts; only its speed does. How long drafts are follows from two measurements: how often
those of this sequence were right, and how long steps of each size take. Where they do not pay there are none, but for
a single one now and then, to find out.

The idea: Saxena, "Prompt Lookup Decoding" (2023); PLD is also in transformers as `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

from loraplex.engines.native.batch import Batch
from loraplex.engines.native.sequence import Sequence

_LENGTHS = (3, 2)  # of the n-grams that are looked up, longest first
_PROBE_EVERY = 32  # tokens
_FIRST_GUESS = 0.7  # of a draft's being right
_LEARNING_RATE = 0.1
_MARGIN = 1.25  # by which drafts must gain more than they cost: both are guesses, and sizes seldom met are dear
_RECKONED_EVERY = 16  # steps
_ENOUGH = 3  # steps of a size whose mean counts by itself
_NEARNESS = 1 / 8  # the weight of a size in the line, for each octave that it lies off
_OUTLIER = 2.0  # times the mean: what takes longer was held up by something else


class StepCosts:
    """Seconds of a decode step by its number of tokens, as those were lately.

    A step grows by pieces: while it reads weights, tokens are nearly free; once it multiplies longer than it reads,
    each costs what it costs alone. For a size that was not met, a line is laid through the others, by nearness.
    """

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._reckoned: dict[int, float] = {}
        self._num_added = 0

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        mean = self._means.get(num_tokens, seconds)
        weight = min(self._weights.get(num_tokens, 0.0) + 1, 1 / _LEARNING_RATE)
        self._weights[num_tokens] = weight
        self._means[num_tokens] = mean + (min(seconds, _OUTLIER * mean) - mean) / weight
        self._num_added += 1
        if self._num_added % _RECKONED_EVERY == 1:
            self._reckoned.clear()

    def seconds(self, num_tokens: int) -> float | None:
        """Of a step of so many tokens; None where nothing is known."""
        found = self._reckoned.get(num_tokens)
        if found is None:
            is_known = self._weights.get(num_tokens, 0.0) >= _ENOUGH
            found = self._means[num_tokens] if is_known else self._on_line(num_tokens)
            if found is not None:
                self._reckoned[num_tokens] = found
        return found

    def _on_line(self, num_tokens: int) -> float | None:
        """By weighted least squares; None where all steps had the same size. Never less than 0, nor falling."""
        count = n = nn = t = nt = 0.0
        for size, seconds in self._means.items():
            weight = self._weights[size] * _NEARNESS ** abs(math.log2(num_tokens / size))
            count += weight
            n += weight * size
            nn += weight * size * size
            t += weight * seconds
            nt += weight * size * seconds
        spread = count * nn - n * n
        if spread <= 1e-9 * nn * count:
            return None
        per_token = max((count * nt - n * t) / spread, 0.0)
        return max((t - per_token * n) / count + per_token * num_tokens, 0.0)


@dataclass(slots=True)
class _Memory:
    """Of one sequence: where its n-grams last ended, and how its drafts fared."""

    acceptance: float
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0
    last_tried: int = -_PROBE_EVERY


class Drafter:
    """Proposes drafts and learns from what became of them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.costs = StepCosts()
        self.num_drafted = self.num_accepted = 0
        self._usual_acceptance = _FIRST_GUESS
        self._memories: weakref.WeakKeyDictionary[Sequence, _Memory] = weakref.WeakKeyDictionary()

    def propose(self, sequence: Sequence, room: int, num_in_step: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow, where they pay in a step of so many tokens."""
        if room <= 0 or not self.max_tokens:
            return ()
        memory = self._memory(sequence)
        length = self._length(memory, sequence.num_generated, num_in_step)
        if not length:
            return ()
        drafts = _look_up(memory, sequence.token_ids, min(length, room))
        if drafts:
            memory.last_tried = sequence.num_generated
        return drafts

    def learn(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """So many of a sequence's drafts were right; the first wrong one says nothing of those behind it."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        memory = self._memory(sequence)
        for place in range(min(num_accepted + 1, num_drafted)):
            memory.acceptance += _LEARNING_RATE * ((place < num_accepted) - memory.acceptance)
            self._usual_acceptance += _LEARNING_RATE / 5 * ((place < num_accepted) - self._usual_acceptance)

    def _memory(self, sequence: Sequence) -> _Memory:
        """A new sequence's drafts are thought to fare as others' did."""
        return self._memories.setdefault(sequence, _Memory(self._usual_acceptance))

    def time(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        if batch.only_decodes:
            self.costs.add(batch.num_tokens, seconds)

    def _length(self, memory: _Memory, num_generated: int, num_in_step: int) -> int:
        """The i-th draft is kept with probability acceptance^i: as many as give most tokens a second.

        As if each sequence of the step had as many.
        """
        alone = self.costs.seconds(num_in_step)
        if alone is None:
            return self.max_tokens
        length, best, expected, kept = 0, _MARGIN / max(alone, 1e-9), 1.0, 1.0
        for more in range(1, self.max_tokens + 1):
            seconds = self.costs.seconds(num_in_step * (1 + more))
            if seconds is None:
                return self.max_tokens
            kept *= memory.acceptance
            expected += kept
            if expected / max(seconds, 1e-9) > best:
                length, best = more, expected / max(seconds, 1e-9)
        is_due = num_generated - memory.last_tried >= _PROBE_EVERY
        return length or int(is_due)


def _look_up(memory: _Memory, token_ids: list[int], length: int) -> tuple[int, ...]:
    """What followed the last occurrence of the newest n-gram before this one."""
    for end in range(max(memory.num_indexed, 1), len(token_ids)):
        for size in _LENGTHS:
            if end >= size:
                memory.ends[tuple(token_ids[end - size : end])] = end
    memory.num_indexed = len(token_ids)
    for size in _LENGTHS:
        found = memory.ends.get(tuple(token_ids[-size:]))
        if found is not None:
            return _continued(token_ids, found, length)
    return ()


def _continued(token_ids: list[int], end: int, length: int) -> tuple[int, ...]:
    """`length` tokens from `end` on; a period that reaches the newest token goes on beyond it."""
    period = len(token_ids) - end
    return tuple(token_ids[end + place % period] for place in range(length))
