"""Calls of kernels that are known beforehand, made one after another in C (`calls.c`), without Python between them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from loraplex.kernels.built import Argument, Kernel, as_word, function, library

_WORDS = 8
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64)


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("words", ctypes.c_int64 * _WORDS))


class Calls:
    """Kernels with their arguments, integers and addresses: what lies there when they are made is what counts."""

    def __init__(self, calls: Sequence[tuple[Kernel, Sequence[Argument]]]) -> None:
        """Keeps what it points to alive. Raises ValueError for more than eight arguments."""
        if any(len(arguments) > _WORDS for _, arguments in calls):
            raise ValueError(f"a call has more than {_WORDS} arguments")
        self._kept = calls
        self._calls = (_Call * len(calls))(*(
            _Call(ctypes.cast(kernel.run, ctypes.c_void_p).value, tuple(map(as_word, arguments)))
            for kernel, arguments in calls
        ))  # fmt: skip
        self._run = function(__file__, "loraplex_make_calls", *_ARGUMENTS).run
        self._address = ctypes.addressof(self._calls)

    def __call__(self) -> None:
        self._run(self._address, len(self._calls))


def is_available() -> bool:
    """Whether `Calls` was built."""
    return library(__file__) is not None
