"""The hidden states of one prompt on their way to one vector.

They come in runs of positions, as the prompt is computed chunk by chunk; what was computed before a preemption is kept.
They are added one after the other, so where the chunks' borders lie makes no difference to a single bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loraplex.engines.protocol import Pooling


@dataclass(slots=True)
class Pool:
    """`positions` are those whose hidden states count, of a prompt of `num_tokens`."""

    pooling: Pooling
    normalize: bool
    num_tokens: int
    positions: range = field(init=False)
    _num_seen: int = 0
    _total: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        first = self.num_tokens - 1 if self.pooling == "last" else 0
        self.positions = range(first, 1 if self.pooling == "cls" else self.num_tokens)

    @property
    def next_position(self) -> int:
        """The first one whose hidden state is still missing."""
        return self.positions.start + self._num_seen

    @property
    def is_complete(self) -> bool:
        return self._num_seen == len(self.positions)

    def missing(self, start: int, end: int) -> range:
        """Of the positions start … end − 1 those that count and were not seen."""
        return range(max(start, self.next_position), min(end, self.positions.stop))

    def add(self, hidden: Iterable[NDArray[np.float32]]) -> None:
        """The hidden states of the next positions, in order. Each: Shape [H]."""
        for row in hidden:
            self._total = row.astype(np.float64) if self._total is None else self._total + row
            self._num_seen += 1

    @property
    def values(self) -> tuple[float, ...] | None:
        """The vector, once complete; None where it is not finite. A vector of zeros stays as it is."""
        assert self.is_complete
        assert self._total is not None
        mean = self._total / len(self.positions)
        length = math.sqrt(float((mean * mean).sum()))
        if not math.isfinite(length):
            return None
        return tuple((mean / length if self.normalize and length else mean).tolist())
