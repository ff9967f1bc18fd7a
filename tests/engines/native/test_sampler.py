"""Sampling against transformers' own logits processors on the same logits."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.engines.errors import GenerationFailed
from loraplex.engines.native.sampler import sample, uniform
from loraplex.engines.protocol import SamplingParams

VOCAB = 50
DRAWS = 4000


def params(**changes: float) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **changes})  # type: ignore[arg-type]


def expected(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The distribution transformers would draw from. Shape [V]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(warpers(torch.LongTensor([[0]]), torch.FloatTensor(logits[None].clone())), dim=-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        params(temperature=1.0),
        params(temperature=0.4),
        params(temperature=1.7, top_k=7),
        params(temperature=1.0, top_p=0.8),
        params(temperature=1.0, min_p=0.1),
        params(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_sample_draws_transformers_distribution(sampling: SamplingParams) -> None:
    """Chi-square over the kept tokens; the bound is the statistic's mean plus five standard deviations."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    probs = expected(logits, sampling)
    rng = random.Random(5)
    rows = logits[None].repeat(DRAWS, 1)
    drawn = sample(rows, [sampling] * DRAWS, [rng.random() for _ in range(DRAWS)], [()] * DRAWS)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    kept = probs > 0
    assert counts[~kept].sum() == 0
    wanted = probs[kept].double() * DRAWS
    statistic = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_sample_greedy_rows_take_the_largest_beside_drawing_rows() -> None:
    logits = torch.randn(3, VOCAB)
    greedy, drawing = params(temperature=0.0), params(temperature=2.0)
    drawn = sample(logits, [greedy, drawing, greedy], [0.5] * 3, [()] * 3)
    assert drawn[0] == int(logits[0].argmax())
    assert drawn[2] == int(logits[2].argmax())


def test_sample_not_finite_row_is_its_own_error() -> None:
    logits = torch.randn(2, VOCAB)
    logits[0, 3] = float("nan")
    failed, token = sample(logits, [params(temperature=1.0)] * 2, [0.5] * 2, [()] * 2)
    assert isinstance(failed, GenerationFailed)
    assert isinstance(token, int)


def test_sample_banned_token_is_never_taken() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 100.0
    assert sample(logits, [params(temperature=0.0)], [0.0], [(9,)]) != [9]


def test_uniform_depends_on_seed_and_position_only() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, at) for seed in range(10) for at in range(10)}) == 100
