"""Whether two tensors say the same weights, piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.pieces import Pieces

_HALVES = (torch.bfloat16, torch.float16)  # the coarser one first
_SMALLEST = 2.0**-24  # above nought, in float16


def are_equal(one: Tensor, other: Tensor) -> Pieces[bool]:
    """NaN equals NaN: what is not finite is refused elsewhere."""
    for rows in pieces.slices(one):
        if not torch.equal(one[rows], other[rows]) and not torch.allclose(one[rows], other[rows], 0, 0, equal_nan=True):
            return False
        yield
    return True


def are_same(own: Tensor, ours: Tensor) -> Pieces[bool]:
    """Whether the file's tensor is a copy of the base's, as far as the coarser of their two formats can tell.

    One of the two was rounded once more than the other, so rounding that one to the coarser format gives the other.
    Only between the two half formats is it otherwise, as either may have been rounded from float32 by itself: those
    copies are a unit in bfloat16's last place apart at most. What is too small for float16 may be nought in it.
    """
    own_format = yield from _format_of(own)
    formats = {own_format, ours.dtype}
    coarse = next((dtype for dtype in _HALVES if dtype in formats), torch.float32)
    num_units = 1 if formats == {*_HALVES} else 0
    may_differ = num_units > 0 or own_format != own.dtype
    for rows in pieces.slices(ours):
        one, other = own[rows].to(coarse), ours[rows].float().cpu().to(coarse)
        if not (torch.equal(one, other) or (may_differ and _are_near(one, other, num_units))):
            return False
        yield
    return True


def _format_of(tensor: Tensor) -> Pieces[torch.dtype]:
    """What the numbers were rounded to: files of float32 are also written from models in half precision."""
    if tensor.dtype != torch.float32:
        return tensor.dtype
    for dtype in _HALVES:
        for rows in pieces.slices(tensor):
            if not torch.equal(tensor[rows].to(dtype).float(), tensor[rows]):
                break
            yield
        else:
            return dtype
    return torch.float32


def _are_near(one: Tensor, other: Tensor, num_units: int) -> bool:
    """Of two tensors in half precision: numbers of one sign are as many units apart as their bits, read as integers."""
    apart = (one.view(torch.int16).int() - other.view(torch.int16).int()).abs()
    return bool(((apart <= num_units) | ((one.float() - other.float()).abs() <= _SMALLEST)).all())
