"""Which KV blocks are free. A block is `block_size` consecutive token positions of one sequence."""

from __future__ import annotations


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1; each is held by at most one sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend `block_table` to hold `num_tokens` positions; False, and nothing taken, where blocks are short."""
        missing = -(-num_tokens // self.block_size) - len(block_table)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Take back every block of a table and empty it."""
        self._free.extend(reversed(block_table))
        block_table.clear()
