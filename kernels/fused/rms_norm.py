"""Root-mean-square normalisation, with the residual added before it.

    s[t] = x[t] + residual[t]                                    (s = x without a residual)
    y[t, i] = weight[i] · s[t, i] / √(mean_i s[t, i]² + epsilon)

    x, residual: Shape [T, N].   weight: Shape [N].   y: Shape [T, N], type of x; s replaces residual in its place.

s is rounded to its type before it is normalised, as separate operations would do; the rest is in float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton_support import padded


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
    """y; a residual is changed in place to x + residual."""
    rows = x.view(-1, x.shape[-1])
    y = torch.empty_like(rows)
    _rms_norm[(rows.shape[0],)](
        y, rows, weight, residual if residual is not None else x, epsilon, rows.shape[1],
        HAS_RESIDUAL=residual is not None, BLOCK=padded(rows.shape[1]),
    )  # fmt: skip
    return y.view(x.shape)


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    y, x, weight, residual, epsilon, width, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    numbers = tl.arange(0, BLOCK)
    is_number = numbers < width
    values = tl.load(x + row + numbers, mask=is_number, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row + numbers, mask=is_number, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + row + numbers, rounded, mask=is_number)
        values = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + epsilon)
    scaled = values * inverse * tl.load(weight + numbers, mask=is_number, other=0.0).to(tl.float32)
    tl.store(y + row + numbers, scaled.to(y.dtype.element_ty), mask=is_number)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
    """The formula."""
    if residual is not None:
        x = residual.copy_((x.float() + residual.float()).to(residual.dtype))
    values = x.float()
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return (values * inverse * weight.float()).to(x.dtype)
