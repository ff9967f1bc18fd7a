"""What our hooks compute within a model, as operations that torch.compile takes for what they are: opaque.

A hook depends on the step, which lies in an object of its own; traced, it would be compiled anew for every step. So
while a layer is traced each hook calls the operation of its kind here instead, whose body calls back the hook's own
function, found by a handle. A handle is a tensor, not a number, for a graph holds for other values of its inputs:
layers that differ in nothing but their tensors share one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from loraplex.kernels.attention import cpu_rotary, rotary

_functions: WeakValueDictionary[int, Callable[..., Any]] = WeakValueDictionary()
_NO_MODULE = nn.Module()
_numbers = itertools.count()


def handle_of(function: Callable[..., Any]) -> Tensor:
    """By which operations find the function, as long as something else keeps it alive. Shape [], int64, on the CPU."""
    number = next(_numbers)
    _functions[number] = function
    return torch.tensor(number)


@torch.library.custom_op("loraplex::map_rows", mutates_args=())
def map_rows(x: Tensor, width: int, handle: Tensor) -> Tensor:
    """function(x). x: Shape [..., N]. Result: Shape [..., width], of the type of x."""
    rows: Tensor = _functions[int(handle)](x)
    return rows.contiguous()


@map_rows.register_fake
def _(x: Tensor, width: int, handle: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("loraplex::combine_rows", mutates_args=())
def combine_rows(one: Tensor, other: Tensor, handle: Tensor) -> Tensor:
    """function(one, other). one, other and result: Shape [..., N], of one type."""
    rows: Tensor = _functions[int(handle)](one, other)
    return rows.contiguous()


@combine_rows.register_fake
def _(one: Tensor, other: Tensor, handle: Tensor) -> Tensor:
    return one.new_empty(one.shape)


@torch.library.custom_op("loraplex::add_to_rows", mutates_args=("y",))
def add_to_rows(y: Tensor, x: Tensor, handle: Tensor) -> None:
    """function(y, x), which adds to y what it makes of x. y: Shape [..., M]. x: Shape [..., N]."""
    _functions[int(handle)](y, x)


def followed_by(
    forward: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], None]
) -> Callable[[Tensor], Tensor]:
    """forward(x), changed by add(y, x). x: Shape [..., N]. y, the result: Shape [..., M]."""
    handle = handle_of(add)

    def forward_and_add(x: Tensor) -> Tensor:
        y = forward(x)
        if is_dynamo_compiling():
            add_to_rows(y, x, handle)
        else:
            add(y, x)
        return y

    return forward_and_add


@torch.library.custom_op("loraplex::rotate", mutates_args=())
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotary.rotate`."""
    return cpu_rotary.rotate(q, k, cos, sin) if q.device.type == "cpu" else rotary.rotate(q, k, cos, sin)


@rotate.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rotated_q, rotated_k = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    return rotated_q, rotated_k


# The step's calls are counted and the cache is written, which no argument shows. The handle does: said to be changed,
# it keeps all calls of one model, and keeps them in the order in which the model makes them.
@torch.library.custom_op("loraplex::attend", mutates_args=("handle",))
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`PagedAttention.__call__`, which is found by the handle, without a mask. Result: Shape [1, T, H, Dv]."""
    out: Tensor = _functions[int(handle)](_NO_MODULE, query, key, value, None, scaling, 0.0, window, softcap, sinks)[0]
    return out.contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
