"""Weights of linear layers where a CPU reads them fastest: from a cache line on, in large pages, some of them packed.

A checkpoint's file puts a tensor wherever the one before it ends, so that nearly every load meets two lines, and is
mapped in pages of 4 KiB, each of which a step would have to look up. What is copied here is what steps read; embeddings
that no layer shares, of which a step reads a few rows, stay where they are.

Where the CPU multiplies panels faster than rows (`panels.h` of the dense kernel), weights that lie in a file as it is
are packed. The file then answers whoever asks for the weight itself, as DoRA does once for an adapter: its pages take
no memory that others need. Weights that are to be rounded are packed wherever they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from loraplex.engines.native.dense import is_plain
from loraplex.engines.pages import give_back, in_large_pages, unwritten_files
from loraplex.kernels.dense.linear import Panels, int8_size, pack, panels_size, round_and_pack

_LINE = 64  # bytes


def place_weights(
    model: nn.Module, layers: Iterable[nn.Module], rounded: Collection[nn.Module] = ()
) -> dict[nn.Module, Panels]:
    """Move those of the model's layers that steps use, where they are plain tensors of a CPU, or pack them.

    `rounded`: those that are packed in int8. Result: the panels of all that were packed. What shares memory with
    another tensor of the model's is not moved.
    """
    used, files = [*layers], unwritten_files()
    linear = [layer for layer in used if isinstance(layer, nn.Linear)]
    packed = {layer: layer.weight.data for layer in linear if layer in rounded or _is_packed(layer, files)}
    overlapping = _overlapping([*model.parameters(), *model.buffers()])
    found = [getattr(layer, "weight", None) for layer in used if layer not in packed]
    weights = {id(weight): weight for weight in found if isinstance(weight, nn.Parameter)}
    moved = [weight for key, weight in weights.items() if key not in overlapping and _can_move(weight)]
    sizes = [(int8_size if layer in rounded else panels_size)(weight) for layer, weight in packed.items()]
    places = _places([*sizes, *(weight.nbytes for weight in moved)])
    panels: dict[nn.Module, Panels] = {}
    for layer, weight in packed.items():
        place = next(places)
        if layer in rounded:
            panels[layer] = Panels(place, round_and_pack(weight, place))
        else:
            pack(weight, place)
            panels[layer] = Panels(place)
        if _is_in(weight, files):
            give_back(weight)
    for weight in moved:
        before, weight.data = weight.data, next(places).view(weight.dtype).view(weight.shape).copy_(weight.data)
        give_back(before)  # a file stays mapped as long as anything in it is used
    return panels


def _places(sizes: Sequence[int]) -> Iterator[Tensor]:
    """Memory for each of so many bytes, in whole lines."""
    rounded = [-(-size // _LINE) * _LINE for size in sizes]
    memory = torch.split(in_large_pages(sum(rounded)), rounded)
    return (place[:size] for place, size in zip(memory, sizes, strict=True))


def _is_packed(layer: nn.Linear, files: Sequence[range]) -> bool:
    """Where that is faster, and a file keeps the weight for whoever asks for it."""
    return is_plain(layer) and panels_size(layer.weight) > 0 and _is_in(layer.weight, files)


def _is_in(weight: Tensor, files: Sequence[range]) -> bool:
    first = weight.data_ptr()
    return any(first in file and first + weight.nbytes - 1 in file for file in files)


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
