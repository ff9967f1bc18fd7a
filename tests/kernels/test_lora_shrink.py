"""`shrink` against its formula: every mix, rank, type, width, block and number of splits."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE, MIXES, owners, random_table

from loraplex.kernels.lora.shrink import MOST_SPLITS, num_splits, shrink, shrink_into, shrink_reference
from loraplex.kernels.lora.table import Tiles

RANKS = [(1, 8), (256, 0), (0, 16), (5, 130), (64, 64), (16, 4)]  # of each slot, in two modules
WIDTHS = [(200, 40), (200, 56)]
MODULES = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
# float32: sums in another order. bfloat16: the inputs are exact in float32, where they are added up.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("mix", "dtype"), [*((mix, torch.float32) for mix in MIXES), ("zipf", torch.bfloat16), ("zipf", torch.float16)]
)
def test_shrink_equals_the_formula(mix: str, dtype: torch.dtype) -> None:
    table = random_table(RANKS, WIDTHS, dtype)
    x = torch.randn(23, 200, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    tiles = Tiles.of(owners(mix, len(RANKS), 23), None, 16, DEVICE)
    h = shrink(x, table, MODULES, tiles, 256, splits=1)
    expected = shrink_reference(x.cpu(), table.to("cpu"), MODULES, tiles.to("cpu"), 256, 1)
    torch.testing.assert_close(h.cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("splits", "block", "width"), [(2, 16, 200), (3, 32, 641), (5, 16, 129)])
def test_splits_add_up_to_the_whole(splits: int, block: int, width: int) -> None:
    """Also where the width is no multiple of anything, and some splits have nothing to add."""
    table = random_table(RANKS, [(width, 40), (width, 56)], torch.float32)
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    tiles = Tiles.of(owners("zipf", len(RANKS), 40), None, block, DEVICE)
    h = shrink(x, table, MODULES, tiles, 256, splits)
    expected = shrink_reference(x.cpu(), table.to("cpu"), MODULES, tiles.to("cpu"), 256, splits)
    torch.testing.assert_close(h.sum(1).cpu(), expected.sum(1), rtol=TOLERANCE, atol=TOLERANCE)


def test_every_number_of_the_tiles_is_written_and_none_beside() -> None:
    table = random_table(RANKS, WIDTHS, torch.float32)
    tiles = Tiles.of([0, -1, 2], None, 16, DEVICE, room=(5, 8))
    h = torch.full((2, 2, 8, 256), float("nan"), device=DEVICE)
    shrink_into(h, torch.randn(3, 200, device=DEVICE), table, MODULES, tiles)
    assert torch.isfinite(h[:, :, :2]).all()
    assert torch.isnan(h[:, :, 2:]).all()


def test_what_lies_beside_an_adapter_is_not_used() -> None:
    """A NaN beyond one adapter's matrices, or in another adapter, stays out of its sums."""
    table = random_table([(3, 7), (9, 5)], WIDTHS, torch.float32)
    first = int(table.a[1, 0])
    table.buffer[first : first + 9 * 200] = float("nan")
    tiles = Tiles.of([0, 1], None, 16, DEVICE)
    h = shrink(torch.randn(2, 200, device=DEVICE), table, MODULES, tiles, 16, 1)
    assert torch.isfinite(h[:, :, 0]).all()
    assert torch.isnan(h[1, 0, 1, :9]).all()


@pytest.mark.parametrize("block", MOST_SPLITS)
def test_wide_launches_are_not_split(block: int) -> None:
    one, many = (Tiles.of(range(count), None, block, DEVICE) for count in (1, 512))
    assert 1 < num_splits(4096, one, 1, 64) <= MOST_SPLITS[block]
    assert num_splits(4096, many, 3, 64) == 1
    assert num_splits(64, one, 1, 16) == 1
