"""A linear layer on a CPU, in C (`linear.c`), where weights are 16 bits wide or tokens are few.

What is computed: y[t, o] = bias[o] + Σ_i x[t, i] · w[o, i]. Where a CPU has no instructions for bfloat16, torch's
libraries multiply it number by number, and those for large matrices waste most of their work on a few rows.
`is_available` tells where ours was built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from loraplex.kernels.built import function, library, size
from loraplex.kernels.scratch import scratch_of

_NAMES = {torch.float32: "loraplex_linear_float", torch.bfloat16: "loraplex_linear_bfloat16"}
_SIZE = (ctypes.c_int64,) * 3  # in, number of tokens, number of threads -> bytes that a call in bfloat16 needs
_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)


class _Layer(ctypes.Structure):
    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float64. x: Shape [T, in]. weight: Shape [out, in]. bias: Shape [out]. Result: Shape [T, out]."""
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


class Linear:
    """One layer's weight, where it lies, and its bias. What a row gives depends on no other, not in its last bit.

    Where the CPU has tile registers (AMX) that does not hold for up to three rows, which are faster without them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: Shape [out, in], contiguous, of a type that `is_available` knows. bias: Shape [out], of the same."""
        self._kept = (weight, bias)
        self._out, self.in_features = weight.shape
        self._dtype = weight.dtype
        self._layer = _Layer(self.in_features, self._out, weight.data_ptr(), None if bias is None else bias.data_ptr())
        self._run = function(__file__, _NAMES[weight.dtype], *_ARGUMENTS)

    def __call__(self, x: Tensor) -> Tensor:
        """x: Shape [..., in], of the weight's type. Result: Shape [..., out]; sums in float32, rounded once.

        Raises ValueError for an x of another width or type.
        """
        if x.dtype != self._dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"x is {x.shape[-1]} wide and {x.dtype}, the weight {self.in_features} and {self._dtype}")
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._out)
        num_tokens, num_threads = x.numel() // self.in_features, torch.get_num_threads()
        scratch = scratch_of(self._scratch_bytes(num_tokens, num_threads))
        self._run(self._layer, x, y, num_tokens, num_threads, scratch)
        return y

    def _scratch_bytes(self, num_tokens: int, num_threads: int) -> int:
        if self._dtype == torch.float32:
            return 0
        return size(__file__, "loraplex_linear_scratch", *_SIZE)(self.in_features, num_tokens, num_threads)


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Linear` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None
