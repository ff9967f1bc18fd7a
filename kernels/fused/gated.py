"""The gate of an MLP: y[t, i] = activation(gate[t, i]) · up[t, i].

silu(g) = g / (1 + e^−g)
gelu(g) = g / 2 · (1 + erf(g / √2))
gelu_tanh(g) = g / 2 · (1 + tanh(√(2/π) · (g + 0.044715 · g³)))        (Hendrycks and Gimpel 2016, eq. 2)

gate, up, y: Shape [..., N], of one type. Computed in float32, rounded once.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh"]
BLOCK = 1024


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """y, contiguous. Halves of one tensor are read where they lie."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.is_contiguous() and up.is_contiguous():
        rows = [gate.view(1, -1), up.view(1, -1)]
    else:
        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (gate.flatten(0, -2), up.flatten(0, -2))]
    count, width = rows[0].shape
    _gated[(triton.cdiv(width, BLOCK), count)](  # in this order: all in one row may be more than the second axis holds
        y, *rows, width, rows[0].stride(0), rows[1].stride(0), ACTIVATION=activation, BLOCK=BLOCK
    )
    return y


@triton.jit
def _sigmoid(z):  # type: ignore[no-untyped-def]
    """Of any z, without an overflow on the way."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    y, gate, up, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = numbers < width
    g = tl.load(gate + row * gate_stride + numbers, mask=is_number, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + numbers, mask=is_number, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        activated = g * _sigmoid(g)
    elif ACTIVATION == "gelu":
        activated = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:  # (1 + tanh(z)) / 2 is the sigmoid of 2z, and 2·√(2/π) = 1.5957…
        activated = g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    tl.store(y + row * width + numbers, (activated * u).to(y.dtype.element_ty), mask=is_number)


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The formula."""
    g = gate.float()
    activated = (
        functional.silu(g) if activation == "silu"
        else functional.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")
    )  # fmt: skip
    return (activated * up.float()).to(gate.dtype)
