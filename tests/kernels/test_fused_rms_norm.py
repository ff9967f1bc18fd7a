"""`rms_norm` against its formula and transformers' own module."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplex.kernels.fused.rms_norm import rms_norm, rms_norm_reference

# One rounding of y: half a unit in the last place; float32 adds in another order. Triton's interpreter cuts bfloat16
# off where the GPU rounds it, which makes one unit of it for s, and another for y.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [16, 100, 576])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_equals_the_formula(dtype: torch.dtype, width: int, has_residual: bool) -> None:
    x, residual = (torch.randn(5, width).mul(3).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.randn(width).to(dtype).to(DEVICE)
    mine, theirs = (residual.clone(), residual.clone()) if has_residual else (None, None)
    found, expected = rms_norm(x, weight, 1e-5, mine), rms_norm_reference(x, weight, 1e-5, theirs)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=1e-5)
    if has_residual:
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCES[dtype] / 2, atol=0)


def test_rms_norm_equals_transformers() -> None:
    theirs = LlamaRMSNorm(48, eps=1e-6).to(DEVICE)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(2, 3, 48, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, theirs.weight, 1e-6), theirs(x))
