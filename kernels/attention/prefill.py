"""Attention of chunks of several sequences over their paged caches, in one launch.

The formula is that of `paged.py`: a token at position p looks at positions 0 … p of its own sequence (within the
window), its chunk's own keys included, which are in the cache already.

Queries are cut into tiles of at most `TILE` tokens of one sequence:

    tile n: tokens row[n] … row[n] + size[n] − 1 of the step, at positions position[n] …, of sequence[n].
    sequence, row, size, position: Shape [N], int32. A size of 0 makes the tile empty.
    q: Shape [T, H, D].   keys: Shape [S, Hk, D].   values: Shape [S, Hk, Dv].   block_tables: Shape [B, W], int32.
    out: Shape [T, H, Dv]; rows of no tile are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.attention.paged import Form, attend, causal_mask
from loraplex.kernels.triton_support import padded, upcasts

TILE = 64
# What a program holds of it in registers and 99 KiB of shared memory, as (queries, keys, warps), by the widest heads
# that it is for: products in float32 have no tensor cores.
_SIZES = {64: (64, 64, 4), 128: (64, 64, 8), 256: (64, 32, 8), 512: (32, 32, 8)}
_SIZES_FLOAT32 = {256: (16, 32, 8), 512: (16, 16, 8)}


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """packed: Shape [4, N], int32: sequence, row, size and position of each tile."""

    packed: Tensor

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int, int, int]], device: torch.device) -> QueryTiles:
        """Chunks are (sequence, first row, number of tokens, first position)."""
        tiles = [
            (sequence, row + begin, min(TILE, size - begin), position + begin)
            for sequence, row, size, position in chunks
            for begin in range(0, size, TILE)
        ]
        return cls(torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(device))

    def to(self, device: torch.device) -> QueryTiles:
        """A copy elsewhere."""
        return QueryTiles(self.packed.to(device))


def attend_paged_prefill(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, tiles: QueryTiles, block_size: int,
    form: Form,
) -> None:  # fmt: skip
    """Writes out, in its own type."""
    heads, width = q.shape[1:]
    key_heads, value_width = keys.shape[1], values.shape[2]
    block_queries, block_keys, num_warps = _sizes(max(width, value_width), q.dtype)
    _attend_tile[(tiles.packed.shape[1], heads, TILE // block_queries)](
        out, q, keys, values, block_tables, form.sinks if form.sinks is not None else q,
        *tiles.packed.unbind(), form.scale, form.window or 0, form.softcap or 0.0,
        width, value_width, block_size, block_tables.stride(0), q.stride(0), q.stride(1), keys.stride(0),
        keys.stride(1), values.stride(0), values.stride(1), out.stride(0), out.stride(1),
        HAS_CAP=form.softcap is not None, HAS_SINKS=form.sinks is not None, GROUP=heads // key_heads,
        BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, BLOCK_WIDTH=padded(width),
        BLOCK_VALUE=padded(value_width), UPCAST=upcasts(q, keys), num_warps=num_warps,
    )  # fmt: skip


def _sizes(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    sizes = _SIZES_FLOAT32 if dtype == torch.float32 else _SIZES
    return next((found for widest, found in sizes.items() if width <= widest), sizes[512])


@triton.jit(
    do_not_specialize=("window", "table_stride"),
    do_not_specialize_on_alignment=("block_tables", "tile_sequence", "tile_row", "tile_size", "tile_position"),
)
def _attend_tile(  # type: ignore[no-untyped-def]
    out, q, keys, values, block_tables, sinks, tile_sequence, tile_row, tile_size, tile_position, scale, window,
    softcap, width, value_width, block_size, table_stride, q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
    HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, head, before = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_QUERIES
    size = tl.load(tile_size + tile) - before
    if size <= 0:
        return
    key_head = head // GROUP
    first = tl.load(tile_position + tile) + before
    is_query = tl.arange(0, BLOCK_QUERIES) < size
    tokens = (tl.load(tile_row + tile) + before + tl.arange(0, BLOCK_QUERIES)).to(tl.int64)
    query_positions = first + tl.arange(0, BLOCK_QUERIES)
    numbers, value_numbers = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE)
    query = tl.load(
        q + tokens[:, None] * q_row + head * q_head + numbers[None, :],
        mask=is_query[:, None] & (numbers < width)[None, :], other=0.0,
    )  # fmt: skip
    table = block_tables + tl.load(tile_sequence + tile).to(tl.int64) * table_stride
    oldest = tl.maximum(first - window + 1, 0) if window > 0 else first * 0
    most = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    if HAS_SINKS:
        most = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
    result = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE), dtype=tl.float32)
    last = first + tl.minimum(size, BLOCK_QUERIES)
    for begin in range(oldest, last, BLOCK_KEYS):
        positions = begin + tl.arange(0, BLOCK_KEYS)
        is_key = positions < last
        blocks = tl.load(table + positions // block_size, mask=is_key, other=0)
        rows = blocks.to(tl.int64) * block_size + positions % block_size
        key = tl.load(
            keys + rows[None, :] * k_row + key_head * k_head + numbers[:, None],
            mask=is_key[None, :] & (numbers < width)[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            scores = tl.dot(query.to(tl.float32), key.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, key) * scale
        if HAS_CAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        distance = query_positions[:, None] - positions[None, :]
        sees = (distance >= 0) & is_key[None, :]
        if window > 0:
            sees = sees & (distance < window)
        scores = tl.where(sees, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        # a query that has seen nothing yet, its window lying further on: −inf − (−inf) would be no number
        finite = tl.where(new_most == float("-inf"), 0.0, new_most)
        weights = tl.exp(scores - finite[:, None])
        shrunk = tl.exp(most - finite)
        value = tl.load(
            values + rows[:, None] * v_row + key_head * v_head + value_numbers[None, :],
            mask=is_key[:, None] & (value_numbers < value_width)[None, :], other=0.0,
        )  # fmt: skip
        total = total * shrunk + tl.sum(weights, axis=1)
        if UPCAST:
            result = result * shrunk[:, None] + tl.dot(weights, value.to(tl.float32), input_precision="ieee")
        else:
            result = result * shrunk[:, None] + tl.dot(weights.to(value.dtype), value)
        most = new_most
    places = out + tokens[:, None] * o_row + head * o_head + value_numbers[None, :]
    shown = result / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(places, shown.to(out.dtype.element_ty), mask=is_query[:, None] & (value_numbers < value_width)[None, :])


def attend_paged_prefill_reference(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, tiles: QueryTiles, block_size: int,
    form: Form,
) -> None:  # fmt: skip
    """The formula, tile by tile."""
    for sequence, row, size, position in tiles.packed.T.tolist():
        if size:
            positions = torch.arange(position + size, device=q.device)
            slots = block_tables[sequence, positions // block_size].long() * block_size + positions % block_size
            k, v = (cache[slots].transpose(0, 1)[None] for cache in (keys, values))
            mask = causal_mask(position, size, form.window, q.device)
            queries = q[row : row + size].transpose(0, 1)[None]
            out[row : row + size] = attend(queries, k, v, mask, form)[0].transpose(0, 1).to(out.dtype)
