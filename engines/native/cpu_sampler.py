"""Draws on a CPU, by the kernel that neither sorts nor copies logits; inversion runs over the tokens as numbered."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from loraplex.engines.native.sampler import Row, draw_by_sorting
from loraplex.kernels.fused.cpu_draw import Draw, draw_tokens

_LIKELIEST = Draw()


def pick_by_kernel(logits: Tensor, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
    """A `Pick`. What ties with the last token that a filter keeps is kept as well. Typical tokens are still sorted."""
    largest, tokens = draw_tokens(logits, [_draw(row, logits.shape[1]) for row in rows])
    typical = [place for place, row in enumerate(rows) if _is_sorted(row) and math.isfinite(largest[place])]
    if typical:
        drawn = draw_by_sorting(logits[typical].float(), [rows[place] for place in typical])
        for place, token in zip(typical, drawn, strict=True):
            tokens[place] = token
    return largest, tokens


def _is_sorted(row: Row) -> bool:
    return row.params.typical_p < 1.0 and row.params.temperature > 0


def _draw(row: Row, vocab_size: int) -> Draw:
    params = row.params
    if params.temperature == 0 or params.typical_p < 1.0:
        return _LIKELIEST
    return Draw(row.draw, params.temperature, params.top_p, params.min_p, min(params.top_k, vocab_size))
