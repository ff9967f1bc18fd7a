"""How many CPU threads a forward pass should use: measured, because more is often slower.

A small model's step is hundreds of small operations, and each pays for waking and joining the threads: on two shared
cores a 256-wide model decodes twice as fast on one thread as on two, a 2048-wide one faster on two
(`bench/mixed.py --threads`).
"""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

_TOKENS = 8  # a typical decode batch
_REPEATS = 5
# What doubling the threads must gain to be worth it: LoRA's small matrices gain less than the measured base does.
_WORTH = 1.5


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
