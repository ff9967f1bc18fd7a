"""Both paged attention kernels against their formula: grouped heads, windows, caps, sinks, odd widths and lengths."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE

from loraplex.kernels.attention.decode import attend_paged_decode, attend_paged_decode_reference
from loraplex.kernels.attention.paged import Form
from loraplex.kernels.attention.prefill import QueryTiles, attend_paged_prefill, attend_paged_prefill_reference

BLOCK = 16
HEADS, SINKS = 6, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0], device=DEVICE)
FORMS = {
    "plain": Form(0.2),
    "window": Form(0.2, window=20),
    "softcap": Form(0.5, softcap=3.0),
    "sinks": Form(0.2, sinks=SINKS),
    "all": Form(0.3, window=33, softcap=5.0, sinks=SINKS),
}
# As in test_expand, but softmax weights are rounded to 16 bits before they meet the values.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}


class Cache:
    """Sequences of these lengths in a paged cache whose other rows are NaN."""

    def __init__(self, lengths: list[int], key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        num_blocks = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(num_blocks) + 2, generator=generator).tolist()
        self.block_tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
        self.keys, self.values = (
            torch.full((len(order) * BLOCK, key_heads, size), float("nan")) for size in (width, value_width)
        )
        for row, (length, count) in enumerate(zip(lengths, num_blocks, strict=True)):
            blocks = [order.pop() for _ in range(count)]
            self.block_tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
            rows = [block * BLOCK + place for block in blocks for place in range(BLOCK)][:length]
            for cache in (self.keys, self.values):
                cache[rows] = torch.randn(length, *cache.shape[1:], generator=generator)
        self.keys, self.values = self.keys.to(dtype).to(DEVICE), self.values.to(dtype).to(DEVICE)
        self.block_tables = self.block_tables.to(DEVICE)
        self.generator = generator

    def queries(self, count: int, width: int) -> torch.Tensor:
        return torch.randn(count, HEADS, width, generator=self.generator).to(self.keys.dtype).to(DEVICE)


@pytest.mark.parametrize(
    ("form", "dtype", "key_heads", "widths"),
    [
        *((name, torch.float32, 2, (24, 24)) for name in FORMS),
        ("plain", torch.float32, 6, (16, 40)),
        ("all", torch.float32, 1, (33, 20)),
        ("all", torch.bfloat16, 2, (32, 32)),
    ],
)
def test_decode_equals_the_formula(form: str, dtype: torch.dtype, key_heads: int, widths: tuple[int, int]) -> None:
    lengths = [1, 70, 16, 33]
    cache = Cache(lengths, key_heads, *widths, dtype)
    q = cache.queries(len(lengths), widths[0])
    args = q, cache.keys, cache.values, cache.block_tables, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    expected = attend_paged_decode_reference(*args, BLOCK, FORMS[form])
    for splits in (1, 3):
        found = attend_paged_decode(*args, BLOCK, FORMS[form], splits)
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", ["plain", "sinks"])
def test_decode_row_that_pads_gives_zeros(form: str) -> None:
    cache = Cache([20, 1], 2, 24, 24, torch.float32)
    lengths = torch.tensor([20, 0], dtype=torch.int32, device=DEVICE)
    q = cache.queries(2, 24)
    found = attend_paged_decode(q, cache.keys, cache.values, cache.block_tables, lengths, BLOCK, FORMS[form], 2)
    assert torch.isfinite(found[0]).all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize(
    ("form", "dtype", "key_heads", "widths"),
    [
        *((name, torch.float32, 2, (24, 24)) for name in FORMS),
        ("all", torch.float32, 1, (33, 20)),
        ("all", torch.bfloat16, 2, (32, 32)),
    ],
)
def test_prefill_equals_the_formula(form: str, dtype: torch.dtype, key_heads: int, widths: tuple[int, int]) -> None:
    """Chunks from the beginning and from the middle, longer and shorter than a tile, one of a single token."""
    lengths, sizes = [80, 50, 90, 7], [80, 13, 1, 7]
    cache = Cache(lengths, key_heads, *widths, dtype)
    rows = [sum(sizes[:place]) for place in range(len(sizes))]
    chunks = [
        (number, row, size, length - size)
        for number, (row, size, length) in enumerate(zip(rows, sizes, lengths, strict=True))
    ]
    tiles = QueryTiles.of(chunks, DEVICE)
    q = cache.queries(sum(sizes) + 2, widths[0])
    found, expected = (
        torch.full((sum(sizes) + 2, HEADS, widths[1]), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)
    )
    args = q, cache.keys, cache.values, cache.block_tables, tiles, BLOCK, FORMS[form]
    attend_paged_prefill(found, *args)
    attend_paged_prefill_reference(expected, *args)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(found[:-2], expected[:-2], rtol=rtol, atol=atol)
    assert torch.isnan(found[-2:]).all()
