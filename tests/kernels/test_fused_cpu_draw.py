"""Tokens drawn in C, against the formula in float64 by sorting."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loraplex.kernels.fused.cpu_draw import Draw, draw_reference, draw_tokens, is_available

CPU = torch.device("cpu")
WIDTHS = (1, 2, 40, 1023, 1024, 1025, 5000)  # around the blocks that are added up together
ALMOST_ONE = 1 - 2**-53

pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")
of_each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def some_draws(chance: random.Random, count: int) -> list[Draw]:
    return [
        Draw(
            draw=chance.random(),
            temperature=chance.choice([0.0, 0.5, 1.0, 1.7]),
            top_p=chance.choice([1.0, 0.9, 0.5, 0.05]),
            min_p=chance.choice([0.0, 0.02, 0.3]),
            top_k=chance.choice([0, 1, 5, 50, 10000]),
        )
        for _ in range(count)
    ]


def admitted(logits: torch.Tensor, draw: Draw) -> set[int]:
    """What the formula gives, and what it gives a rounding of float32 beside the draw and beside top_p."""
    beside = [
        draw._replace(draw=min(max(draw.draw + moved, 0.0), ALMOST_ONE), top_p=min(draw.top_p + more, 1.0))
        for moved in (-1e-5, 0.0, 1e-5) for more in (-1e-6, 0.0, 1e-6)
    ]  # fmt: skip
    return {draw_reference(logits, one) for one in beside}


@of_each_type
@pytest.mark.parametrize("width", WIDTHS)
def test_draws_are_the_formulas(width: int, dtype: torch.dtype, threads: int) -> None:
    for seed in range(12):
        chance = random.Random(seed)
        logits = torch.randn(7, width, generator=torch.Generator().manual_seed(seed)) * chance.choice([0.5, 2, 6])
        logits, draws = logits.to(dtype), some_draws(chance, 7)
        largest, tokens = draw_tokens(logits, draws)
        assert largest == logits.float().amax(-1).tolist()
        for row, token, draw in zip(logits, tokens, draws, strict=True):
            assert token in admitted(row, draw), draw


@pytest.mark.parametrize("controls", [{}, {"top_k": 30}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 90, "top_p": 0.8}])
def test_a_draw_in_the_middle_of_each_share_meets_its_token(controls: dict[str, float]) -> None:
    """And the least and the largest meet the first and the last that are kept."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(3)) / 2
    alone = Draw(temperature=1.0, **controls)  # type: ignore[arg-type]
    weights = (logits.double() - logits.max()).exp()
    even = (alone._replace(draw=number / 5000) for number in range(5000))
    kept = sorted({draw_reference(logits, draw) for draw in even}) if controls else [*range(700)]
    shares = weights[kept].cumsum(0) / weights[kept].sum()
    middles = (shares - weights[kept] / weights[kept].sum() / 2).tolist()
    draws = [alone._replace(draw=draw) for draw in (0.0, *middles, ALMOST_ONE)]
    _, tokens = draw_tokens(logits.repeat(len(draws), 1), draws)
    assert tokens == [kept[0], *kept, kept[-1]]


@of_each_type
def test_likeliest_is_the_lowest_of_those_that_tie(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for first in {0, width // 2, max(width - 2, 0), width - 1, min(1023, width - 1), min(1024, width - 1)}:
            logits = torch.zeros(1, width)
            logits[0, [first, width - 1]] = 3.0
            assert draw_tokens(logits.to(dtype), [Draw()]) == ([3.0], [first])


def test_what_is_not_finite_is_told_and_harms_no_other_row(threads: int) -> None:
    logits = torch.randn(5, 40000)
    logits[0, 39999] = float("nan")
    logits[1, 7] = float("inf")
    logits[2] = float("-inf")
    draws = [Draw(draw=0.5, temperature=1.0, top_k=5, top_p=0.9)] * 5
    largest, tokens = draw_tokens(logits, draws)
    assert math.isnan(largest[0])
    assert largest[1:3] == [float("inf"), float("-inf")]
    assert (largest[3:], tokens[3:]) == draw_tokens(logits[3:], draws[3:])
    assert all(token in admitted(row, draws[0]) for row, token in zip(logits[3:], tokens[3:], strict=True))


def test_row_draws_the_same_in_any_company(threads: int) -> None:
    logits, draws = torch.randn(9, 20000), some_draws(random.Random(2), 9)
    _, together = draw_tokens(logits, draws)
    assert together == [draw_tokens(logits[[row]], [draw])[1][0] for row, draw in enumerate(draws)]


def test_tokens_that_tie_with_the_last_one_kept_stay() -> None:
    logits = torch.full((4, 2000), float("-inf"))
    logits[:, [3, 1500, 1999]] = torch.tensor([1.0, 1.0, -2.0])
    for filtered in (
        Draw(temperature=1.0, top_k=1),
        Draw(temperature=1.0, top_p=0.3),
        Draw(temperature=1.0, min_p=0.5),
    ):
        draws = [filtered._replace(draw=draw) for draw in (0.0, 0.49, 0.51, ALMOST_ONE)]
        assert draw_tokens(logits, draws)[1] == [3, 3, 1500, 1500]


def test_draw_never_meets_what_weighs_nothing() -> None:
    logits = torch.full((2, 3000), float("-inf"))
    logits[:, [5, 2100]] = torch.tensor([-90.0, 0.0])  # the first is less than e^-87 times as likely
    draws = [Draw(draw=draw, temperature=1.0) for draw in (0.0, ALMOST_ONE)]
    assert draw_tokens(logits, draws)[1] == [2100, 2100]


@pytest.mark.parametrize("top_p", [0.0, 1e-46, 1e-30])
def test_least_top_p_keeps_the_likeliest(top_p: float) -> None:
    """Also where it is nothing, or as float32."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1))
    draw = Draw(draw=0.5, temperature=1.0, top_p=top_p)
    assert draw_tokens(logits, [draw])[1] == [int(logits.argmax())] == [draw_reference(logits[0], draw)]


def test_temperature_whose_inverse_is_no_number_is_none() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert draw_tokens(logits, [Draw(draw=0.9, temperature=1e-45)])[1] == [1]


def test_rows_may_lie_apart() -> None:
    logits, draws = torch.randn(6, 50), some_draws(random.Random(4), 3)
    assert draw_tokens(logits[::2], draws) == draw_tokens(logits[::2].clone(), draws)


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))
