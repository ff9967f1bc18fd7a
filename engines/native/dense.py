"""Which of the base's linear layers our own kernel computes: measured at start, because it depends on the machine.

Where a CPU has no instructions for bfloat16, torch multiplies it several times slower than memory could be read; and
few tokens at a time waste most of what a library for large matrices does (`bench/kernel_table.py --ops dense/linear`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from transformers import PreTrainedModel

from loraplex.engines.native.compiled_ops import handle_of, map_rows
from loraplex.engines.native.timing import least_seconds
from loraplex.kernels import calls
from loraplex.kernels.built import Argument, Kernel, listening
from loraplex.kernels.dense.linear import Linear, Panels, is_available

_TRIED = (1, 4, 8, 16, 32, 96)  # tokens: decodes of one and of several sequences, a chunk of a prompt
_ENOUGH = 64 * 2**20  # bytes of weights: more than caches keep, for a step reads each weight once
_TIE = 1.1  # times torch's seconds that ours may take: a token alone reads weights and little else, whoever multiplies
_MANY, _WIDTH = 96, 1024  # tokens and features of a GEMM by which a type is judged
_SLOWER = 2.0  # than float32, which takes twice the bytes


def use_dense_kernel(
    model: PreTrainedModel, panels: Mapping[nn.Module, Panels] = MappingProxyType({}), *, always: bool = False
) -> range:
    """Let the kernel compute plain linear layers for as many tokens as torch is not faster for. Result: those numbers.

    To be called before anything else wraps the layers. Leaves everything as it is where the kernel is not available.
    `panels`: the weights that are packed; those in int8 are for any number of tokens. `always`: so are all others, so
    that every start gives the same bits, whatever it would have measured.
    """
    layers = {
        layer: Linear(layer.weight, layer.bias, panels.get(layer))
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and is_plain(layer)
    }
    rounded = {layer for layer in layers if layer in panels and panels[layer].scales is not None}
    measured = {layer: linear for layer, linear in layers.items() if layer not in rounded}
    numbers = range(sys.maxsize) if always else _numbers_of_tokens(_sample(measured)) if measured else range(0)
    for layer, linear in layers.items():
        if own := range(sys.maxsize) if layer in rounded else numbers:
            _replace_forward(layer, linear, own)
    return numbers


def multiplies_well(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's GEMM of many tokens is worth having: not where the CPU multiplies the type number by number."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    x, weight = torch.randn(_MANY, _WIDTH), torch.randn(_WIDTH, _WIDTH)
    wide = _seconds([partial(functional.linear, weight=weight)], x)
    return _seconds([partial(functional.linear, weight=weight.to(dtype))], x.to(dtype)) < _SLOWER * wide


def is_plain(layer: nn.Linear) -> bool:
    """Exactly torch's, of a type the kernel knows: quantised ones derive from it, or have a forward of their own."""
    return (
        type(layer).forward is nn.Linear.forward
        and "forward" not in vars(layer)
        and type(layer.weight.data) is Tensor
        and layer.weight.is_contiguous()
        and is_available(layer.weight.dtype, layer.weight.device)
        and (layer.bias is None or layer.bias.dtype == layer.weight.dtype)
    )


def _sample(layers: Mapping[nn.Linear, Linear]) -> dict[nn.Linear, Linear]:
    """Those for inputs of one width and type, with as many weights as a step would not find in a cache."""
    like = next(iter(layers)).weight
    sample: dict[nn.Linear, Linear] = {}
    for layer, linear in layers.items():
        if layer.in_features == like.shape[1] and layer.weight.dtype == like.dtype:
            sample[layer] = linear
        if sum(chosen.weight.nbytes for chosen in sample) >= _ENOUGH:
            break
    return sample


def _numbers_of_tokens(layers: Mapping[nn.Linear, Linear]) -> range:
    """Those that the kernel is for: upwards until torch is faster, which it may be for a token alone."""
    kernels, weights = [*layers.values()], [layer.weight for layer in layers]
    theirs = [partial(functional.linear, weight=weight) for weight in weights]
    least, most = _TRIED[0], 0
    for num_tokens in _TRIED:
        x = torch.randn(num_tokens, weights[0].shape[1]).to(weights[0].dtype)
        if _seconds(_as_replayed(kernels, x), x) <= _TIE * _seconds(theirs, x):
            most = num_tokens
        elif num_tokens == _TRIED[0]:
            least = num_tokens + 1
        else:
            return range(least, most + 1)
    return range(least, sys.maxsize)


def _as_replayed(kernels: Sequence[Linear], x: Tensor) -> Sequence[Callable[[Tensor], object]]:
    """The calls that they make of x, without the Python around each: as a captured step makes them, and most are."""
    if not calls.is_available():
        return kernels
    made: list[tuple[Kernel, tuple[Argument, ...]]] = []
    with listening(lambda kernel, arguments: made.append((kernel, arguments))):
        for kernel in kernels:
            kernel(x)
    together = calls.Calls(made)
    return [lambda x: together()]


@torch.inference_mode()
def _seconds(layers: Sequence[Callable[[Tensor], object]], x: Tensor) -> float:
    return least_seconds(lambda: [layer(x) for layer in layers])


def _replace_forward(layer: nn.Module, linear: Linear, numbers: range) -> None:
    theirs: Callable[[Tensor], Tensor] = layer.forward

    def compute(x: Tensor) -> Tensor:
        return linear(x) if x.numel() // linear.in_features in numbers else theirs(x)

    def forward(x: Tensor) -> Tensor:
        return map_rows(x, width, handle) if is_dynamo_compiling() else compute(x)

    handle, width = handle_of(compute), layer.out_features
    layer.forward = forward
