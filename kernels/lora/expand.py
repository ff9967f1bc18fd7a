"""The second half of LoRA, adding h · B to a layer's output, with DoRA's gain and the layer's bias in the epilogue.

For pair p = (token t, slot n) of the tiles, with scale, Bᵀ, Shape [R, out], and gain of slot n and the module:

    d[o] = weight[p] · scale · Σ_{r < R} (Σ_s h[s, p, r]) · Bᵀ[r, o]
    y[t, o] = y[t, o] + d[o]                                            without a gain
    y[t, o] = (y[t, o] − bias[o] + d[o]) · gain[o] + bias[o]            with one (DoRA)

    y: Shape [T, out], changed in place: the layer's own output.
    h: Shape [splits, P, max_rank], float32: what `shrink` gave for the module.
    bias: Shape [out], or None.

Sums are in float32 and y is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.lora.table import NOBODY, AdapterTable, Tiles
from loraplex.kernels.triton_support import upcasts

BLOCK_RANK = 16
BLOCK_OUT = 128


def expand(y: Tensor, h: Tensor, table: AdapterTable, module: int, tiles: Tiles, bias: Tensor | None = None) -> None:
    """Changes y as above."""
    splits, num_pairs, max_rank = h.shape
    width = y.shape[1]
    _expand[(tiles.num_tiles, triton.cdiv(width, BLOCK_OUT))](
        y, h, bias if bias is not None else y, table.buffer, table.b, table.gain, table.rank, table.scale,
        tiles.slot, tiles.begin, tiles.size, tiles.token, tiles.weight,
        module, table.num_modules, num_pairs, max_rank, width, y.stride(0), splits,
        HAS_BIAS=bias is not None, BLOCK_TOKENS=tiles.block, BLOCK_RANK=BLOCK_RANK, BLOCK_OUT=BLOCK_OUT,
        UPCAST=upcasts(table.buffer),
    )  # fmt: skip


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    y, h, bias, buffer, table_b, table_gain, table_rank, table_scale,
    tile_slot, tile_begin, tile_size, pair_token, pair_weight,
    module, num_modules, num_pairs, max_rank, width, y_stride, splits,
    HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tile_slot + tile)
    if slot < 0:
        return
    entry = slot.to(tl.int64) * num_modules + module
    rank = tl.load(table_rank + entry)
    if rank == 0:
        return
    is_pair = tl.arange(0, BLOCK_TOKENS) < tl.load(tile_size + tile)
    pairs = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_TOKENS)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < width
    b = buffer + tl.load(table_b + entry)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        is_number = is_pair[:, None] & (ranks < rank)[None, :]
        rows = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
        for split in range(splits):
            row = (split * num_pairs + pairs).to(tl.int64)
            rows += tl.load(h + row[:, None] * max_rank + ranks[None, :], mask=is_number, other=0.0)
        columns = tl.load(
            b + ranks[:, None] * width + outputs[None, :], mask=(ranks < rank)[:, None] & is_output[None, :], other=0.0
        )
        if UPCAST:
            total += tl.dot(rows, columns.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(rows.to(columns.dtype), columns)
    weights = tl.load(pair_weight + pairs, mask=is_pair, other=0.0) * tl.load(table_scale + entry)
    tokens = tl.load(pair_token + pairs, mask=is_pair, other=0).to(tl.int64)
    places = y + tokens[:, None] * y_stride + outputs[None, :]
    is_place = is_pair[:, None] & is_output[None, :]
    result = tl.load(places, mask=is_place, other=0.0).to(tl.float32) + total * weights[:, None]
    gain = tl.load(table_gain + entry)
    if gain >= 0:
        gains = tl.load(buffer + gain + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            own = tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
            result = (result - own) * gains + own
        else:
            result *= gains
    tl.store(places, result.to(y.dtype.element_ty), mask=is_place)


def expand_reference(
    y: Tensor, h: Tensor, table: AdapterTable, module: int, tiles: Tiles, bias: Tensor | None = None
) -> None:
    """The formula, pair by pair."""
    width = y.shape[1]
    for slot, begin, size in zip(tiles.slot.tolist(), tiles.begin.tolist(), tiles.size.tolist(), strict=True):
        if slot == NOBODY or not (rank := int(table.rank[slot, module])):
            continue
        first, gain = int(table.b[slot, module]), int(table.gain[slot, module])
        b = table.buffer[first : first + rank * width].view(rank, width).float()
        own = 0.0 if bias is None else bias.float()
        for pair in range(begin, begin + size):
            token = int(tiles.token[pair])
            d = float(tiles.weight[pair] * table.scale[slot, module]) * (h[:, pair, :rank].sum(0) @ b)
            result = y[token].float() + d
            if gain >= 0:
                result = (result - own) * table.buffer[gain : gain + width].float() + own
            y[token] = result.to(y.dtype)
