"""Top-k, top-p and min-p of a whole batch without sorting the vocabulary.

Each filter keeps the logits that reach a threshold, and a threshold is found by bisection over what 32 bits can tell
apart, so it is exact. Of row t, with p = softmax of the logits that the filters before have kept, in this order:

    top-k: keep x ≥ the k-th largest logit                          (ties with it stay)
    top-p: keep the fewest likeliest tokens whose p sums to top_p or more    (ties with the least of them stay)
    min-p: keep p ≥ min_p · max p

    logits: Shape [T, V], float32.   top_k: Shape [T], int32, 0: off.   top_p, min_p: Shape [T], float32, 1 and 0: off.
    y: Shape [T, V], float32: the logits, −inf where a filter left one out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton_support import padded

MOST_AT_ONCE = 16384  # logits that a program looks at together: it goes through the row some sixty times


def truncate_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """y."""
    y = torch.empty_like(logits)
    block = min(padded(logits.shape[1]), MOST_AT_ONCE)
    _truncate[(logits.shape[0],)](
        y, logits, top_k, top_p, min_p, logits.shape[1], BLOCK=block, num_warps=min(max(block // 512, 1), 32)
    )
    return y


@triton.jit
def _order(x):  # type: ignore[no-untyped-def]
    """float32 -> int64 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _truncate(y, logits, top_k, top_p, min_p, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * width
    numbers = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, width, BLOCK):
        x = tl.load(own + begin + numbers, mask=begin + numbers < width, other=float("-inf"))
        largest = tl.maximum(largest, x)
    most = tl.max(largest, axis=0)
    highest = _order(most)
    lowest = _order(most * 0.0 + float("-inf"))
    threshold = lowest
    k = tl.load(top_k + row)
    if k > 0:  # the largest threshold that at least k logits reach
        low, high = lowest, highest
        while low < high:
            middle = low + (high - low + 1) // 2
            counts = tl.zeros((BLOCK,), tl.int32)  # added up once: meanwhile no thread waits for another
            for begin in range(0, width, BLOCK):
                x = tl.load(own + begin + numbers, mask=begin + numbers < width, other=float("-inf"))
                counts += ((_order(x) >= middle) & (begin + numbers < width)).to(tl.int32)
            if tl.sum(counts, axis=0) >= k:
                low = middle
            else:
                high = middle - 1
        threshold = low
    p = tl.load(top_p + row)
    if p < 1.0:  # the largest threshold whose logits have that much of what top-k has kept
        masses = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, width, BLOCK):
            x = tl.load(own + begin + numbers, mask=begin + numbers < width, other=float("-inf"))
            masses += tl.where(_order(x) >= threshold, tl.exp(x - most), 0.0)
        wanted = p * tl.sum(masses, axis=0)
        low, high = threshold, highest
        while low < high:
            middle = low + (high - low + 1) // 2
            masses = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, width, BLOCK):
                x = tl.load(own + begin + numbers, mask=begin + numbers < width, other=float("-inf"))
                masses += tl.where(_order(x) >= middle, tl.exp(x - most), 0.0)
            if tl.sum(masses, axis=0) >= wanted:
                low = middle
            else:
                high = middle - 1
        threshold = low
    floor = tl.load(min_p + row)
    for begin in range(0, width, BLOCK):
        x = tl.load(own + begin + numbers, mask=begin + numbers < width, other=float("-inf"))
        is_kept = (_order(x) >= threshold) & (tl.exp(x - most) >= floor)
        tl.store(
            y + row.to(tl.int64) * width + begin + numbers, tl.where(is_kept, x, float("-inf")),
            mask=begin + numbers < width,
        )  # fmt: skip


def truncate_logits_reference(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The formula, row by row, by sorting."""
    rows = []
    for row, k, p, floor in zip(logits, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True):
        kept = row.clone()
        if k:
            kept[row < row.topk(min(k, len(row))).values[-1]] = float("-inf")
        if p < 1:
            likeliest, order = kept.double().softmax(-1).sort(descending=True, stable=True)
            num_kept = int((likeliest.cumsum(0) < p).sum()) + 1
            kept[kept < kept[order[num_kept - 1]]] = float("-inf")
        probabilities = kept.double().softmax(-1)
        kept[probabilities < floor * probabilities.max()] = float("-inf")
        rows.append(kept)
    return torch.stack(rows)
