"""The grouped LoRA of `grouped.py` on a CPU, in C (`decode.c`): nothing is stacked or copied.

`is_available` tells where it was built. It is for few tokens of an adapter, reading which is most of the work; for many
there is a second form on CPUs with tile registers (`decode_amx.h`, `has_tiles`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.built import constant, function, library

_NAMES = {torch.float32: "loraplex_lora_decode_float", torch.bfloat16: "loraplex_lora_decode_bfloat16"}
_PADDING = 32  # numbers that a row of the scratch for x may have more
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class _Table(ctypes.Structure):
    _fields_ = (
        ("num_adapters", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("in_features", "out_features", "a", "b", "rank", "scale")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_groups", "num_threads", "max_rank", "in_tiles")),
        *((name, ctypes.c_void_p) for name in ("adapter", "begin", "token", "weight", "x", "h")),
        ("x_size", ctypes.c_int64),
        ("own", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter's part of every module, by module index: Shape [M] each. Rank 0 where it leaves a module alone.

    `a` and `b` are where A, Shape [rank, in], and Bᵀ, Shape [rank, out], begin, in bytes from the adapter's own start.
    """

    a: NDArray[np.uint64]
    b: NDArray[np.uint64]
    rank: NDArray[np.int32]
    scale: NDArray[np.float32]


class DecodeTable:
    """What G adapters do to M modules. The memory that `starts` point to must outlive the table."""

    def __init__(
        self, in_features: Sequence[int], out_features: Sequence[int], adapters: Sequence[AdapterRows],
        starts: Sequence[int],
    ) -> None:  # fmt: skip
        """`starts[g]` is the address of adapter g."""
        base = np.array(starts, dtype=np.uint64)[:, None]
        self.rank = np.stack([adapter.rank for adapter in adapters], axis=1)
        self._kept = [
            np.array(in_features, dtype=np.int64),
            np.array(out_features, dtype=np.int64),
            np.ascontiguousarray((np.stack([adapter.a for adapter in adapters]) + base).T),
            np.ascontiguousarray((np.stack([adapter.b for adapter in adapters]) + base).T),
            self.rank,
            np.stack([adapter.scale for adapter in adapters], axis=1),
        ]
        self.structure = _Table(len(adapters), *(_address(array) for array in self._kept))
        self.widest_input = max(in_features)
        self.max_rank = int(self.rank.max())


class DecodeStep:
    """The tokens of one step that belong to adapters, those of an adapter together."""

    def __init__(
        self,
        table: DecodeTable,
        owners: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        in_tiles: bool = False,
    ) -> None:
        """`owners[t]` is token t's adapter in the table, −1 for none; `weights[t]` multiplies its scale.

        `in_tiles`: by the form for many tokens, which x and y of bfloat16 may take where `has_tiles`. What a token gets
        depends on the form, in its last bits, and on nothing else.
        """
        groups: dict[int, list[int]] = {}
        for token, owner in enumerate(owners):
            if owner >= 0:
                groups.setdefault(owner, []).append(token)
        tokens = [token for group in groups.values() for token in group]
        ends = np.cumsum([0, *(len(group) for group in groups.values())])
        self._table = table
        num_threads, row = torch.get_num_threads(), (table.widest_input + _PADDING) * 4
        own_x = min(len(tokens), constant(__file__, "loraplex_lora_decode_pass")) * row  # that a thread gathers at once
        sizes = [
            len(tokens) * row // 2 if in_tiles else num_threads * own_x,
            len(tokens) * table.max_rank * 4,
            num_threads * _own_bytes(len(tokens), table.max_rank) if in_tiles else 0,
        ]
        self._scratch = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        x, h, own = (scratch.data_ptr() for scratch in self._scratch)
        self._kept = [
            np.array(list(groups), dtype=np.int32),
            ends.astype(np.int32),
            np.array(tokens, dtype=np.int32),
            np.array([1.0 if weights is None else weights[token] for token in tokens], dtype=np.float32),
        ]
        self.structures = table.structure, _Step(
            len(groups), num_threads, table.max_rank, in_tiles, *(_address(array) for array in self._kept),
            x, h, own_x, own,
        )  # fmt: skip


class CurrentStep:
    """Stands for one `DecodeStep` after another, at one address: for calls that are repeated with what is current."""

    def __init__(self) -> None:
        self.structures = _Table(), _Step()
        self._step: DecodeStep | None = None

    def become(self, step: DecodeStep) -> None:
        """Be this one from now on."""
        for ours, theirs in zip(self.structures, step.structures, strict=True):
            ctypes.pointer(ours)[0] = theirs
        self._step = step

    def rest(self) -> None:
        """Be a step none of whose tokens belongs to an adapter, as at first."""
        ctypes.pointer(self.structures[1])[0] = _Step()


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_decode` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None


def has_tiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a `DecodeStep` for these may be computed in tiles."""
    return dtype == torch.bfloat16 and is_available(dtype, device) and _own_bytes(1, 1) > 0


def add_decode(y: Tensor, x: Tensor, module: int, step: DecodeStep | CurrentStep) -> None:
    """y[t] += weight · scale · (x[t] Aᵀ) B for the step's tokens.

    x: Shape [..., in]. y: Shape [..., out]. Contiguous, of the adapters' type; ValueError where they differ.
    Sums are in float32 and rounded once, so a 16-bit y is nearer the formula than by the torch forms.
    """
    if x.dtype != y.dtype:
        raise ValueError(f"x is {x.dtype}, y {y.dtype}")
    table, tokens = step.structures
    function(__file__, _NAMES[x.dtype], *_ARGUMENTS)(table, module, tokens, x, y)


def _own_bytes(num_tokens: int, max_rank: int) -> int:
    """Scratch of one thread in tiles; 0 where the CPU has none."""
    built = library(__file__)
    assert built is not None
    built.loraplex_lora_decode_own.restype = ctypes.c_int64
    return int(built.loraplex_lora_decode_own(ctypes.c_int64(num_tokens), ctypes.c_int64(max_rank)))


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)
