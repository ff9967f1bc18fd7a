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

from loraplex.kernels.lora.shrink import MOST_SPLITS
from loraplex.kernels.lora.table import NOBODY, AdapterTable, Tiles
from loraplex.kernels.triton_support import upcasts

BLOCK_RANK = 16
BLOCK_OUT = 128


def expand(y: Tensor, h: Tensor, table: AdapterTable, module: int, tiles: Tiles, bias: Tensor | None = None) -> None:
    """Changes y as above. h has at most MOST_SPLITS of the tiles' block."""
    splits, num_pairs, max_rank = h.shape
    width = y.shape[1]
    _expand[(tiles.num_tiles, triton.cdiv(width, BLOCK_OUT))](
        y, h, bias if bias is not None else y, table.buffer, table.b, table.gain, table.rank, table.scale,
        tiles.slot, tiles.begin, tiles.size, tiles.token, tiles.weight,
        module, table.num_modules, num_pairs, max_rank, width, y.stride(0), splits,
        HAS_BIAS=bias is not None, BLOCK_TOKENS=tiles.block, BLOCK_SPLITS=MOST_SPLITS[tiles.block],
        BLOCK_RANK=BLOCK_RANK, BLOCK_OUT=BLOCK_OUT, ALIGNMENT=table.alignment, UPCAST=upcasts(table.buffer),
        num_warps=tiles.num_warps,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=("module", "num_modules", "num_pairs", "splits"),
    do_not_specialize_on_alignment=("tile_slot", "tile_begin", "tile_size", "pair_token", "pair_weight"),
)
def _expand(  # type: ignore[no-untyped-def]
    y, h, bias, buffer, table_b, table_gain, table_rank, table_scale,
    tile_slot, tile_begin, tile_size, pair_token, pair_weight,
    module, num_modules, num_pairs, max_rank, width, y_stride, splits,
    HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tile_slot + tile)
    pairs = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_TOKENS)
    is_pair = tl.arange(0, BLOCK_TOKENS) < tl.load(tile_size + tile)
    if slot < 0:
        return
    entry = slot.to(tl.int64) * num_modules + module
    rank = tl.load(table_rank + entry)
    first_number, gain = tl.load(table_b + entry), tl.load(table_gain + entry)
    weights = tl.load(pair_weight + pairs, mask=is_pair, other=0.0) * tl.load(table_scale + entry)
    tokens = tl.load(pair_token + pairs, mask=is_pair, other=0).to(tl.int64)
    if rank == 0:
        return
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = outputs < width
    places = y + tokens[:, None] * y_stride + outputs[None, :]
    is_place = is_pair[:, None] & is_output[None, :]
    result = tl.load(places, mask=is_place, other=0.0).to(tl.float32)  # on its way while B is multiplied
    b = buffer + tl.multiple_of(first_number, ALIGNMENT)
    numbers = tl.arange(0, BLOCK_SPLITS)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        row = (numbers[:, None] * num_pairs + pairs[None, :]).to(tl.int64)
        is_row = (numbers < splits)[:, None] & is_pair[None, :]
        parts = tl.load(
            h + row[:, :, None] * max_rank + ranks[None, None, :],
            mask=is_row[:, :, None] & (ranks < max_rank)[None, None, :], other=0.0,
        )  # fmt: skip
        rows = tl.sum(parts, axis=0)
        columns = tl.load(
            b + ranks[:, None] * width + outputs[None, :], mask=(ranks < rank)[:, None] & is_output[None, :], other=0.0
        )
        if UPCAST:
            total += tl.dot(rows, columns.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(rows.to(columns.dtype), columns)
    result += total * weights[:, None]
    if gain >= 0:
        gains = tl.load(buffer + tl.multiple_of(gain, ALIGNMENT) + outputs, mask=is_output, other=0.0)
        if HAS_BIAS:
            own = tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
            result = (result - own) * gains.to(tl.float32)[None, :] + own
        else:
            result *= gains.to(tl.float32)[None, :]
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
