"""Copies of the base's weights in adapters' files: those that are the base's are left out, all others are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.extras import ExtraPlan, read_extras
from loraplex.engines.errors import AdapterUnsupported

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)


def weight() -> Tensor:
    """Shape [500, 64]; of embeddings' usual size, some rows too small for float16, one of noughts."""
    torch.manual_seed(0)
    rows = torch.randn(500, 64) * 0.02
    rows[7:20] *= 1e-7
    rows[5] = 0
    return rows


def compare(own: Tensor, ours: Tensor) -> None:
    """Raises AdapterUnsupported where the file's is no copy of the base's."""
    plan = ExtraPlan((), (), {"own": "ours"}, {}, {}, 0)
    pieces.exhaust(read_extras(plan, torch.empty(0), {"own": own}.__getitem__, {"ours": ours}.__getitem__))


@pytest.mark.parametrize(("checkpoint", "engine", "trainer"), list(product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_copy_of_the_same_checkpoint_is_accepted_whatever_either_side_rounded_it_to(
    checkpoint: torch.dtype, engine: torch.dtype, trainer: torch.dtype
) -> None:
    told = weight().to(checkpoint)
    compare(told.to(trainer), told.to(engine))
    compare(told.to(trainer).float(), told.to(engine))  # what was trained in half precision, saved in float32


def _all_a_little(tensor: Tensor) -> Tensor:
    return tensor * (1 + 2**-10)


def _all_below_a_hundredth(tensor: Tensor) -> Tensor:
    return tensor * 1.0075


def _one_unit(tensor: Tensor) -> Tensor:
    """Of one number, in the last place of bfloat16."""
    tensor[300, 3] = (tensor[300, 3].bfloat16().view(torch.int16) + 1).view(BF16)
    return tensor


def _two_units(tensor: Tensor) -> Tensor:
    return _one_unit(_one_unit(tensor))


@pytest.mark.parametrize(
    ("engine", "file", "change"),
    [
        (F32, F32, _all_a_little),
        (F32, F32, _one_unit),
        (F32, BF16, _one_unit),
        (F32, F16, _all_a_little),
        (BF16, BF16, _one_unit),
        (BF16, BF16, _all_below_a_hundredth),
        (BF16, F32, _all_below_a_hundredth),
        (F16, F16, _all_a_little),
        (BF16, F16, _two_units),
        (F16, BF16, _two_units),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_copy_that_was_trained_is_refused(
    engine: torch.dtype, file: torch.dtype, change: Callable[[Tensor], Tensor]
) -> None:
    told = weight()
    with pytest.raises(AdapterUnsupported, match="own differs from the base's"):
        compare(change(told.to(file).clone()), told.to(engine))


def test_other_signs_are_told_apart() -> None:
    told = weight()
    told[300, 3] *= -1
    with pytest.raises(AdapterUnsupported):
        compare(told.half(), weight().bfloat16())
