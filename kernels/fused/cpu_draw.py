"""One token of each row of logits on a CPU, in C (`cpu_draw.c`), where sorting takes longer than many a step.

A row of temperature 0 has its likeliest token, the lowest of those that tie. Another has the first token up to which
more than draw · Σw is weighed, draw in [0, 1), where w = e^((x − max x) / temperature) of the logits x that are kept:

    top-k: keep x ≥ the k-th largest logit                                            (ties with it stay)
    top-p: keep the fewest likeliest tokens that weigh top_p of what top-k has kept   (ties with the least of them stay)
    min-p: keep w ≥ min_p

What weighs less than e^−87 weighs nothing. `is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraplex.kernels.built import constant, function, library

_NAMES = {torch.float32: "loraplex_draw_float", torch.bfloat16: "loraplex_draw_bfloat16"}
_ARGUMENTS = (*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int)


class Draw(NamedTuple):
    """How one row's token is drawn. Off: temperature and top_k 0, top_p 1, min_p 0."""

    draw: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0


_DRAW = np.dtype([("draw", "f8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4")])


class _Draws(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("draws", "weights", "sums")),
    )


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[float], list[int]]:
    """Each row's largest logit, NaN where there is any, and its token, which is none where that is not finite.

    logits: Shape [N, V], of a type that `is_available` knows.
    """
    logits = logits.contiguous()
    num_rows, width = logits.shape
    each = np.array(draws, dtype=_DRAW)
    num_threads = torch.get_num_threads()
    weights = torch.empty(num_threads * width)
    sums = torch.empty(num_threads * -(-width // constant(__file__, "loraplex_draw_block")), dtype=torch.float64)
    largest, tokens = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    call = _Draws(width, each.ctypes.data, weights.data_ptr(), sums.data_ptr())
    function(__file__, _NAMES[logits.dtype], *_ARGUMENTS)(call, logits, largest, tokens, num_rows, num_threads)
    return largest.tolist(), tokens.tolist()


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `draw_tokens` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None


def draw_reference(logits: Tensor, draw: Draw) -> int:
    """The formula of one row in float64, by sorting. logits: Shape [V]."""
    if draw.temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    wide = logits.double()
    weights = ((wide - wide.max()) / draw.temperature).exp()
    if draw.top_k:
        weights = weights.where(wide >= wide.sort(descending=True).values[min(draw.top_k, len(wide)) - 1], 0.0)
    if draw.top_p < 1:
        likeliest, order = wide.sort(descending=True, stable=True)
        num_kept = int((weights[order].cumsum(0) < draw.top_p * weights.sum()).sum()) + 1
        weights = weights.where(wide >= likeliest[num_kept - 1], 0.0)
    weights = weights.where(weights >= draw.min_p, 0.0)
    cumulative = weights.cumsum(0)
    return int((cumulative > draw.draw * cumulative[-1]).nonzero()[0])
