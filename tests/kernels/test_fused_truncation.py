"""`truncate_logits` against sorting, and against transformers' own filters."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from loraplex.kernels.fused import truncation
from loraplex.kernels.fused.truncation import truncate_logits, truncate_logits_reference

WIDTH = 2500
CASES = [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.02), (50, 0.8, 0.01), (WIDTH, 0.1, 0.5)]


def columns(cases: list[tuple[int, float, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top_k, top_p, min_p = zip(*cases, strict=True)
    return (
        torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
    )


def logits() -> torch.Tensor:
    return torch.randn(len(CASES), WIDTH, generator=torch.Generator().manual_seed(1)).mul(3).to(DEVICE)


@pytest.mark.parametrize("at_once", [512, 16384])
def test_truncation_equals_sorting(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are looked at in one piece, and in several, the last one cut short."""
    monkeypatch.setattr(truncation, "MOST_AT_ONCE", at_once)
    given, filters = logits(), columns(CASES)
    found = truncate_logits(given, *filters)
    expected = truncate_logits_reference(given.cpu(), *(column.cpu() for column in filters))
    assert torch.equal(found.cpu(), expected)
    assert torch.isfinite(found).sum(1).tolist()[:3] == [WIDTH, 1, 7]


@pytest.mark.parametrize("case", CASES[2:])
def test_truncation_equals_transformers(case: tuple[int, float, float]) -> None:
    top_k, top_p, min_p = case
    given = logits()[:1]
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), given)  # type: ignore[arg-type]  # an alias of Tensor
    assert torch.equal(truncate_logits(given, *columns([case])), expected)


def test_ties_stay_and_impossible_tokens_do_not() -> None:
    given = torch.full((1, 40), float("-inf"), device=DEVICE)
    given[0, [3, 5, 9]] = torch.tensor([1.0, 1.0, -2.0], device=DEVICE)
    found = truncate_logits(given, *columns([(1, 1.0, 0.0)]))
    assert torch.isfinite(found[0]).nonzero().flatten().tolist() == [3, 5]
