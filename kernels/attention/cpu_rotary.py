"""Rotary position embedding of queries and keys on a CPU, in C (`cpu_rotary.c`): one call instead of torch's sixteen.

For each head's numbers x of a token, whose first and second halves are turned against each other:

    y[i] = x[i] · cos[i] − x[i + D/2] · sin[i]    for i < D/2
    y[i] = x[i] · cos[i] + x[i − D/2] · sin[i]    for i ≥ D/2

Products and sums are rounded one by one, as torch's operations are. The form is that of GPT-NeoX and Llama
(Su et al., RoFormer, arXiv:2104.09864, with halves instead of neighbours turned against each other).
`is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

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
    """Whether `rotate` knows these shapes: one row of T tokens, whose heads are as wide as cos and sin."""
    dtype, (*batch, num_tokens, width) = q.dtype, cos.shape
    return (
        batch == [1]
        and width % 2 == 0
        and q.dim() == k.dim() == 4
        and q.shape[0] == k.shape[0] == 1
        and q.shape[2] == k.shape[2] == num_tokens
        and q.shape[3] == k.shape[3] == width
        and q.stride(3) == k.stride(3) == 1
        and sin.shape == cos.shape
        and k.dtype == cos.dtype == sin.dtype == dtype
        and dtype in _NAMES
    )


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


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in float64. x: Shape [1, H, T, D]. cos, sin: Shape [1, T, D]. Result: as x."""
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x.double() * cos.double().unsqueeze(1) + turned * sin.double().unsqueeze(1)
