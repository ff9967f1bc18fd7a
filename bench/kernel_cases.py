"""What the kernels are timed on (`kernel_table.py`): models' sizes, and calls with the bytes that they must touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

BEYOND_CACHES = 384 * 2**20  # bytes of layers in turn, so that each is read from memory, as in a step


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    width: int
    vocab: int


SHAPES = {
    "8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "1.1b": Shape(2048, 5632, 32, 4, 64, 32000),
    "135m": Shape(576, 1536, 9, 3, 64, 49152),
}


@dataclass(frozen=True)
class Case:
    """One thing to time. `num_bytes` is what it must read and write."""

    name: str
    run: Callable[[], object]
    num_bytes: int


def in_turn(layers: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = cycle(layers)
    return lambda: next(turn)()
