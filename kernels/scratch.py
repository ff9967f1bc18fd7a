"""Memory that the kernels in C work in, so that none allocates."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def scratch_of(size: int) -> Tensor:
    """At least so many bytes in lines of 64, which the calls of a thread use one after another.

    Whoever has them from an earlier call may keep using them.
    """
    if len(_scratch.bytes) < size:
        _scratch.bytes = torch.empty(size, dtype=torch.uint8)
    return _scratch.bytes
