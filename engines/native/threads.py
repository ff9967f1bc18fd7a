"""How many CPU threads a forward pass should use: measured, because more is often slower.

A small model's step is hundreds of small operations, and each pays for waking and joining the threads; where cores are
shared with others, it waits for the slowest of them (`bench/mixed.py --threads`). Threads on all cores leave none to
the gateway, which has its part in every step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engines.native.capture import Capture, NotCapturable, Pool
from loraplex.kernels.calls import is_available

_TOKENS = 8  # a typical decode batch
_REPEATS = 5  # or more, as many as fit into
_SECONDS = 0.05
_WORTH = 1.1  # what doubling the threads must gain to be worth it: measurements vary by some hundredths
# Seconds of a core that the gateway takes for a step's tokens (`bench/wire.py`: 40 to 60 µs each). Where no core is
# left to it, that comes on top of each step (`bench/compare.py --threads`; docs/performance.md has what it mattered).
_BESIDE = _TOKENS * 50e-6
_CGROUP = Path("/sys/fs/cgroup")


def num_cores(cgroup: Path = _CGROUP) -> int:
    """On how many cores this process may run at a time, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for read in (_quota, _quota_of_old):
        with suppress(OSError, ValueError):  # no such cgroup, or no limit
            cores = min(cores, max(math.ceil(read(cgroup)), 1))
    return cores


def _quota(cgroup: Path) -> float:
    """In cores. Raises ValueError where it is "max"."""
    quota, period = (cgroup / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _quota_of_old(cgroup: Path) -> float:
    """The same of cgroups' first version. Raises ValueError where there is no limit."""
    quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError("no limit")
    return quota / period


def choose_num_threads(model: PreTrainedModel, *, replays: bool = False) -> int:
    """The number of threads at which steps of a few tokens are served fastest; left set. Nothing to choose off the CPU.

    `replays`: such steps will be captured, if they can be.
    """
    most = torch.get_num_threads()
    if model.device.type != "cpu":
        return most
    cores = num_cores()
    best = 1
    best_seconds = _step_seconds(model, 1, replays=replays)
    while best < most:
        more = min(2 * best, most)
        seconds = _step_seconds(model, more, replays=replays) + (_BESIDE / cores if more >= cores else 0.0)
        if best_seconds / seconds < _WORTH:
            break
        best, best_seconds = more, seconds
    torch.set_num_threads(best)
    return best


@torch.inference_mode()
def _step_seconds(model: PreTrainedModel, num_threads: int, *, replays: bool) -> float:
    torch.set_num_threads(num_threads)
    step: Callable[[], Tensor] = partial(_step, model, torch.arange(_TOKENS, device=model.device))
    if replays and is_available():
        capture = Capture()
        with capture.capturing():
            logits = step()
        with suppress(NotCapturable):
            step = capture.graph(logits, Pool()).replay
    timings: list[float] = []
    while len(timings) < _REPEATS or sum(timings) < _SECONDS:
        began = time.perf_counter()
        step()
        timings.append(time.perf_counter() - began)
    return min(timings)


def _step(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """token_ids: Shape [T]. Result: Shape [1, 1, V]."""
    last = token_ids[-1:]  # as a number it would make lm_head copy its weight
    ids = token_ids[None]
    logits: Tensor = model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=last).logits
    return logits
