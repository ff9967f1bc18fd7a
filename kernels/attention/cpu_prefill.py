"""Attention of many tokens of a sequence on a CPU, in C (`cpu_prefill.c`): where a chunk looks at chunks before it,
torch's own adds a mask of numbers to every score, and multiplies what the mask hides.

The formula is that of `paged.py`; sums and softmax are float32. Of bfloat16 on a CPU with tile registers (AMX) weights
are rounded before they are multiplied, as torch does. `is_available` tells where it was built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.kernels.attention.paged import Form
from loraplex.kernels.built import function, library, size
from loraplex.kernels.scratch import scratch_of

_NAMES = {torch.float32: "loraplex_cpu_prefill_float", torch.bfloat16: "loraplex_cpu_prefill_bfloat16"}
_ARGUMENTS = (ctypes.c_void_p,) * 6
_SIZE = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
WIDEST = 512  # numbers of a key or value
_LONGEST_WINDOW = 2**30
MOST_SCRATCH = 32 * 2**20  # bytes, but for a sequence that takes more by itself


class _Run(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("begin", "end", "start")),
        ("slots", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("by_token", "by_head", "window")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_void_p) for name in ("sinks", "runs")),
        *((name, ctypes.c_int64) for name in ("num_runs", "num_threads", "scratch_bytes")),
    )


class PrefillRuns:
    """Runs of rows of one step, each the tokens of one sequence."""

    def __init__(self, runs: Sequence[tuple[int, int, int, Tensor]]) -> None:
        """Each: rows `begin … end − 1`, the position of the first, and the cache row of all positions up to the last.

        Raises ValueError where those are not int64, contiguous, and as many as the positions.
        """
        for begin, end, start, slots in runs:
            if slots.dtype != torch.int64 or not slots.is_contiguous() or slots.shape != (start + end - begin,):
                raise ValueError(f"slots of {start} + {end - begin} positions are {list(slots.shape)}, {slots.dtype}")
        self._kept = [slots for *_, slots in runs]
        self._runs = (_Run * len(runs))(*(_Run(*run, slots.data_ptr()) for *run, slots in runs))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, form: Form, out: Tensor) -> None:
        """q: Shape [H, T, D]. keys: Shape [S, Hk, D]. values: Shape [S, Hk, Dv]. out: Shape [T, H, Dv].

        Rows of `out` that are in no run stay as they are. All are of one type that `is_available` knows; the cache and
        `out` are contiguous. Raises ValueError for a q of another type, and for a scale that is not positive.
        """
        if q.dtype != keys.dtype:
            raise ValueError(f"q is {q.dtype}, the cache {keys.dtype}")
        if not form.scale > 0:
            raise ValueError(f"scores are scaled by {form.scale}")
        if q.stride(2) != 1:
            q = q.contiguous()
        sinks = None if form.sinks is None else form.sinks.float().contiguous()
        call = _Call(
            q.shape[0], *keys.shape[1:], values.shape[2], q.stride(1), q.stride(0),
            min(form.window or 0, _LONGEST_WINDOW), form.scale, form.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), ctypes.addressof(self._runs),
            len(self._runs), torch.get_num_threads(),
        )  # fmt: skip
        needed = size(__file__, "loraplex_cpu_prefill_scratch", *_SIZE)
        call.scratch_bytes = needed(ctypes.byref(call), q.dtype == torch.bfloat16, MOST_SCRATCH)
        kept = call.scratch_bytes <= MOST_SCRATCH  # a long context's would never be given back
        scratch = scratch_of(call.scratch_bytes) if kept else torch.empty(call.scratch_bytes, dtype=torch.uint8)
        function(__file__, _NAMES[q.dtype], *_ARGUMENTS)(call, q, keys, values, out, scratch)


def is_available(dtype: torch.dtype, device: torch.device, width: int, value_width: int) -> bool:
    """Whether `PrefillRuns` can be used for such keys and values."""
    return (
        device.type == "cpu" and dtype in _NAMES and max(width, value_width) <= WIDEST and library(__file__) is not None
    )
