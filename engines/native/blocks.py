"""Which KV blocks are free, which are shared, and which still hold something worth finding again.

A block is `block_size` consecutive token positions. A full block is published under a key that stands for everything
its numbers depend on: the adapter's content, the tenant's salt, and every token up to its end (a chained hash). A
sequence that begins with the same keys shares the blocks instead of computing them. Blocks that nobody holds keep
their content until they are needed for something else, least recently released first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def root_key(adapter_id: str | None, *scope: str) -> bytes:
    """The key of nothing yet, for one adapter and one scope (a tenant, a salt): no hit ever crosses either."""
    return hashlib.blake2b(repr((adapter_id, scope)).encode(), digest_size=16).digest()


def switched_key(key: bytes, adapters: str) -> bytes:
    """The key in the place of `key` where from some position in the next block on other adapters are active."""
    return hashlib.blake2b(key + adapters.encode(), digest_size=16).digest()


def next_key(key: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block of `token_ids` behind the block (or root) of `key`."""
    return hashlib.blake2b(key + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1, and counts who holds them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that could be found again."""
        return sum(block in self._free for block in self._key_of)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `keys`, now held once more each."""
        found: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
            self._holders[block] += 1
            self._free.pop(block, None)
        return found

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend `block_table` to hold `num_tokens` positions; False, and nothing taken, where blocks are short."""
        missing = -(-num_tokens // self.block_size) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            block_table.append(block)
        return True

    def publish(self, block: int, key: bytes) -> None:
        """A held block is full and computed: it may be shared from now on. Of equal blocks the first is found."""
        if key not in self._block_of:
            self._forget(block)
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block_table: list[int]) -> None:
        """Give up every block of a table and empty it; ends are reused before beginnings."""
        for block in reversed(block_table):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
        block_table.clear()

    def _forget(self, block: int) -> None:
        if (key := self._key_of.pop(block, None)) is not None:
            del self._block_of[key]
