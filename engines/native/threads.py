"""How many CPU threads a forward pass should use: measured, because more is often slower.

A small model's step is hundreds of small operations, and each pays for waking and joining the threads; where cores are
shared with others, it waits for the slowest of them (`bench/mixed.py --threads`).
"""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

_TOKENS = 8  # a typical decode batch
_REPEATS = 5
# What doubling the threads must gain to be worth it: what leaves the gateway and its clients no core of their own is no
# gain. Steps that gained 1.35 times by a second thread answered 1.07 to 1.13 times as many requests over HTTP.
_WORTH = 1.2


def choose_num_threads(model: PreTrainedModel) -> int:
    """The number of threads at which a step of a few tokens is fastest; left set. Nothing to choose off the CPU."""
    most = torch.get_num_threads()
    if model.device.type != "cpu":
        return most
    best = 1
    best_seconds = _step_seconds(model, 1)
    while best < most:
        more = min(2 * best, most)
        seconds = _step_seconds(model, more)
        if best_seconds / seconds < _WORTH:
            break
        best, best_seconds = more, seconds
    torch.set_num_threads(best)
    return best


@torch.inference_mode()
def _step_seconds(model: PreTrainedModel, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    ids = torch.arange(_TOKENS, device=model.device)[None]
    last = ids[0, -1:]  # as a number it would make lm_head copy its weight
    timings = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=last)
        timings.append(time.perf_counter() - began)
    return min(timings)
