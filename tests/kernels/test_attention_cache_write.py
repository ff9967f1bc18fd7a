"""Writing to the paged cache: every row of the step's, as it is, and none beside."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE

from loraplex.kernels.attention.cache_write import write_paged, write_paged_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 64, 64), (5, 3, 80, 80), (7, 1, 24, 16), (0, 2, 8, 8)])
def test_rows_are_written_and_none_beside(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, width, value_width = shape
    caches = [torch.full((20, heads, size), float("nan"), dtype=dtype, device=DEVICE) for size in (width, value_width)]
    expected = [cache.clone() for cache in caches]
    key = torch.randn(tokens, heads, width, device=DEVICE).to(dtype).transpose(0, 1)
    value = torch.randn(heads, tokens, value_width, device=DEVICE).to(dtype)
    slots = torch.randperm(20, device=DEVICE)[:tokens]
    write_paged_reference(expected[0], expected[1], key, value, slots)
    write_paged(caches[0], caches[1], key, value, slots)
    for cache, theirs in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, theirs, rtol=0, atol=0, equal_nan=True)


def test_tokens_that_pad_may_share_a_row() -> None:
    cache, x = torch.zeros(2, 6, 1, 4, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    write_paged(cache[0], cache[1], x, x, torch.tensor([2, 5, 5], device=DEVICE))
    assert cache.sum((0, 2, 3)).tolist() == [0, 0, 8, 0, 0, 8]
