"""A safetensors header, read without torch and without trusting it.

The layout, after huggingface/safetensors: 8 bytes little-endian header length N, N bytes of JSON that begin with `{`,
then the tensors' bytes. `data_offsets` count from byte 8 + N; the tensors cover what follows exactly once.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loraplex.engines.errors import AdapterInvalid

MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 64  # torch's own limit
_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8}
    | {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
    | {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its bytes lie at [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, in the order of their bytes. Raises AdapterInvalid naming what is wrong."""
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        raw = _header_bytes(file, num_bytes)
        data_begin = 8 + len(raw)
    header = _parse(raw)
    _check_metadata(header.pop("__metadata__", {}))
    tensors = [_tensor(name, entry, data_begin) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_covered(tensors, data_begin, num_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _header_bytes(file: BinaryIO, num_bytes: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterInvalid(f"the file has {num_bytes} bytes, too few for a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise AdapterInvalid(f"the safetensors header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > num_bytes - 8:
        raise AdapterInvalid(f"the safetensors header claims {length} bytes, but only {num_bytes - 8} follow")
    raw = file.read(length)
    if len(raw) != length:
        raise AdapterInvalid("the safetensors header broke off while it was read")
    if not raw.startswith(b"{"):
        raise AdapterInvalid("the safetensors header does not begin with '{'")
    return raw


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"the safetensors header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise AdapterInvalid("the safetensors header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise AdapterInvalid(f"the safetensors header has the name {shown(name)} twice")
        found[name] = value
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalid("__metadata__ of the safetensors header is not a map of strings")


def _tensor(name: str, entry: Any, data_begin: int) -> TensorInfo:
    told = shown(name)
    if _SURROGATE.search(name):
        raise AdapterInvalid(f"the tensor name {told} is not Unicode text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(f"tensor {told} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise AdapterInvalid(f"tensor {told} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterInvalid(f"tensor {told} has the impossible shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterInvalid(f"tensor {told} has the impossible data_offsets {shown(offsets)}")
    num_bits, length = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if num_bits != length * 8:
        raise AdapterInvalid(f"tensor {told} needs {shown(num_bits)} bits, but its data_offsets span {length} bytes")
    return TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of 63-bit non-negative integers; `true` is none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_covered(tensors: list[TensorInfo], data_begin: int, num_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = data_begin
    for tensor in tensors:
        if tensor.end > num_bytes:
            raise AdapterInvalid(f"tensor {shown(tensor.name)} ends {tensor.end - num_bytes} bytes behind the file")
        if tensor.begin < end:
            raise AdapterInvalid(f"tensor {shown(tensor.name)} overlaps the one before it")
        if tensor.begin > end:
            raise AdapterInvalid(f"{tensor.begin - end} bytes before tensor {shown(tensor.name)} belong to none")
        end = tensor.end
    if end != num_bytes:
        raise AdapterInvalid(f"the last {num_bytes - end} bytes of the file belong to no tensor")


def shown(value: object) -> str:
    """Something hostile, short and printable."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
