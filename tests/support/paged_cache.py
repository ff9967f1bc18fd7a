"""Sequences in a paged cache, and the forms of attention that layers ask for, as the kernels' tests use them."""

from __future__ import annotations

import torch
from support.mixes import DEVICE

from loraplex.kernels.attention.paged import Form

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
