"""Where adapters lie on the device, and which tokens of a step are whose: what the Triton kernels read.

Both have a form that does not depend on who is in the batch, so a CUDA graph that was captured over them stays valid
for any adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOBODY = -1  # the slot of a tile that pads
ALIGNMENT_BYTES = 64  # each matrix starts on a cache line, and where a thread reads 16 bytes at once


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """What the adapter in slot s does to module m, over one flat `buffer` that holds all adapters.

    buffer: Shape [capacity], the adapters' type.
    a, b, gain: Shape [S, M], int64. Where A, Shape [rank, in], Bᵀ, Shape [rank, out], and DoRA's gain, Shape [out],
        begin in the buffer, in elements, at multiples of ALIGNMENT_BYTES; gain is −1 without DoRA.
    rank: Shape [S, M], int32. 0 where the adapter leaves the module alone.
    scale: Shape [S, M], float32.
    """

    buffer: Tensor
    a: Tensor
    b: Tensor
    gain: Tensor
    rank: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, buffer: Tensor, num_slots: int, num_modules: int) -> AdapterTable:
        """A table of slots that touch nothing."""
        shape, device = (num_slots, num_modules), buffer.device
        return cls(
            buffer,
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def to(self, device: str) -> AdapterTable:
        """A copy elsewhere."""
        return AdapterTable(*(getattr(self, name).to(device) for name in self.__slots__))

    @property
    def num_modules(self) -> int:
        return self.rank.shape[1]

    @property
    def alignment(self) -> int:
        """Where matrices begin is a multiple of so many elements."""
        return ALIGNMENT_BYTES // self.buffer.element_size()


class Tiles:
    """The tokens of adapters, an adapter's together, cut into tiles of at most `block` of them.

    Tile n has the pairs begin[n] … begin[n] + size[n] − 1 and belongs to slot[n]; pair p is token[p] of the step, with
    weight[p] as a factor of the adapter's scale. No token is in two pairs. A slot of −1 makes its tile empty.

    slot, begin, size: Shape [N], int32.   token: Shape [P], int32.   weight: Shape [P], float32. All lie in one tensor,
    which goes to a device as one copy.
    """

    def __init__(self, packed: Tensor, num_tiles: int, block: int) -> None:
        """`packed`: Shape [3 · N + 2 · P], int32: slot, begin, size, token, and the bits of weight."""
        self._packed = packed
        self.num_tiles, self.block = num_tiles, block
        self.slot, self.begin, self.size = packed[: 3 * num_tiles].view(3, num_tiles).unbind()
        self.token, weight = packed[3 * num_tiles :].view(2, -1).unbind()
        self.weight = weight.view(torch.float32)

    @classmethod
    def of(
        cls, owners: Sequence[int], weights: Sequence[float] | None, block: int, device: torch.device,
        room: tuple[int, int] = (0, 0),
    ) -> Tiles:  # fmt: skip
        """`owners[t]` is the slot of token t, −1 for none. Padded to `room`: so many tiles and pairs at least."""
        groups: dict[int, list[int]] = {}
        for token, owner in enumerate(owners):
            if owner != NOBODY:
                groups.setdefault(owner, []).append(token)
        tiles: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        for slot, group in groups.items():
            for first in range(0, len(group), block):
                size = min(block, len(group) - first)
                tiles.append((slot, len(tokens) + first, size))
            tokens += group
        factors = [1.0 if weights is None else weights[token] for token in tokens]
        tiles += [(NOBODY, 0, 0)] * (max(room[0], 1) - len(tiles))
        padding = [0] * max(room[1] - len(tokens), 0)
        columns = np.array(tiles, dtype=np.int32).T.reshape(-1)
        bits = np.array([*factors, *padding], dtype=np.float32).view(np.int32)
        packed = np.concatenate((columns, np.array([*tokens, *padding], dtype=np.int32), bits))
        return cls(torch.from_numpy(packed).to(device), len(tiles), block)

    def become(self, other: Tiles) -> None:
        """Hold what others of the same shapes hold, on any device, in the same place."""
        self._packed.copy_(other._packed)

    def to(self, device: str | torch.device) -> Tiles:
        """A copy elsewhere."""
        return Tiles(self._packed.to(device), self.num_tiles, self.block)

    @property
    def num_warps(self) -> int:
        """Of 32 threads, that compute a tile."""
        return 8 if self.block == 64 else 4

    @property
    def num_pairs(self) -> int:
        return self.token.shape[0]
