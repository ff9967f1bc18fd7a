"""What the kernels in C found out about the CPU, to be told otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from loraplex.kernels.built import library
from loraplex.kernels.dense import linear


def flag(module: ModuleType, name: str) -> ctypes.c_int:
    """0 or 1, −1 before it is asked for. Read by nobody where no kernel was built."""
    built = library(str(module.__file__))
    return ctypes.c_int() if built is None else ctypes.c_int.in_dll(built, name)


@contextmanager
def panels_wanted(wanted: bool) -> Iterator[None]:
    """Whether weights are packed in panels, whatever is fastest on this CPU, which has to have the instructions."""
    linear.panels_size(torch.zeros(1, 1, dtype=torch.bfloat16))  # which asks the CPU
    panels, tiles = flag(linear, "loraplex_panels"), flag(linear, "loraplex_tiles")
    before = panels.value, tiles.value
    panels.value, tiles.value = int(wanted), 0
    yield
    panels.value, tiles.value = before


def can_use_panels() -> bool:
    """By what Linux says of the CPU."""
    told = Path("/proc/cpuinfo")
    return told.exists() and {"avx2", "fma", "bmi2"} <= set(told.read_text().split())
