"""Which of a model's normalisations the kernel computes, and that none is replaced by another formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixes import DEVICE
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplex.engines.native.norms import use_norm_kernel
from loraplex.kernels.fused.cpu_rms_norm import is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu")), reason="the kernel was not built: no compiler"
)


class Normed(nn.Module):
    """What `use_norm_kernel` wants to know of a model, and some modules."""

    def __init__(self, *norms: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(norms)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.to(dtype)
        self.dtype, self.device = dtype, torch.device("cpu")


class OtherEpsilon(LlamaRMSNorm):
    """The root is taken first."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        root = hidden_states.float().square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (hidden_states.float() / root).to(hidden_states.dtype)


class Gated(LlamaRMSNorm):
    """Of two inputs, as some mixers have it."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states * gate)


class GatedByName(LlamaRMSNorm):
    """The second input looks as if it could be left out."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states) * gate.float()  # type: ignore[union-attr]


class Grouped(LlamaRMSNorm):
    """Each half by itself."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        halves = hidden_states.view(*hidden_states.shape[:-1], 2, -1)
        return self.weight * nn.functional.rms_norm(halves, halves.shape[-1:], eps=self.variance_epsilon).flatten(-2)


def replaced(model: Normed, *, uses_kernels: bool = False) -> int:
    return use_norm_kernel(model, uses_kernels=uses_kernels)  # type: ignore[arg-type]


def a_norm(kind: Any) -> nn.Module:
    norm: nn.Module = kind(48, eps=1e-5)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm])
def test_norms_of_every_form_are_computed_as_before(kind: Any, dtype: torch.dtype) -> None:
    model, x = Normed(a_norm(kind), dtype=dtype), torch.randn(2, 5, 48).to(dtype)
    norm = model.norms[0]
    expected = norm(x)
    assert replaced(model) == 1
    assert "forward" in vars(norm)
    # a quotient may round the other way, and its product after it
    torch.testing.assert_close(norm(x), expected, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=1e-6)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norms_are_computed_by_triton_where_it_is_used(kind: Any) -> None:
    model, x = Normed(a_norm(kind)).to(DEVICE), torch.randn(2, 5, 48).to(DEVICE)
    norm = model.norms[0]
    expected = norm(x)
    assert replaced(model, uses_kernels=True) == 1
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [OtherEpsilon, Gated, GatedByName, Grouped, nn.LayerNorm])
def test_another_formula_is_left_alone(kind: Any) -> None:
    model = Normed(a_norm(kind))
    assert replaced(model) == 0
    assert "forward" not in vars(model.norms[0])


def test_rows_of_another_type_go_the_old_way() -> None:
    model, x = Normed(a_norm(LlamaRMSNorm)), torch.randn(3, 48).half()
    norm = model.norms[0]
    expected = norm(x)
    replaced(model)
    assert torch.equal(norm(x), expected)


def test_weights_of_another_type_than_the_model_are_no_obstacle() -> None:
    """Llama's norm in float32 within a model in bfloat16 gives float32: that is not what the kernel gives."""
    model = Normed(a_norm(LlamaRMSNorm), dtype=torch.bfloat16)
    model.norms[0].float()
    assert replaced(model) == 0


def test_types_the_kernel_does_not_know_are_left_alone() -> None:
    assert replaced(Normed(a_norm(LlamaRMSNorm), dtype=torch.float16)) == 0
