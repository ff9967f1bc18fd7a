"""Whether all numbers of a safetensors file are finite, read in pieces and without torch.

One NaN would be added to every token of the adapter's requests. Looking at exponent bits needs no type that numpy
lacks, and gives the interpreter's lock back for each piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loraplex.engines.adapters.safetensors_header import TensorInfo, shown
from loraplex.engines.errors import AdapterInvalid

PIECE_BYTES = 2**20
# dtype -> (unsigned integers of its size, the bits that are all set in NaN and infinity and in nothing else)
_EXPONENTS: dict[str, tuple[np.dtype[np.unsignedinteger[Any]], int]] = {
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F64": (np.dtype("<u8"), 0x7FF0000000000000),
}


def check_finite(path: Path, tensors: Iterable[TensorInfo]) -> None:
    """Raises AdapterInvalid naming the first tensor with a NaN or an infinity, and where in it.

    Tensors of other dtypes are passed over: no LoRA that is served has any.
    """
    with path.open("rb") as file:
        for tensor in tensors:
            if tensor.dtype in _EXPONENTS and (position := _first_not_finite(file, tensor)) is not None:
                place = [int(index) for index in np.unravel_index(position, tensor.shape)]
                raise AdapterInvalid(f"tensor {shown(tensor.name)} has a NaN or an infinity at {place}")


def _first_not_finite(file: BinaryIO, tensor: TensorInfo) -> int | None:
    """Its position in the flat tensor."""
    dtype, mask = _EXPONENTS[tensor.dtype]
    exponent = dtype.type(mask)
    file.seek(tensor.begin)
    for begin in range(tensor.begin, tensor.end, PIECE_BYTES):
        bits = np.frombuffer(file.read(min(PIECE_BYTES, tensor.end - begin)), dtype)
        not_finite = (bits & exponent) == exponent
        if not_finite.any():
            return (begin - tensor.begin) // dtype.itemsize + int(not_finite.argmax())
    return None
