"""Draws on a CUDA device, where sorting the vocabulary takes longer than all else that sampling does.

top-k, top-p and min-p are thresholds, which Triton finds; inversion runs over the tokens as they are numbered. It
counts in integers, whose sums are the same in whatever order a device makes them: what a row draws depends on nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.engines.native.sampler import Row, draw_by_sorting, picking
from loraplex.kernels.fused.truncation import truncate_logits

# What a probability of one counts. float64 holds all sums; tokens that are less likely than 2^-48 count nothing.
_ONE = 2.0**48


def draw_by_thresholds(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """As `draw_by_sorting`, but the order is another, and what ties with the last token that is kept is kept as well.

    Rows that want typical tokens are still sorted. logits: Shape [N, V], float32.
    """
    typical = [place for place, row in enumerate(rows) if row.params.typical_p < 1.0]
    others = [place for place, row in enumerate(rows) if row.params.typical_p >= 1.0]
    tokens: dict[int, int] = {}
    for places, draw in ((typical, draw_by_sorting), (others, _draw_in_order)):
        if places:
            own = logits if len(places) == len(rows) else logits[places]
            tokens |= zip(places, draw(own, [rows[place] for place in places]), strict=True)
    return [tokens[place] for place in range(len(rows))]


pick_by_thresholds = picking(draw_by_thresholds)


def compile_draws(vocab_size: int, device: torch.device) -> None:
    """Have compiled what draws of that many tokens want."""
    off, none = torch.ones(1, device=device), torch.zeros(1, device=device)
    truncate_logits(torch.zeros(1, vocab_size, device=device), none.int(), off, none)


def _draw_in_order(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Inversion over the filtered distribution, lowest token first."""
    probs = torch.softmax(_truncated(logits, rows), dim=-1)
    cumulative = (probs.double() * _ONE).long().cumsum(dim=-1)
    draws = torch.tensor([row.draw for row in rows], dtype=torch.float64, device=logits.device)[:, None]
    total = cumulative[:, -1:]
    target = (draws * total).long().minimum(total - 1)  # for the product may be rounded up to the total
    found = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    return [int(token) for token in found[:, 0].tolist()]


def _truncated(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """By temperature and filters. Shape [N, V]."""
    params, device, size = [row.params for row in rows], logits.device, logits.shape[1]
    logits = logits / torch.tensor([p.temperature for p in params], device=device)[:, None]
    if not any(p.top_k or p.top_p < 1.0 or p.min_p for p in params):
        return logits  # as the kernel would
    return truncate_logits(
        logits,
        torch.tensor([min(p.top_k, size) for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], device=device),
        torch.tensor([p.min_p for p in params], device=device),
    )
