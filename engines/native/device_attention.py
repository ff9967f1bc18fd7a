"""A step's attention by the Triton kernels: one launch for all decodes, one for all chunks, whatever their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.engines.native.batch import Segment
from loraplex.engines.native.tensors import int_tensor
from loraplex.kernels.attention.cache_write import write_paged
from loraplex.kernels.attention.decode import attend_paged_decode
from loraplex.kernels.attention.paged import Form
from loraplex.kernels.attention.prefill import QueryTiles, attend_paged_prefill

# Programs that keep a GPU busy, and keys that are worth a program of their own.
_PROGRAMS = 512
_KEYS_PER_SPLIT = 256


@dataclass(frozen=True, slots=True)
class KernelDecodes:
    """The B one-token segments. rows, lengths: Shape [B], int64. block_tables: Shape [B, W], int32."""

    rows: Tensor
    block_tables: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class KernelPrefills:
    """The segments of several tokens. block_tables: Shape [C, W], int32, C of them."""

    tiles: QueryTiles
    block_tables: Tensor


@dataclass(frozen=True, slots=True)
class KernelStep:
    """Where a step's tokens go in the cache (`slots`: Shape [T]) and what each may look at."""

    slots: Tensor
    decodes: KernelDecodes | None
    prefills: KernelPrefills | None
    block_size: int

    @classmethod
    def of(cls, segments: Sequence[Segment], block_size: int) -> KernelStep:
        """On the host, as yet."""
        decodes: list[tuple[int, Segment]] = []
        chunks: list[tuple[int, Segment]] = []
        slots: list[int] = []
        row = 0
        for segment in segments:
            (decodes if segment.num_tokens == 1 else chunks).append((row, segment))
            table = segment.sequence.block_table
            for position in range(segment.start, segment.start + segment.num_tokens):
                slots.append(table[position // block_size] * block_size + position % block_size)
            row += segment.num_tokens
        return cls(
            int_tensor(slots),
            _decodes(decodes) if decodes else None,
            _prefills(chunks) if chunks else None,
            block_size,
        )

    def to(self, device: torch.device) -> KernelStep:
        """A copy elsewhere."""
        decodes, prefills = self.decodes, self.prefills
        if decodes is not None:
            rows, tables, lengths = (x.to(device) for x in (decodes.rows, decodes.block_tables, decodes.lengths))
            decodes = KernelDecodes(rows, tables, lengths, decodes.longest)
        if prefills is not None:
            prefills = KernelPrefills(prefills.tiles.to(device), prefills.block_tables.to(device))
        return KernelStep(self.slots.to(device), decodes, prefills, self.block_size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, form: Form) -> Tensor:
        """Each token's attention, its own key and value written to the cache, `keys` and `values`, before.

        query, key, value: Shape [1, H or Hk, T, D or Dv]. Result: Shape [T, H, Dv].
        """
        own, own_values = (x[0] if x.stride(3) == 1 else x[0].contiguous() for x in (key, value))
        write_paged(keys, values, own, own_values, self.slots)
        rows = query[0].transpose(0, 1)
        if self.prefills is None:
            return self._decode(rows, keys, values, form)
        out = query.new_empty(rows.shape[0], rows.shape[1], values.shape[2])
        tiles, tables = self.prefills.tiles, self.prefills.block_tables
        attend_paged_prefill(out, rows, keys, values, tables, tiles, self.block_size, form)
        if self.decodes is not None:
            out[self.decodes.rows] = self._decode(rows[self.decodes.rows], keys, values, form)
        return out

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, form: Form) -> Tensor:
        decodes = self.decodes
        assert decodes is not None
        longest = decodes.longest if form.window is None else min(decodes.longest, form.window)
        fill = _PROGRAMS // (query.shape[0] * keys.shape[1])
        splits = max(1, min(fill, -(-longest // _KEYS_PER_SPLIT)))
        return attend_paged_decode(
            query, keys, values, decodes.block_tables, decodes.lengths, self.block_size, form, splits
        )


def _decodes(segments: Sequence[tuple[int, Segment]]) -> KernelDecodes:
    lengths = [segment.start + 1 for _, segment in segments]
    return KernelDecodes(
        rows=int_tensor([row for row, _ in segments]),
        block_tables=_block_tables([segment for _, segment in segments]),
        lengths=int_tensor(lengths),
        longest=max(lengths),
    )


def _prefills(segments: Sequence[tuple[int, Segment]]) -> KernelPrefills:
    chunks = [(number, row, segment.num_tokens, segment.start) for number, (row, segment) in enumerate(segments)]
    tiles = QueryTiles.of(chunks, torch.device("cpu"))
    return KernelPrefills(tiles, _block_tables([segment for _, segment in segments]))


def _block_tables(segments: Sequence[Segment]) -> Tensor:
    tables = [segment.sequence.block_table for segment in segments]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return torch.from_numpy(padded)
