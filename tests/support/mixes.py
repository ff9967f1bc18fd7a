"""The five mixes of adapters that workloads come in, and random adapters in one buffer for the kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from loraplex.kernels.lora.table import AdapterTable

MIXES = ("distinct", "uniform", "zipf", "identical", "skewed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALIGNMENT = 32  # elements between matrices, so that what is read beyond one is seen
_EXPONENTS = {"uniform": 0.0, "zipf": 1.0, "skewed": 1.5}


def owners(mix: str, num_adapters: int, num_tokens: int) -> list[int]:
    """Which adapter each token belongs to; −1 is the base."""
    groups = [-1, *range(num_adapters)]
    if mix == "distinct":
        return [groups[token % len(groups)] for token in range(num_tokens)]
    if mix == "identical":
        return [num_adapters // 2] * num_tokens
    weights = [1 / k ** _EXPONENTS[mix] for k in range(1, len(groups) + 1)]
    return random.Random(3).choices(groups, weights, k=num_tokens)


def random_table(
    ranks: Sequence[Sequence[int]],
    widths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    dora: Sequence[int] = (),
) -> AdapterTable:
    """Adapters with ranks[slot][module] on modules of widths[module] = (in, out); those in `dora` have gains.

    What lies between the matrices is NaN.
    """
    generator = torch.Generator().manual_seed(11)
    parts: list[torch.Tensor] = [torch.full((ALIGNMENT,), float("nan"))]
    end = ALIGNMENT

    def put(*shape: int) -> int:
        nonlocal end
        begin, size = end, shape[0] * (shape[1] if len(shape) > 1 else 1)
        parts.append(torch.randn(size, generator=generator) / 8)
        parts.append(torch.full((ALIGNMENT + -size % ALIGNMENT,), float("nan")))
        end += size + len(parts[-1])
        return begin

    places: dict[tuple[int, int], tuple[int, int, int]] = {}
    for slot, row in enumerate(ranks):
        for module, rank in enumerate(row):
            if rank:
                width_in, width_out = widths[module]
                places[slot, module] = put(rank, width_in), put(rank, width_out), put(width_out) if slot in dora else -1
    table = AdapterTable.empty(torch.cat(parts).to(dtype).to(DEVICE), len(ranks), len(widths))
    for (slot, module), (a, b, gain) in places.items():
        table.a[slot, module], table.b[slot, module], table.gain[slot, module] = a, b, gain
        table.rank[slot, module] = ranks[slot][module]
        table.scale[slot, module] = 0.5 + slot / 4
    return table
