"""Tensors of a step's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def int_tensor(numbers: Sequence[int]) -> Tensor:
    """int64, on the host. Shape [N]. By way of NumPy, which reads a list in a fifth of the time that torch takes."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))
