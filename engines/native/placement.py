"""Weights of linear layers where a CPU reads them fastest: each from a cache line on, in large pages.

A checkpoint's file puts a tensor wherever the one before it ends, so that nearly every load meets two lines, and is
mapped in pages of 4 KiB, each of which a step would have to look up. What is copied here is what steps read; embeddings
that no layer shares, of which a step reads a few rows, stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from loraplex.engines.pages import give_back, in_large_pages

_LINE = 64  # bytes


def place_weights(model: nn.Module, layers: Iterable[nn.Module]) -> int:
    """Move those of the model's layers that steps use, where they are plain tensors of a CPU.

    Result: how many bytes. What shares memory with another tensor of the model's stays where it is.
    """
    overlapping = _overlapping([*model.parameters(), *model.buffers()])
    found = [getattr(layer, "weight", None) for layer in layers]
    weights = {id(weight): weight for weight in found if isinstance(weight, nn.Parameter)}
    moved = [weight for key, weight in weights.items() if key not in overlapping and _can_move(weight)]
    size = sum(map(_rounded, moved))
    if not size:
        return 0
    memory = in_large_pages(size)
    begin = 0
    for weight in moved:
        place = memory[begin : begin + weight.nbytes].view(weight.dtype).view(weight.shape)
        begin += _rounded(weight)
        before, weight.data = weight.data, place.copy_(weight.data)
        give_back(before)  # a file stays mapped as long as anything in it is used
    return size


def _overlapping(tensors: list[Tensor]) -> set[int]:
    """The ids of those that have memory in common with another."""
    ordered = sorted((tensor for tensor in tensors if _can_move(tensor)), key=Tensor.data_ptr)
    found: set[int] = set()
    farthest = 0, 0  # the end of what lies before, and whose it is
    for tensor in ordered:
        if tensor.data_ptr() < farthest[0]:
            found |= {id(tensor), farthest[1]}
        farthest = max(farthest, (tensor.data_ptr() + tensor.nbytes, id(tensor)))
    return found


def _can_move(weight: Tensor) -> bool:
    """Weights that a model makes up in its first step, as some quantised ones do, are inference tensors: they stay."""
    if weight.device.type != "cpu" or weight.is_inference():
        return False
    return type(weight.data) is Tensor and weight.is_contiguous()


def _rounded(weight: Tensor) -> int:
    return -(-weight.nbytes // _LINE) * _LINE
