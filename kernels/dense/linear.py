"""A linear layer on a CPU, in C (`linear.c`), where weights are 16 bits wide or tokens are few.

What is computed: y[t, o] = bias[o] + Σ_i x[t, i] · w[o, i]. Where a CPU has no instructions for bfloat16, torch's
libraries multiply it number by number, and those for large matrices waste most of their work on a few rows.
`is_available` tells where ours was built.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.kernels.built import function, library, size
from loraplex.kernels.scratch import scratch_of

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_SIZE = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)  # layer, tokens, threads -> bytes
_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
_PACKING = (*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
_ROUNDING = (ctypes.c_void_p, *_PACKING)
_STEPS = 127  # of an int8, either way


class _Layer(ctypes.Structure):
    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class Panels(NamedTuple):
    """A weight as `pack` leaves it, or `round_and_pack`: then `scales` tell the width of its outputs' steps."""

    memory: Tensor
    scales: Tensor | None = None


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float64. x: Shape [T, in]. weight: Shape [out, in]. bias: Shape [out]. Result: Shape [T, out]."""
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def rounded_reference(weight: Tensor) -> Tensor:
    """What the weight is once it was rounded to int8, in float32: s[o] · round(w[o, i] / s[o]), s[o] = max|w[o]| / 127.

    As LLM.int8() rounds weights (Dettmers et al., 2022). weight, result: Shape [out, in].
    """
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    steps = torch.where(largest > 0, torch.full_like(largest, _STEPS) / largest, 0)  # of a number: by its reciprocal
    return (weight.float() * steps).round() * (largest / _STEPS)


class Linear:
    """One layer's weight, where it lies or packed, and its bias. What a row gives depends on no other, to the last bit.

    Where the CPU has tile registers (AMX) that does not hold for up to three rows, which are faster without them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, panels: Panels | None = None) -> None:
        """weight: Shape [out, in], contiguous, of a type that `is_available` knows. bias: Shape [out], of the same.

        panels: the weight, packed; then itself is never read.
        """
        self._out, self.in_features = weight.shape
        self._dtype = weight.dtype
        self._kept = (weight if panels is None else panels, bias)
        self._layer = _Layer(
            self.in_features,
            self._out,
            weight.data_ptr() if panels is None else None,
            None if bias is None else bias.data_ptr(),
            None if panels is None else panels.memory.data_ptr(),
            None if panels is None or panels.scales is None else panels.scales.data_ptr(),
        )
        name = _NAMES[weight.dtype]
        self._run = function(__file__, f"loraplex_linear_{name}", *_ARGUMENTS)
        self._scratch = size(__file__, f"loraplex_linear_scratch_{name}", *_SIZE)

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
        return self._scratch(ctypes.addressof(self._layer), num_tokens, num_threads)


def panels_size(weight: Tensor) -> int:
    """Bytes that the weight takes in panels (`panels.h`), or 0 where this CPU reads rows as fast. Shape [out, in]."""
    name = f"loraplex_panels_{_NAMES[weight.dtype]}"
    return size(__file__, name, ctypes.c_int64, ctypes.c_int64)(weight.shape[1], weight.shape[0])


def pack(weight: Tensor, panels: Tensor) -> None:
    """weight: Shape [out, in], contiguous. panels: Shape [panels_size(weight)], bytes from a cache line on."""
    out, width = weight.shape
    run = function(__file__, f"loraplex_pack_{_NAMES[weight.dtype]}", *_PACKING)
    run(weight, panels, width, out, torch.get_num_threads())


def int8_size(weight: Tensor) -> int:
    """Bytes that the weight takes in panels of int8, or 0 where this CPU multiplies none. Shape [out, in]."""
    out, width = weight.shape
    return size(__file__, "loraplex_panels_int8", ctypes.c_int64, ctypes.c_int64)(width, out)


def round_and_pack(weight: Tensor, panels: Tensor) -> Tensor:
    """As `rounded_reference` does. weight: Shape [out, in], contiguous. panels: Shape [int8_size(weight)], as `pack`'s.

    Result: the scales, float32, Shape [out]; NaN for an output with a weight that is not finite.
    """
    out, width = weight.shape
    scales = torch.empty(out, dtype=torch.float32)
    run = function(__file__, f"loraplex_pack_int8_{_NAMES[weight.dtype]}", *_ROUNDING)
    run(weight, panels, scales, width, out, torch.get_num_threads())
    return scales


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Linear` can be used for these."""
    return device.type == "cpu" and dtype in _NAMES and library(__file__) is not None
