"""`gated` against its formula and transformers' activations."""

from __future__ import annotations

import pytest
import torch
from support.mixes import DEVICE
from transformers.activations import ACT2FN

from loraplex.kernels.fused.gated import Activation, gated, gated_reference

NAMES: list[tuple[Activation, str]] = [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]


@pytest.mark.parametrize(("activation", "name"), NAMES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_gated_equals_the_formula(activation: Activation, name: str, dtype: torch.dtype, rtol: float) -> None:
    """Rounded once in both: they differ by the last bit where the exponentials do, and where 1 + erf(g) is nearly 0."""
    gate, up = (torch.randn(7, 333).mul(4).to(dtype).to(DEVICE) for _ in range(2))
    found = gated(gate, up, activation)
    torch.testing.assert_close(found, gated_reference(gate, up, activation), rtol=rtol, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(found, ACT2FN[name](gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (1, 1, 40), (3, 2100)])
def test_halves_of_one_tensor_are_read_where_they_lie(shape: tuple[int, ...]) -> None:
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).to(DEVICE).chunk(2, dim=-1)
    found = gated(gate, up, "silu")
    assert found.is_contiguous()
    assert torch.equal(found, gated(gate.contiguous(), up.contiguous(), "silu"))
