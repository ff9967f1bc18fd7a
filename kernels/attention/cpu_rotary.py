"""Rotary position embedding of queries and keys on a CPU, in C (`cpu_rotary.c`): one call instead of torch's sixteen.

The formula, its reference and its rounding are those of `rotary.py`. `is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.attention import rotary
from loraplex.kernels.built import function, library

_NAMES = {torch.float32: "loraplex_rotary_float", torch.bfloat16: "loraplex_rotary_bfloat16"}
_ARGUMENTS = [ctypes.c_void_p] * 7


class _Heads(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("heads", "by_token", "by_head"))


class _Call(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("q", _Heads),
        ("k", _Heads),
        ("num_threads", ctypes.c_int64),
    )


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `rotate` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` knows these shapes and this type."""
    return q.dtype in _NAMES and rotary.takes(q, k, cos, sin)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula. q: Shape [1, H, T, D]. k: Shape [1, Hk, T, D]. cos, sin: Shape [1, T, D]. Result: as q and k.

    For what `takes` takes, and nothing else. The results are views of [1, T, H, D] and [1, T, Hk, D].
    """
    _, _, num_tokens, width = q.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    rotated_q, rotated_k = (x.new_empty(1, num_tokens, x.shape[1], width) for x in (q, k))
    heads = [_Heads(x.shape[1], x.stride(2), x.stride(1)) for x in (q, k)]
    call = _Call(num_tokens, width, *heads, torch.get_num_threads())
    function(__file__, _NAMES[q.dtype], *_ARGUMENTS)(call, q, k, cos, sin, rotated_q, rotated_k)
    return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2)
