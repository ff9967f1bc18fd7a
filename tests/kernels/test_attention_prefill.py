"""Attention of chunks against its formula: heads in groups, windows, caps, sinks, odd widths and lengths."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from support.paged_cache import BLOCK, FORMS, HEADS, TOLERANCES, Cache

from loraplex.kernels.attention.prefill import QueryTiles, attend_paged_prefill, attend_paged_prefill_reference


@pytest.mark.parametrize(
    ("form", "dtype", "key_heads", "widths"),
    [
        *((name, torch.float32, 2, (24, 24)) for name in FORMS),
        ("all", torch.float32, 1, (33, 20)),
        ("all", torch.bfloat16, 2, (32, 32)),
        ("plain", torch.float32, 1, (260, 260)),
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
