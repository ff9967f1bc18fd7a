"""The kernels of LoRA, each with adapters of mixed ranks (`kernel_table.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from kernel_cases import BEYOND_CACHES, Case, Shape, in_turn
from torch import Tensor

from loraplex.kernels.lora.decode import AdapterRows, DecodeStep, DecodeTable, add_decode, has_tiles
from loraplex.kernels.lora.expand import expand
from loraplex.kernels.lora.grouped import add_masked, add_run, owner_mask
from loraplex.kernels.lora.shrink import num_splits, shrink
from loraplex.kernels.lora.table import AdapterTable, Tiles

_ADDRESSED: list[Tensor] = []  # whose memory a table points to
RANKS = (8, 16, 32, 64)


class Adapters:
    """So many adapters with these ranks in turn, on one module of the given sizes, in one buffer."""

    def __init__(self, count: int, widths: tuple[int, int], ranks: tuple[int, ...], device: torch.device) -> None:
        self.widths, self.ranks = widths, [ranks[number % len(ranks)] for number in range(count)]
        size = sum(rank * sum(widths) for rank in self.ranks)
        self.buffer = torch.randn(size, dtype=torch.bfloat16, device=device)
        self.table = AdapterTable.empty(self.buffer, count, 1)
        begins = np.cumsum([0, *(rank * sum(widths) for rank in self.ranks)])[:-1]
        self.a, self.b = begins, begins + np.array(self.ranks) * widths[0]
        self.table.a[:, 0] = torch.from_numpy(self.a)
        self.table.b[:, 0] = torch.from_numpy(self.b)
        self.table.rank[:, 0] = torch.tensor(self.ranks, dtype=torch.int32)
        self.table.scale[:, 0] = 1.0
        self.module = torch.zeros(1, dtype=torch.int32, device=device)

    def num_bytes(self, side: int) -> int:
        return sum(self.ranks) * self.widths[side] * 2


def _adapter_counts(shape: Shape, device: torch.device) -> Iterator[tuple[str, list[Adapters], Tiles, int]]:
    """(name, layers of adapters to take in turn, a token of each, bytes of one side without padding).

    With mixed ranks and with padded ones; as many layers as a GPU's cache does not keep, where they are not tiny.
    """
    for count in (1, 8, 32, 256):
        tiles = Tiles.of(range(count), None, 16, device)
        for kind, ranks in (("mixed", RANKS), ("padded", (max(RANKS),))):
            first = Adapters(count, (shape.hidden, shape.hidden), ranks, device)
            more = min(BEYOND_CACHES // first.num_bytes(0), 24)
            layers = [first, *(Adapters(count, first.widths, ranks, device) for _ in range(more))]
            num_bytes = sum(RANKS[number % len(RANKS)] for number in range(count)) * shape.hidden * 2
            yield f"{count} adapters, {kind}", layers, tiles, num_bytes


def lora_shrink(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    for name, layers, tiles, num_bytes in _adapter_counts(shape, device):
        x = torch.randn(tiles.num_pairs, shape.hidden, dtype=torch.bfloat16, device=device)
        splits = num_splits(shape.hidden, tiles, 1, max(RANKS))
        run = in_turn([partial(shrink, x, own.table, own.module, tiles, max(RANKS), splits) for own in layers])
        cases.append(Case(name, run, num_bytes))
    return cases


def lora_expand(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    for name, layers, tiles, num_bytes in _adapter_counts(shape, device):
        y = torch.zeros(tiles.num_pairs, shape.hidden, dtype=torch.bfloat16, device=device)
        h = torch.randn(2, tiles.num_pairs, max(RANKS), device=device)
        run = in_turn([partial(expand, y, h, own.table, 0, tiles) for own in layers])
        cases.append(Case(name, run, num_bytes))
    return cases


def lora_decode(shape: Shape, device: torch.device) -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for count, each in ((1, 1), (4, 1), (4, 2), (4, 8), (32, 1)):
            table, num_bytes, number = _decode_table(count, shape.hidden, dtype)
            x, y = (torch.randn(count * each, shape.hidden).to(dtype) for _ in range(2))
            step = DecodeStep(table, [token % count for token in range(count * each)])
            run = in_turn([partial(add_decode, y, x, module, step) for module in range(number)])
            name = f"{count} adapters x {each} tokens, {str(dtype).removeprefix('torch.')}"
            cases.append(Case(name, run, num_bytes))
    for count, each in ((4, 8), (32, 14), (4, 112), (1, 448)):
        cases += _lora_prompts(count, each, shape.hidden)
    return cases


def _lora_prompts(count: int, each: int, width: int) -> list[Case]:
    """Runs of tokens in bfloat16, by whatever can compute them."""
    table, num_bytes, number = _decode_table(count, width, torch.bfloat16)
    flats, ranks = _ADDRESSED[-count:], [int(rank) for rank in table.rank[0]]
    x, y = (torch.randn(count * each, width).bfloat16() for _ in range(2))
    owners = [token // each for token in range(count * each)]
    name = f"{count} runs of {each} tokens"

    def gemms(module: int) -> None:
        for group, (flat, rank) in enumerate(zip(flats, ranks, strict=True)):
            a, b = flat.view(-1, rank, width)[2 * module : 2 * module + 2]
            rows = slice(group * each, (group + 1) * each)
            add_run(y[rows], x[rows], a, b, 1.0)

    cases = [Case(f"{name}, GEMMs", in_turn([partial(gemms, module) for module in range(number)]), num_bytes)]
    for form, in_tiles in (("few", False), ("tiles", True)):
        if in_tiles and not has_tiles(x.dtype, x.device):
            continue
        step = DecodeStep(table, owners, in_tiles=in_tiles)
        run = in_turn([partial(add_decode, y, x, module, step) for module in range(number)])
        cases.append(Case(f"{name}, {form}", run, num_bytes))
    return cases


def _decode_table(count: int, width: int, dtype: torch.dtype) -> tuple[DecodeTable, int, int]:
    """A table of as many modules as caches do not keep; one module's bytes; how many there are."""
    ranks = [RANKS[number % len(RANKS)] for number in range(count)]
    num_bytes = sum(ranks) * 2 * width * dtype.itemsize
    number = -(-BEYOND_CACHES // num_bytes)
    rows, starts = [], []
    for rank in ranks:
        flat = torch.randn(2 * number * rank * width).to(dtype)
        begins = np.arange(2 * number, dtype=np.uint64) * np.uint64(rank * width * dtype.itemsize)
        ones = np.ones(number, dtype=np.float32)
        rows.append(AdapterRows(begins[::2].copy(), begins[1::2].copy(), (ones * rank).astype(np.int32), ones))
        starts.append(flat.data_ptr())
        _ADDRESSED.append(flat)
    return DecodeTable([width] * number, [width] * number, rows, starts), num_bytes, number


def lora_grouped(shape: Shape, device: torch.device) -> list[Case]:
    count = 8
    rows = torch.tensor([RANKS[number % len(RANKS)] for number in range(count)])
    row_owner = torch.arange(count).repeat_interleave(rows).to(device)
    a, b = (torch.randn(len(row_owner), shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, y = (torch.randn(count, shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    mask = owner_mask(torch.arange(count, device=device), row_owner, torch.ones_like(row_owner, dtype=torch.bfloat16))
    return [Case(f"{count} adapters", lambda: add_masked(y, x, a, b, mask), 2 * a.numel() * 2)]
