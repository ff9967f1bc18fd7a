"""What is measured at start, to choose who computes it."""

from __future__ import annotations

import time
from collections.abc import Callable

_REPEATS = 3


def least_seconds(run: Callable[[], object]) -> float:
    """Of a few runs the shortest: what disturbs one makes it longer."""
    timings = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        timings.append(time.perf_counter() - began)
    return min(timings)
