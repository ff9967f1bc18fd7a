"""`expand` against its formula: every mix, rank, type, gain and bias; and both halves against PEFT's own arithmetic."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE, MIXES, owners, random_table

from loraplex.kernels.lora.expand import expand, expand_reference
from loraplex.kernels.lora.shrink import shrink
from loraplex.kernels.lora.table import Tiles

RANKS = [(1, 8), (256, 0), (0, 16), (5, 130), (64, 64), (16, 4)]
WIDTHS = [(40, 200), (40, 131)]
# One rounding of y at the end: half a unit in the last place of 24, 8 and 11 bits; float32 adds in another order.
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2**-8, 1e-3), torch.float16: (2**-11, 1e-3)}


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize(
    ("mix", "dtype"), [*((mix, torch.float32) for mix in MIXES), ("zipf", torch.bfloat16), ("zipf", torch.float16)]
)
@pytest.mark.parametrize("module", [0, 1])
def test_expand_equals_the_formula(mix: str, dtype: torch.dtype, module: int) -> None:
    table = random_table(RANKS, WIDTHS, dtype, dora=[3, 5])
    owner = owners(mix, len(RANKS), 23)
    tiles = Tiles.of(owner, [1.0 + token / 8 for token in range(23)], 16, DEVICE, room=(9, 30))
    y, h, bias = (
        filled((23, WIDTHS[module][1]), dtype, 3),
        filled((2, 30, 256), torch.float32, 4),
        filled((WIDTHS[module][1],), dtype, 5),
    )
    expected = y.cpu()
    expand_reference(expected, h.cpu(), table.to("cpu"), module, tiles.to("cpu"), bias.cpu())
    expand(y, h, table, module, tiles, bias)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(y.cpu(), expected, rtol=rtol, atol=atol)


def test_tokens_of_no_adapter_are_not_touched() -> None:
    table = random_table(RANKS, WIDTHS, torch.float32)
    y = torch.full((4, 200), float("nan"), device=DEVICE)
    y[1] = 0.0
    expand(y, filled((1, 2, 256), torch.float32, 4), table, 0, Tiles.of([-1, 3, -1, 2], None, 16, DEVICE))
    assert torch.isfinite(y[1]).all()
    assert torch.isnan(y[[0, 2, 3]]).all()  # slot 2 leaves module 0 alone


@pytest.mark.parametrize("block", [16, 64])
def test_both_halves_equal_two_matrix_products(block: int) -> None:
    """More tokens of one adapter than a tile holds, beside tiles of others."""
    widths = [(96, 72)]
    table = random_table([(24,), (3,)], widths, torch.float32)
    owner = [0] * 70 + [1] * 5 + [-1] * 3
    tiles = Tiles.of(owner, None, block, DEVICE)
    x, y = filled((78, 96), torch.float32, 1), torch.zeros(78, 72, device=DEVICE)
    modules = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    expand(y, shrink(x, table, modules, tiles, 32, 2)[0], table, 0, tiles)
    expected = torch.zeros_like(y)
    for slot, rank, own in ((0, 24, slice(0, 70)), (1, 3, slice(70, 75))):
        a, b = int(table.a[slot, 0]), int(table.b[slot, 0])
        matrices = table.buffer[a : a + rank * 96].view(rank, 96), table.buffer[b : b + rank * 72].view(rank, 72)
        expected[own] = float(table.scale[slot, 0]) * x[own] @ matrices[0].T @ matrices[1]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
