"""Draws without sorting against transformers' own logits processors; the kernel is interpreted where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixes import DEVICE
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.engines.native.device_sampler import draw_by_thresholds
from loraplex.engines.native.sampler import Row, draw_by_sorting
from loraplex.engines.protocol import SamplingParams

VOCAB = 40
GRID = 48
CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.7, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 10 * VOCAB},
]


def some_logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def row(draw: float, **controls: Any) -> Row:
    return Row(SamplingParams(max_tokens=1, **controls), draw=draw)


def drawn(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    """All from the same logits. Shape [V]."""
    return draw_by_thresholds(logits.to(DEVICE).repeat(len(rows), 1), rows)


def expected(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> Any:
    """The distribution that transformers would draw from. Shape [V], float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    scores: Any = logits[None].clone()
    nothing: Any = torch.zeros(1, 1, dtype=torch.long)
    return torch.softmax(warpers(nothing, scores).double(), dim=-1)[0]


@pytest.mark.parametrize("controls", CASES, ids=str)
def test_draws_meet_each_token_that_transformers_keeps_and_no_other(controls: dict[str, Any]) -> None:
    """A draw in the middle of each token's share, and the first and the last one there are."""
    logits = some_logits()
    probs = expected(logits, **controls)
    kept = probs.nonzero().flatten().tolist()
    middles = (probs.cumsum(0) - probs / 2)[kept].tolist()
    found = drawn(logits, [row(draw, **controls) for draw in (0.0, *middles, 1 - 2**-53)])
    assert found == [kept[0], *kept, kept[-1]]


@pytest.mark.parametrize("controls", [CASES[0], CASES[5]], ids=str)
def test_frequencies_of_even_draws_are_the_probabilities(controls: dict[str, Any]) -> None:
    """Of draws that lie evenly each token gets its share, or one more or less."""
    logits = some_logits()
    found = drawn(logits, [row((number + 0.5) / GRID, **controls) for number in range(GRID)])
    counts = torch.bincount(torch.tensor(found), minlength=VOCAB)
    assert (counts - GRID * expected(logits, **controls)).abs().max() <= 1


def test_row_draws_the_same_in_any_company() -> None:
    """Beside rows with other filters, with none, and with such as are sorted."""
    controls = [*CASES, {"temperature": 1.0, "typical_p": 0.6}]
    rows = [row(draw, **one) for one in controls for draw in (0.2, 0.9)]
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(rows), VOCAB, generator=generator).to(DEVICE)
    together = draw_by_thresholds(logits, rows)
    assert together == [draw_by_thresholds(logits[[place]], [one])[0] for place, one in enumerate(rows)]
    assert together[-2:] == draw_by_sorting(logits[-2:], rows[-2:])


def test_tokens_that_tie_with_the_last_one_kept_stay() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[3, 5, 9]] = torch.tensor([1.0, 1.0, -2.0])
    assert drawn(logits, [row(draw, temperature=1.0, top_k=1) for draw in (0.0, 0.49, 0.51, 0.99)]) == [3, 3, 5, 5]


def test_draw_never_meets_what_has_no_probability() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[0, 17]] = torch.tensor([-60.0, 0.0])  # the first is less likely than any draw can tell
    assert drawn(logits, [row(draw, temperature=1.0) for draw in (0.0, 1 - 2**-53)]) == [17, 17]
