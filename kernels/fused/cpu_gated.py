"""The gate of an MLP on a CPU, in C (`cpu_gated.c`): one call instead of torch's two operations.

    y[t, i] = activation(gate[t, i]) · up[t, i]

The activations are those of `gated.py`, in float32 to a few units in the last place. As in torch, which computes one
after the other, what a 16-bit activation gives is rounded before up multiplies it. `is_available` tells where it was
built.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from loraplex.kernels.built import function, library
from loraplex.kernels.fused.gated import Activation

_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_ARGUMENTS = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int)


class Gate:
    """One activation for one type. What a row gives depends on no other, not in its last bit."""

    def __init__(self, activation: Activation, dtype: torch.dtype) -> None:
        """dtype: one that `is_available` knows."""
        self.dtype = dtype
        self._run = function(__file__, f"loraplex_gated_{activation}_{_TYPES[dtype]}", *_ARGUMENTS)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: Shape [..., N], of the type told. Result: the same, contiguous.

        Halves of one tensor are read where they lie. Raises ValueError for another type or for two shapes.
        """
        if gate.dtype != self.dtype or up.dtype != self.dtype or gate.shape != up.shape:
            raise ValueError(
                f"gate is {tuple(gate.shape)} of {gate.dtype}, up {tuple(up.shape)} of {up.dtype}: not {self.dtype}"
            )
        width = stride = gate.shape[-1]
        y = gate.new_empty(gate.shape)
        if not (gate.is_contiguous() and up.is_contiguous()):
            gate, up = gate.flatten(0, -2), up.flatten(0, -2)
            if gate.stride() == up.stride() and gate.stride(-1) == 1:
                stride = gate.stride(0)
            else:
                gate, up = gate.contiguous(), up.contiguous()
        self._run(gate, up, y, y.numel() // max(width, 1), width, stride, torch.get_num_threads())
        return y


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Gate` can be used for these."""
    return device.type == "cpu" and dtype in _TYPES and library(__file__) is not None


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The formula in float64, without rounding between. Shapes [..., N]."""
    g = gate.double()
    if activation == "silu":
        return functional.silu(g) * up.double()
    return functional.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none") * up.double()
