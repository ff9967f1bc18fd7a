"""The C libraries beside the kernels' modules, built when the package is installed, where there is a compiler."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any


@cache
def library(module: str) -> ctypes.CDLL | None:
    """The library of the module in this file, `decode.py` has `_decode*.so`; None where none was built that loads."""
    path = Path(module)
    for built in sorted(path.parent.glob(f"_{path.stem}*.so")):
        try:
            return ctypes.CDLL(str(built))
        except OSError:  # built for another machine, or a torch without OpenMP
            continue
    return None


@cache
def function(module: str, name: str, *arguments: Any) -> Any:
    """A function of that library which returns nothing, by its ctypes arguments. Raises AttributeError without one."""
    found = getattr(library(module), name)
    found.argtypes = arguments
    found.restype = None
    return found
