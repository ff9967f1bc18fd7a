"""How many CPU threads a forward pass should use: measured, because more is often slower.

A small model's step is hundreds of small operations, and each pays for waking and joining the threads; where cores are
shared with others, it waits for the slowest of them (`bench/mixed.py --threads`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engines.native.capture import Capture, NotCapturable, Pool
from loraplex.kernels.calls import is_available

_TOKENS = 8  # a typical decode batch
_REPEATS = 5  # or more, as many as fit into
_SECONDS = 0.05
# What doubling the threads must gain to be worth it: what leaves the gateway and its clients no core of their own is no
# gain. Steps that gained 1.35 times by a second thread answered 1.07 to 1.13 times as many requests over HTTP.
_WORTH = 1.2


def choose_num_threads(model: PreTrainedModel, *, replays: bool = False) -> int:
    """The number of threads at which a step of a few tokens is fastest; left set. Nothing to choose off the CPU.

    `replays`: such steps will be captured, if they can be.
    """
    most = torch.get_num_threads()
    if model.device.type != "cpu":
        return most
    best = 1
    best_seconds = _step_seconds(model, 1, replays=replays)
    while best < most:
        more = min(2 * best, most)
        seconds = _step_seconds(model, more, replays=replays)
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
