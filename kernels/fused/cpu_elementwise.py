"""Sums, products and picked rows on a CPU, in C (`cpu_elementwise.c`), with torch's own results to the last bit.

    add: y[i] = a[i] + b[i]        multiply: y[i] = a[i] · b[i]        pick_rows: y[i] = table[rows[i]]

Each sum and product is made in float32 and rounded once. For steps that are made of such calls alone: an operation of
torch costs several microseconds however little it has to do. `is_available` tells where they were built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.built import Argument, Kernel, function, library

_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_PAIRED = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)
_PICKED = (ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)

# A kernel with all of its arguments.
Call = tuple[Kernel, tuple[Argument, ...]]


def is_available() -> bool:
    """Whether the calls can be made."""
    return library(__file__) is not None


def add(a: Tensor, b: Tensor, y: Tensor) -> Call | None:
    """The call that writes the sums to y; None unless all are contiguous, of one shape and of one known type."""
    return _paired("add", a, b, y)


def multiply(a: Tensor, b: Tensor, y: Tensor) -> Call | None:
    """As `add`, of products."""
    return _paired("multiply", a, b, y)


def pick_rows(table: Tensor, rows: Tensor, y: Tensor) -> Call | None:
    """The call that writes the rows to y; None for what it does not take. table: Shape [R, N]. rows: any, int64.

    y: Shape [*rows, N]. All contiguous. Rows below 0 count from the end; what is not in the table gives NaN.
    """
    fits = table.dim() == 2 and rows.dtype == torch.int64 and y.shape == (*rows.shape, table.shape[1])
    if not fits or table.dtype != y.dtype or not _are_contiguous(table, rows, y):
        return None
    run = function(__file__, "loraplex_pick_rows", *_PICKED)
    return run, (table, table.shape[0], rows, y, rows.numel(), table.shape[1] * table.element_size())


def elementwise_reference(name: str, a: Tensor, b: Tensor) -> Tensor:
    """add and multiply in float64. Shapes [...]."""
    return a.double() + b.double() if name == "add" else a.double() * b.double()


def _paired(name: str, a: Tensor, b: Tensor, y: Tensor) -> Call | None:
    if y.dtype not in _TYPES or not a.dtype == b.dtype == y.dtype or not a.shape == b.shape == y.shape:
        return None
    if not _are_contiguous(a, b, y):
        return None
    run = function(__file__, f"loraplex_{name}_{_TYPES[y.dtype]}", *_PAIRED)
    return run, (a, b, y, y.numel(), torch.get_num_threads())


def _are_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)
