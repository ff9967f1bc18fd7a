"""The C libraries beside the kernels' modules, built when the package is installed, where there is a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

from torch import Tensor

# Tensors and structures are passed by their address.
Argument = Tensor | ctypes.Structure | int


class Kernel:
    """A function in C that returns nothing."""

    __slots__ = ("run",)

    def __init__(self, run: Any) -> None:
        """`run`: of ctypes, its argument types told."""
        self.run = run

    def __call__(self, *arguments: Argument) -> None:
        for listener in _listeners:
            listener(self, arguments)
        self.run(*map(as_word, arguments))


Listener = Callable[[Kernel, tuple[Argument, ...]], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it the listener hears of every kernel that is called, in whichever thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def as_word(argument: Argument) -> int:
    """The integer that is passed."""
    if isinstance(argument, int):
        return argument
    return argument.data_ptr() if isinstance(argument, Tensor) else ctypes.addressof(argument)


@cache
def library(module: str) -> ctypes.CDLL | None:
    """The library of the module in this file, `decode.py` has `_decode*.so`; None where none was built that loads.

    One that was built for another Python is none: it may be older than the module.
    """
    path = Path(module)
    for suffix in EXTENSION_SUFFIXES:
        try:
            return ctypes.CDLL(str(path.with_name(f"_{path.stem}{suffix}")))
        except OSError:  # there is none, or it was built for another machine, or a torch without OpenMP
            continue
    return None


@cache
def constant(module: str, name: str) -> int:
    """An int64_t of that library. Raises ValueError where it has none, or was not built."""
    built = library(module)
    if built is None:
        raise ValueError(f"{module} has no library with {name}")
    return ctypes.c_int64.in_dll(built, name).value


@cache
def function(module: str, name: str, *arguments: Any) -> Kernel:
    """A function of that library by its ctypes arguments. Raises AttributeError without one."""
    found = getattr(library(module), name)
    found.argtypes = arguments
    found.restype = None
    return Kernel(found)


@cache
def size(module: str, name: str, *arguments: Any) -> Callable[..., int]:
    """A function of that library that gives an int64_t, which makes it no kernel. Raises AttributeError without one."""
    found = getattr(library(module), name)
    found.argtypes = arguments
    found.restype = ctypes.c_int64
    return cast("Callable[..., int]", found)
