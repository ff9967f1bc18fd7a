"""Which of the base's attention layers turn queries and keys by our own kernels: those whose function they equal.

Such layers call a function of their module by name, so there is nothing to register and nothing to derive from. Each
gets its `forward` anew with our function under that name. The module, and other models of its class, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedModel

from loraplex.engines.native import compiled_ops
from loraplex.kernels.attention import cpu_rotary, rotary

_NAME = "apply_rotary_pos_emb"
_WIDTH, _TOKENS = 8, 3  # of what is tried

Rotary = Callable[..., Any]


def use_rotary_kernel(model: PreTrainedModel, *, uses_kernels: bool) -> int:
    """Let a kernel compute rotary embeddings where it gives the same numbers; in how many layers it does.

    `uses_kernels`: Triton's, or the one in C. Leaves everything as it is where no kernel is available.
    """
    if not uses_kernels and not cpu_rotary.is_available(model.dtype, model.device):
        return 0
    kernel = rotary if uses_kernels else cpu_rotary
    ours: dict[Rotary, Rotary | None] = {}
    replaced = 0
    for module in model.modules():
        forward = type(module).forward
        theirs = _named(forward)
        if theirs is None or "forward" in vars(module):
            continue
        if theirs not in ours:
            ours[theirs] = _faster(theirs, kernel) if _equals(theirs, kernel, model) else None
        if (faster := ours[theirs]) is not None:
            module.forward = _with(forward, faster).__get__(module)
            replaced += 1
    return replaced


def _named(forward: object) -> Rotary | None:
    """The function that is called by the name, within the wrappers that may be about it."""
    while isinstance(forward, FunctionType):
        if _NAME in forward.__code__.co_names:
            return forward.__globals__.get(_NAME)
        forward = getattr(forward, "__wrapped__", None)
    return None


@torch.inference_mode()
def _equals(theirs: Rotary, kernel: ModuleType, model: PreTrainedModel) -> bool:
    """Whether the kernel computes what the function does, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(1, *heads, _TOKENS, _WIDTH, generator=generator).to(model.device, model.dtype)
        for heads in ((2,), (1,), (), ())
    )
    try:
        expected = theirs(q, k, cos, sin)
    except Exception:  # noqa: BLE001  a model's own code, which may want other arguments, or other shapes
        return False
    return (
        isinstance(expected, tuple)
        and len(expected) == 2
        and all(map(torch.equal, expected, kernel.rotate(q, k, cos, sin)))
    )


def _faster(theirs: Rotary, kernel: ModuleType) -> Rotary:
    def ours(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs:
            if is_dynamo_compiling():  # which cannot follow `kernel`: by its name the function is transformers'
                if rotary.takes(q, k, *args):
                    return compiled_ops.rotate(q, k, *args)
            elif kernel.takes(q, k, *args):
                return kernel.rotate(q, k, *args)
        return theirs(q, k, *args, **kwargs)

    return ours


def _with(forward: Any, rotary: Rotary) -> FunctionType:
    """The same function, its wrappers about it, for which the name stands for another."""
    known, closure = forward.__globals__, forward.__closure__
    if _NAME in forward.__code__.co_names:
        known = {**known, _NAME: rotary}
    else:
        wrapped = forward.__wrapped__
        inner = CellType(_with(wrapped, rotary))
        closure = tuple(inner if cell.cell_contents is wrapped else cell for cell in closure)
    again = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, closure)
    again.__kwdefaults__ = forward.__kwdefaults__
    vars(again).update(vars(forward))
    return again
