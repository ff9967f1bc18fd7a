"""Sampling against transformers' own logits processors on the same logits."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from loraplex.engines.errors import GenerationFailed
from loraplex.engines.native.batch import Sampled
from loraplex.engines.native.cpu_sampler import pick_by_kernel
from loraplex.engines.native.sampler import Pick, Row, pick_by_sorting, sample, uniform
from loraplex.engines.protocol import SamplingParams
from loraplex.kernels.fused.cpu_draw import is_available

VOCAB = 50
DRAWS = 4000
SEEN = (3, 7, 7, 11, 40)


PICKS = [
    pytest.param(pick_by_sorting, id="by sorting"),
    pytest.param(
        pick_by_kernel, id="by the kernel",
        marks=pytest.mark.skipif(
            not is_available(torch.float32, torch.device("cpu")), reason="the kernel was not built: no compiler"
        ),
    ),
]  # fmt: skip
both_ways = pytest.mark.parametrize("pick", PICKS)


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **changes})


def tokens(pick: Pick, logits: torch.Tensor, *rows: Row) -> list[int]:
    sampled = sample(logits, rows, pick)
    return [outcome.token_id for outcome in sampled if isinstance(outcome, Sampled)]


def expected(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The distribution transformers would draw from after SEEN. Shape [V]."""
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    scores: Any = logits[None].clone()
    seen: Any = torch.tensor([SEEN])
    return torch.softmax(warpers(seen, scores), dim=-1)[0]


@both_ways
@pytest.mark.parametrize(
    "sampling",
    [
        params(temperature=1.0),
        params(temperature=0.4),
        params(temperature=1.7, top_k=7),
        params(temperature=1.0, top_p=0.8),
        params(temperature=1.0, min_p=0.1),
        params(temperature=1.0, typical_p=0.6),
        params(temperature=0.8, repetition_penalty=1.5),
        params(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, typical_p=0.9, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_sample_draws_transformers_distribution(sampling: SamplingParams, pick: Pick) -> None:
    """Chi-square over the kept tokens; the bound is the statistic's mean plus five standard deviations."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    probs = expected(logits, sampling)
    rng = random.Random(5)
    rows = [Row(sampling, draw=rng.random(), token_ids=SEEN) for _ in range(DRAWS)]
    counts = torch.bincount(torch.tensor(tokens(pick, logits[None].repeat(DRAWS, 1), *rows)), minlength=VOCAB).double()
    kept = probs > 0
    assert counts.sum() == DRAWS
    assert counts[~kept].sum() == 0
    wanted = probs[kept].double() * DRAWS
    statistic = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@both_ways
def test_sample_presence_frequency_and_bias_are_openais_formula(pick: Pick) -> None:
    """logit - count * frequency - (count > 0) * presence + bias; shown by what greedy then takes."""
    counts = Counter({4: 3, 5: 1})
    base = torch.zeros(1, VOCAB)
    base[0, 4], base[0, 5], base[0, 6] = 10.0, 9.0, 8.0

    def greedy(**controls: Any) -> list[int]:
        return tokens(pick, base.clone(), Row(params(temperature=0.0, **controls), output_counts=counts))

    assert greedy() == [4]
    assert greedy(frequency_penalty=0.4) == [4]  # 8.8 against 8.6 and 8
    assert greedy(frequency_penalty=0.6) == [5]  # 8.2 against 8.4 and 8
    assert greedy(presence_penalty=1.9) == [4]  # 8.1 against 7.1 and 8
    assert greedy(presence_penalty=2.0, frequency_penalty=0.1) == [6]  # 7.7, 6.9, 8
    assert greedy(logit_bias={5: 1.5, 4: -100.0}) == [5]


@both_ways
@pytest.mark.parametrize(
    "controls",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 0.1}},
        {"repetition_penalty": 1.001},
    ],
    ids="".join,
)
def test_sample_small_controls_count_in_bfloat16(pick: Pick, controls: dict[str, Any]) -> None:
    """At 40 its steps are 0.25. The rows beside it, and log-probabilities, are as they were."""
    logits = torch.tensor([[40.0, 40.0, 0.0], [40.0, 40.0, 0.0]], dtype=torch.bfloat16)
    row = Row(params(temperature=0.0, num_logprobs=0, **controls), token_ids=[0], output_counts={0: 1})
    found, beside = sample(logits, [row, Row(params(temperature=0.0))], pick)
    assert isinstance(found, Sampled)
    assert isinstance(beside, Sampled)
    assert (found.token_id, beside.token_id) == (1, 0)
    assert found.logprobs is not None
    assert found.logprobs.logprob == pytest.approx(-math.log(2), abs=1e-6)


@both_ways
def test_sample_logprobs_are_of_the_models_own_distribution(pick: Pick) -> None:
    logits = torch.randn(2, VOCAB)
    wanted = torch.log_softmax(logits, dim=-1)
    biased = Row(params(temperature=0.0, logit_bias={9: 100.0}, num_logprobs=3))
    first, second = sample(logits.clone(), [biased, Row(params(temperature=0.0))], pick)
    assert isinstance(first, Sampled)
    assert isinstance(second, Sampled)
    assert first.token_id == 9
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(float(wanted[0, 9]), abs=1e-6)
    values, order = wanted[0].topk(3)
    assert [token for token, _ in first.logprobs.top] == order.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert second.logprobs is None


@both_ways
def test_sample_greedy_rows_take_the_largest_beside_drawing_rows(pick: Pick) -> None:
    logits = torch.randn(3, VOCAB)
    greedy, drawing = Row(params(temperature=0.0)), Row(params(temperature=2.0), draw=0.5)
    drawn = tokens(pick, logits.clone(), greedy, drawing, greedy)
    assert (drawn[0], drawn[2]) == (int(logits[0].argmax()), int(logits[2].argmax()))


@both_ways
def test_sample_not_finite_row_is_its_own_error(pick: Pick) -> None:
    logits = torch.randn(2, VOCAB)
    logits[0, 3] = float("nan")
    failed, fine = sample(logits, [Row(params(temperature=1.0), draw=0.5)] * 2, pick)
    assert isinstance(failed, GenerationFailed)
    assert isinstance(fine, Sampled)


@both_ways
def test_sample_banned_token_is_never_taken(pick: Pick) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 100.0
    assert tokens(pick, logits, Row(params(temperature=0.0), banned={9})) != [9]


def test_uniform_depends_on_seed_and_position_only() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, at) for seed in range(10) for at in range(10)}) == 100
