"""Long copies and checks as generators that pause after each small piece, so that a step never waits for a whole one.

Who runs such a generator decides how far it goes at a time. A piece is at most `PIECE` elements, or one row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

PIECE = 2**16  # elements; some 30 µs to copy, and too few for torch to wake its other threads for long
BATCH = 2**22  # elements that a thread of its own copies at a time; some milliseconds

Result = TypeVar("Result")
Pieces = Generator[None, None, Result]


def slices(tensor: Tensor, numel: int | None = None) -> Iterator[slice]:
    """Of a tensor's rows, a piece each, or so many elements."""
    num_rows = tensor.shape[0]
    step = max(1, (numel or PIECE) * num_rows // max(1, tensor.numel()))
    return (slice(begin, begin + step) for begin in range(0, num_rows, step))


def copy(target: Tensor, source: Tensor) -> Pieces[None]:
    """target[…] = source[…], of one shape, whatever their types."""
    for rows in slices(target):
        target[rows].copy_(source[rows])
        yield


def copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> Pieces[None]:
    """target[…] = source[…] for many small pairs: one call for a good many, in which no other thread waits for Python's
    lock."""
    targets, sources, numel = [], [], 0
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
        numel += target.numel()
        if numel >= BATCH:
            torch._foreach_copy_(targets, sources)
            targets, sources, numel = [], [], 0
            yield
    if targets:
        torch._foreach_copy_(targets, sources)


def are_finite(flat: Tensor) -> Pieces[bool]:
    """Whether all of a flat tensor's elements are. Infinities and NaNs survive a sum; a sum may also overflow."""
    for part in slices(flat):
        if not flat[part].sum(dtype=torch.float32).isfinite() and not flat[part].isfinite().all():
            return False
        yield
    return True


def exhaust(pieces: Pieces[Result]) -> Result:
    """Go all the way."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            result: Result = stop.value
            return result
