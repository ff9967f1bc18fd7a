"""What every Triton kernel here needs to know of where it runs."""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

# Triton decides when a kernel is defined whether it compiles it or interprets it, by this variable.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def is_available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: CUDA, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or IS_INTERPRETED


def upcasts(*tensors: Tensor) -> bool:
    """Whether products are to be made in float32.

    For 16-bit operands the tensor cores multiply exactly and add in float32 anyhow; the interpreter, which has no
    bfloat16, would multiply the bits.
    """
    return IS_INTERPRETED or any(tensor.dtype == torch.float32 for tensor in tensors)


def padded(size: int, at_least: int = 16) -> int:
    """A power of two, no less than what tensor cores take."""
    return max(at_least, int(triton.next_power_of_2(size)))
