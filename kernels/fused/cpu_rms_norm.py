"""Root-mean-square normalisation on a CPU, in C (`cpu_rms_norm.c`): one call instead of torch's seven operations.

    y[t, i] = weight[i] · x[t, i] / √(mean_i x[t, i]² + epsilon)

Sums are in float32. A 16-bit y is rounded once, or the quotient is rounded before the weight multiplies it, as most
modules of transformers do. `is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.built import function, library

_NAMES = {torch.float32: "loraplex_rms_norm_float", torch.bfloat16: "loraplex_rms_norm_bfloat16"}
_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)


class _Norm(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("rounds_twice", ctypes.c_int32),
    )


class RmsNorm:
    """One normalisation. What a row gives depends on no other, not in its last bit."""

    def __init__(self, weight: Tensor, epsilon: float, dtype: torch.dtype, *, rounds_twice: bool) -> None:
        """weight: Shape [N], float32, contiguous. dtype: of x, one that `is_available` knows."""
        self._weight = weight
        self.width = weight.shape[0]
        self.dtype = dtype
        self._norm = _Norm(self.width, weight.data_ptr(), epsilon, rounds_twice)
        self._run = function(__file__, _NAMES[dtype], *_ARGUMENTS)

    def __call__(self, x: Tensor) -> Tensor:
        """x: Shape [..., N], of the type told. Result: the same.

        Raises ValueError for an x of another width or type.
        """
        if x.dtype != self.dtype or x.shape[-1] != self.width:
            raise ValueError(f"x is {x.shape[-1]} wide and {x.dtype}, the weight {self.width} for {self.dtype}")
        x = x.contiguous()
        y = x.new_empty(x.shape)
        self._run(self._norm, x, y, x.numel() // self.width, torch.get_num_threads())
        return y


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `RmsNorm` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The formula in float64. x: Shape [..., N]. weight: Shape [N]. Result: Shape [..., N]."""
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
