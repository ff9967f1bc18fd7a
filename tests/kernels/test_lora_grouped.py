"""Both torch forms of the grouped LoRA against the formula, token by token."""

from __future__ import annotations

import pytest
import torch
from support.mixes import MIXES, owners

from loraplex.kernels.lora.grouped import add_grouped_reference, add_masked, add_run, owner_mask

WIDTH_IN, WIDTH_OUT, TOKENS = 33, 47, 24
RANKS = (1, 8, 0, 64, 5)  # 0: an adapter that does not touch this layer
SCALES = (2.0, 0.5, 1.0, 0.25, 1.5)


def runs_of(owner: list[int]) -> list[tuple[int, int, int]]:
    return [(token, token + 1, group) for token, group in enumerate(owner) if group >= 0]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", ["masked", "run"])
def test_form_equals_the_formula(mix: str, form: str) -> None:
    """float32: the forms differ from the formula only in the order of their sums."""
    generator = torch.Generator().manual_seed(7)
    rows = sum(RANKS)
    x, y, a, b = (
        torch.randn(*shape, generator=generator)
        for shape in [(TOKENS, WIDTH_IN), (TOKENS, WIDTH_OUT), (rows, WIDTH_IN), (rows, WIDTH_OUT)]
    )
    owner = owners(mix, len(RANKS), TOKENS)
    first = [sum(RANKS[:group]) for group in range(len(RANKS) + 1)]
    expected = y.clone()
    add_grouped_reference(expected, x, a, b, torch.tensor(owner), first, SCALES)
    if form == "masked":
        repeats = torch.tensor(RANKS)
        row_owner = torch.arange(len(RANKS)).repeat_interleave(repeats)
        add_masked(y, x, a, b, owner_mask(torch.tensor(owner), row_owner, torch.tensor(SCALES)[row_owner]))
    else:
        for begin, end, group in runs_of(owner):
            own = slice(first[group], first[group + 1])
            add_run(y[begin:end], x[begin:end], a[own], b[own], SCALES[group])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
