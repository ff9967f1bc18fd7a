"""Attention of single tokens on a CPU, in C (`cpu_decode.c`): keys and values are read where they lie, none is padded.

The formula is that of `paged.py`; sums and softmax are float32. `is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.attention.paged import Form
from loraplex.kernels.built import function, library

_NAMES = {torch.float32: "loraplex_cpu_decode_float", torch.bfloat16: "loraplex_cpu_decode_bfloat16"}
_WRITES = {torch.float32: "loraplex_cache_write_float", torch.bfloat16: "loraplex_cache_write_bfloat16"}
_ARGUMENTS = (ctypes.c_void_p,) * 5
WIDEST = 512  # numbers of a key or value


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "width", "value_width", "longest")),
        *((name, ctypes.c_void_p) for name in ("slots", "lengths")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        ("sinks", ctypes.c_void_p),
        ("num_threads", ctypes.c_int64),
    )


class _Written(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "width", "by_token", "by_head")),
        ("slots", ctypes.c_void_p),
    )


class DecodeRows:
    """The rows of one step and what each may look at. What a row gets depends on no other, not in its last bit."""

    def __init__(self, slots: Tensor, lengths: Tensor) -> None:
        """slots: Shape [B, L]: the cache row of each position. lengths: Shape [B], ≤ L; where 0, the result is zeros.

        Both int64 and contiguous.
        """
        self._slots, self._lengths = slots, lengths
        self._calls: dict[tuple[object, ...], tuple[_Call, object]] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, form: Form) -> Tensor:
        """q: Shape [B, H, D]. keys: Shape [S, Hk, D]. values: Shape [S, Hk, Dv]. Result: Shape [B, H, Dv].

        All of one type that `is_available` knows; the cache is contiguous. Raises ValueError for a q of another type.
        """
        if q.dtype != keys.dtype:
            raise ValueError(f"q is {q.dtype}, the cache {keys.dtype}")
        q = q.contiguous()
        out = q.new_empty(q.shape[0], q.shape[1], values.shape[2])
        key = (q.shape[1], *keys.shape[1:], values.shape[2], form.scale, form.window, form.softcap, id(form.sinks))
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = self._call(q, keys, values, form)
        call, _ = known
        function(__file__, _NAMES[q.dtype], *_ARGUMENTS)(call, q, keys, values, out)
        return out

    def become(self, slots: Tensor, lengths: Tensor) -> None:
        """Other rows from now on, as many: for calls that are repeated with what is current.

        slots: Shape [B, L], of any L. lengths: Shape [B]. As for the constructor.
        """
        self._slots, self._lengths = slots, lengths
        for call, _ in self._calls.values():
            call.longest, call.slots, call.lengths = slots.shape[1], slots.data_ptr(), lengths.data_ptr()

    def _call(self, q: Tensor, keys: Tensor, values: Tensor, form: Form) -> tuple[_Call, object]:
        """With what it points to."""
        sinks = None if form.sinks is None else form.sinks.float().contiguous()
        call = _Call(
            *q.shape[:2], *keys.shape[1:], values.shape[2], self._slots.shape[1],
            self._slots.data_ptr(), self._lengths.data_ptr(), form.window or 0, form.scale, form.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return call, (sinks, form.sinks)


def write(numbers: Tensor, cache: Tensor, slots: Tensor) -> None:
    """cache[slots[t], h] = numbers[h, t]. numbers: Shape [H, T, D]. cache: Shape [S, H, D]. slots: Shape [T], int64.

    Of one type that `is_available` knows; cache and slots are contiguous. Raises ValueError for other numbers.
    """
    if numbers.dtype != cache.dtype:
        raise ValueError(f"numbers are {numbers.dtype}, the cache {cache.dtype}")
    if numbers.stride(2) != 1:
        numbers = numbers.contiguous()
    heads, num_tokens, width = numbers.shape
    written = _Written(num_tokens, heads, width, numbers.stride(1), numbers.stride(0), slots.data_ptr())
    function(__file__, _WRITES[cache.dtype], *_ARGUMENTS[:3])(written, numbers, cache)


def is_available(dtype: torch.dtype, device: torch.device, width: int, value_width: int) -> bool:
    """Whether `DecodeRows` can be used for such keys and values."""
    return (
        device.type == "cpu" and dtype in _NAMES and max(width, value_width) <= WIDEST and library(__file__) is not None
    )
