"""Adds many adapters' LoRA to one linear layer's output, in torch.

What is computed, for token t of adapter g = owner[t] (−1: base, nothing is added), whose rows in the stack are
first[g] … first[g + 1] − 1:

    y[t, :] += scale[g] · Σ_{r = first[g]}^{first[g+1] − 1} (Σ_i x[t, i] · a[r, i]) · b[r, :]

    x: Shape [T, in].   y: Shape [T, out], changed in place.
    a: Shape [R, in].   The adapters' A, one below the other.
    b: Shape [R, out].  The adapters' Bᵀ, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_grouped_reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, owner: Tensor, first: Sequence[int], scale: Sequence[float]
) -> None:
    """The formula, token by token. owner: Shape [T], int64. first: length G + 1. scale: length G."""
    for token, group in enumerate(owner.tolist()):
        if group >= 0:
            rows = slice(first[group], first[group + 1])
            y[token] += scale[group] * ((a[rows] @ x[token]) @ b[rows])


def add_masked(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> None:
    """All adapters in two GEMMs: mask[t, r] is scale[g] where row r belongs to token t's adapter g, else 0.

    mask: Shape [T, R], dtype of x. Cheapest where few tokens meet many adapters, as in decoding.
    """
    y.addmm_((x @ a.t()).mul_(mask), b)


def add_run(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Two GEMMs for tokens that all belong to one adapter. Cheapest where there are many, as in prefill."""
    y.addmm_(x @ a.t(), b, alpha=scale)


def owner_mask(owner: Tensor, row_owner: Tensor, row_scale: Tensor) -> Tensor:
    """The mask of `add_masked`. owner: Shape [T]. row_owner, row_scale: Shape [R]. Result: Shape [T, R]."""
    return torch.where(owner[:, None] == row_owner[None, :], row_scale[None, :], torch.zeros_like(row_scale[:1]))
