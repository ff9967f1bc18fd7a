"""The first half of LoRA, x · Aᵀ, for tokens of any adapters and several modules that share their input.

For each module g of the launch, split s of the input and pair p = (token t, slot n) of the tiles, with
A = A of slot n and module modules[g], of rank R(n, g):

    h[g, s, p, r] = Σ_{i in split s} x[t, i] · A[r, i]      r < R(n, g)
    h[g, s, p, r] = 0                                       R(n, g) ≤ r < max_rank

so that Σ_s h[g, s, p] is x[t] · Aᵀ. Splitting the input keeps a whole GPU busy where few tokens have adapters; the
splits are added in a fixed order by `expand`, so that results do not depend on chance. Every adapter's A is read once
a tile, and nothing beyond its rank.

    x: Shape [T, in].
    modules: Shape [G], int32. Modules of the table, all of the same `in`.
    h: Shape [G, splits, P, max_rank], float32. Rows of pairs that no tile has are left as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.lora.table import NOBODY, AdapterTable, Tiles
from loraplex.kernels.triton_support import padded, upcasts

# Numbers of a row that a program takes at a time, by the tokens of a tile and the bytes of a number: as many as its
# registers and its shared memory hold without spilling (`tests/kernels/test_device_code.py`).
_BLOCK_IN = {(16, 2): 256, (32, 2): 128, (64, 2): 128, (16, 4): 128, (32, 4): 64, (64, 4): 32}
# The most splits, by the tokens of a tile: `expand` holds all of them at once.
MOST_SPLITS = {16: 8, 32: 4, 64: 2}
# Programs beyond which splitting the input gives a GPU nothing more to do at once (H100: 132 processors).
ENOUGH_PROGRAMS = 1024


def num_splits(width: int, tiles: Tiles, num_modules: int, max_rank: int) -> int:
    """How many parts to cut an input of that width into."""
    programs = tiles.num_tiles * num_modules * triton.cdiv(max_rank, tiles.block)
    long_enough = triton.cdiv(width, 4 * _BLOCK_IN[tiles.block, 2])
    return int(max(1, min(long_enough, ENOUGH_PROGRAMS // max(programs, 1), MOST_SPLITS[tiles.block])))


def shrink(x: Tensor, table: AdapterTable, modules: Tensor, tiles: Tiles, max_rank: int, splits: int) -> Tensor:
    """h, as above. `max_rank` is at least the rank of every adapter in the tiles."""
    num_modules = modules.shape[0]
    h = torch.empty((num_modules, splits, tiles.num_pairs, max_rank), dtype=torch.float32, device=x.device)
    shrink_into(h, x, table, modules, tiles)
    return h


def shrink_into(h: Tensor, x: Tensor, table: AdapterTable, modules: Tensor, tiles: Tiles) -> None:
    num_modules, splits, num_pairs, max_rank = h.shape
    width, itemsize = x.shape[1], max(x.element_size(), table.buffer.element_size())
    block_in = _BLOCK_IN[tiles.block, itemsize]
    block_rank = min(padded(max_rank), tiles.block)  # each program reads the tile's tokens anew
    part = triton.cdiv(triton.cdiv(width, splits), block_in) * block_in
    _shrink[(tiles.num_tiles, triton.cdiv(max_rank, block_rank) * splits, num_modules)](
        h, x, table.buffer, table.a, table.rank, modules, tiles.slot, tiles.begin, tiles.size, tiles.token,
        table.num_modules, num_pairs, max_rank, width, x.stride(0), splits, part,
        BLOCK_TOKENS=tiles.block, BLOCK_RANK=block_rank, BLOCK_IN=block_in, ALIGNMENT=table.alignment,
        UPCAST=upcasts(x, table.buffer), num_warps=tiles.num_warps,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=("num_modules", "num_pairs", "splits"),
    do_not_specialize_on_alignment=("tile_slot", "tile_begin", "tile_size", "pair_token"),
)
def _shrink(  # type: ignore[no-untyped-def]
    h, x, buffer, table_a, table_rank, modules, tile_slot, tile_begin, tile_size, pair_token,
    num_modules, num_pairs, max_rank, width, x_stride, splits, part,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_IN: tl.constexpr, ALIGNMENT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1) % splits
    first_rank = (tl.program_id(1) // splits) * BLOCK_RANK
    group = tl.program_id(2)
    slot = tl.load(tile_slot + tile)
    module = tl.load(modules + group)
    pairs = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_TOKENS)
    is_pair = tl.arange(0, BLOCK_TOKENS) < tl.load(tile_size + tile)
    if slot < 0:
        return
    entry = slot.to(tl.int64) * num_modules + module
    rank = tl.load(table_rank + entry)
    first_number = tl.load(table_a + entry)
    tokens = tl.load(pair_token + pairs, mask=is_pair, other=0).to(tl.int64)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    if first_rank < rank:
        a = buffer + tl.multiple_of(first_number, ALIGNMENT)
        last = tl.minimum((split + 1) * part, width)
        for begin in range(split * part, last, BLOCK_IN):
            inputs = begin + tl.arange(0, BLOCK_IN)
            rows = tl.load(
                x + tokens[:, None] * x_stride + inputs[None, :],
                mask=is_pair[:, None] & (inputs < last)[None, :], other=0.0,
            )  # fmt: skip
            columns = tl.load(
                a + ranks[None, :] * width + inputs[:, None],
                mask=(ranks < rank)[None, :] & (inputs < last)[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                total += tl.dot(rows.to(tl.float32), columns.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(rows.to(columns.dtype), columns)
    row = (group.to(tl.int64) * splits + split) * num_pairs + pairs
    tl.store(h + row[:, None] * max_rank + ranks[None, :], total, mask=is_pair[:, None] & (ranks < max_rank)[None, :])


def shrink_reference(
    x: Tensor, table: AdapterTable, modules: Tensor, tiles: Tiles, max_rank: int, splits: int
) -> Tensor:
    """The formula, pair by pair; all of it in the first split. NaN where no tile has the pair."""
    h = torch.full((modules.shape[0], splits, tiles.num_pairs, max_rank), float("nan"))
    for slot, begin, size in zip(tiles.slot.tolist(), tiles.begin.tolist(), tiles.size.tolist(), strict=True):
        if slot == NOBODY:
            continue
        for group, module in enumerate(modules.tolist()):
            rank, first = int(table.rank[slot, module]), int(table.a[slot, module])
            a = table.buffer[first : first + rank * x.shape[1]].view(rank, x.shape[1])
            for pair in range(begin, begin + size):
                h[group, :, pair] = 0.0
                h[group, 0, pair, :rank] = a.float() @ x[int(tiles.token[pair])].float()
    return h
