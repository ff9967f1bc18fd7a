"""Whole modules of adapters: the base's own parameters are never written to."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor, nn

from loraplex.engines.native.effects import _in_place


class _CopyingTable(MutableMapping[str, Tensor]):
    """A table of parameters like that of compressed-tensors: what is assigned is copied into what is there."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        with torch.no_grad():
            self._tensors[key].copy_(tensor)

    def __delitem__(self, key: str) -> None:
        del self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_parameters_put_in_place_leave_the_modules_own_untouched_in_a_table_that_copies() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    module._parameters = _CopyingTable(dict(module._parameters))  # type: ignore[assignment,arg-type]
    weight, before = module.weight, module.weight.clone()
    other, x = torch.randn(3, 3), torch.randn(2, 3)
    with _in_place({"weight": other}, module):
        torch.testing.assert_close(nn.Linear.forward(module, x), x @ other.t() + module.bias)
    assert module.weight is weight
    assert torch.equal(module.weight, before)
