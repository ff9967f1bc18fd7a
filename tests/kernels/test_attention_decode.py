"""Split attention of one token a sequence against its formula: heads in groups, windows, caps, sinks, odd widths."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from support.paged_cache import BLOCK, FORMS, TOLERANCES, Cache

from loraplex.kernels.attention.decode import attend_paged_decode, attend_paged_decode_reference


@pytest.mark.parametrize(
    ("form", "dtype", "key_heads", "widths"),
    [
        *((name, torch.float32, 2, (24, 24)) for name in FORMS),
        ("plain", torch.float32, 6, (16, 40)),
        ("all", torch.float32, 1, (33, 20)),
        ("all", torch.bfloat16, 2, (32, 32)),
        ("plain", torch.float32, 1, (260, 260)),
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
def test_decode_in_more_splits_than_are_combined_at_once(form: str) -> None:
    """One sequence has keys in all of them, the other in the first alone."""
    lengths = [18 * 32 - 3, 5]
    cache = Cache(lengths, 1, 24, 24, torch.float32)
    q = cache.queries(2, 24)
    args = q, cache.keys, cache.values, cache.block_tables, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = attend_paged_decode(*args, BLOCK, FORMS[form], 18)
    expected = attend_paged_decode_reference(*args, BLOCK, FORMS[form])
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", ["plain", "sinks"])
def test_decode_row_that_pads_gives_zeros(form: str) -> None:
    cache = Cache([20, 1], 2, 24, 24, torch.float32)
    lengths = torch.tensor([20, 0], dtype=torch.int32, device=DEVICE)
    q = cache.queries(2, 24)
    found = attend_paged_decode(q, cache.keys, cache.values, cache.block_tables, lengths, BLOCK, FORMS[form], 2)
    assert torch.isfinite(found[0]).all()
    assert (found[1] == 0).all()
