"""Tensors on a device that is not there: torch refuses them beside those of the CPU, until they are copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

_aten = torch.ops.aten


class Elsewhere(Tensor):
    """Numbers in host memory that are said to lie on another device, `meta`, which torch has everywhere."""

    _numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), dtype=numbers.dtype, device=torch.device("meta")
        )
        made._numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raises RuntimeError as on CUDA."""
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if func is not _aten.copy_.default and any(not isinstance(value, cls) and value.dim() for value in given):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices: {func}")
        args, named = tree_map(lambda value: value._numbers if isinstance(value, cls) else value, (args, kwargs or {}))
        found = func(*args, **named)
        if func is _aten._to_copy.default and named.get("device") == torch.device("cpu"):
            return found
        return tree_map(lambda value: cls(value) if isinstance(value, Tensor) else value, found)
