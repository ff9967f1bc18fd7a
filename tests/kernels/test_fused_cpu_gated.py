"""The gate in C against the formula and torch's own operations: any rows and widths, both types, every activation."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loraplex.kernels.fused.cpu_gated import Gate, gated_reference, is_available
from loraplex.kernels.fused.gated import Activation

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
BY_TORCH: dict[Activation, Any] = {
    "silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}  # fmt: skip
# float32: a few units in the last of 24 bits. bfloat16: half a unit in the last of 8 bits for each of two roundings.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}

pytestmark = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="the kernel was not built: no compiler")


def pair(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(*shape, generator=generator) for _ in range(2))
    return (gate * scale).to(dtype), up.to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1,), (1, 1), (3, 17), (2, 3, 100), (48, 1537)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_gate_equals_the_formula(
    dtype: torch.dtype, activation: Activation, shape: tuple[int, ...], scale: float, threads: int
) -> None:
    """Where 1 + erf or 1 + tanh is nearly 0, as far as float32 can tell."""
    gate, up = pair(*shape, dtype=dtype, scale=scale)
    y = Gate(activation, dtype)(gate, up)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), gated_reference(gate, up, activation), rtol=TOLERANCES[dtype], atol=5e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_number_is_as_true_as_torchs(activation: Activation) -> None:
    """Against float64, from −100 to 100: a few units in the last place, of what is not nearly 0."""
    gate = torch.linspace(-100, 100, 400_001)
    gate = torch.cat((gate, gate / 1e3))
    one = torch.ones_like(gate)
    expected = gated_reference(gate, one, activation)
    ours, theirs = Gate(activation, torch.float32)(gate, one), BY_TORCH[activation](gate)
    error, allowed = (ours.double() - expected).abs(), (theirs.double() - expected).abs()
    assert error.max() <= 1.5 * allowed.max()
    assert (error <= 4e-6 * expected.abs() + 1e-8).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_rounds_where_torch_does(activation: Activation) -> None:
    """An activation that is a unit off in float32 seldom rounds the other way, unless torch has lost it altogether."""
    gate, up = pair(64, 576, dtype=torch.bfloat16)
    found = Gate(activation, torch.bfloat16)(gate, up)
    expected = BY_TORCH[activation](gate) * up
    assert (found != expected)[gate > -2].float().mean() < 1e-3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_is_the_same_in_any_company_to_the_last_bit(
    dtype: torch.dtype, activation: Activation, threads: int
) -> None:
    gating, (gate, up) = Gate(activation, dtype), pair(130, 603, dtype=dtype)
    together = gating(gate, up)
    for begin, end in ((0, 1), (5, 7), (60, 130), (129, 130)):
        assert torch.equal(gating(gate[begin:end], up[begin:end]), together[begin:end])


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (1, 1, 40), (1, 7, 40)])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_may_lie_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As halves of one tensor, or otherwise."""
    gating = Gate("silu", dtype)
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype).chunk(2, dim=-1)
    expected = gating(gate.contiguous(), up.contiguous())
    assert torch.equal(gating(gate, up), expected)
    assert torch.equal(gating(gate, up.contiguous()), expected)
    assert torch.equal(gating(gate.transpose(0, -1), up.transpose(0, -1)), expected.transpose(0, -1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_in_its_place(activation: Activation) -> None:
    gate, up = pair(4, 40, dtype=torch.float32)
    gate[1, 2], up[3, 0] = float("nan"), float("nan")
    found = Gate(activation, torch.float32)(gate, up)
    assert found.isnan().nonzero().tolist() == [[1, 2], [3, 0]]
    gate[:] = torch.tensor([1e30, float("inf"), -1e30, 0.0]).repeat(10)
    found = Gate(activation, torch.float32)(gate, torch.ones_like(gate))
    assert found[0, :2].tolist() == [torch.tensor(1e30).item(), float("inf")]
    assert found[0, 2:4].abs().max() < 1e-7


def test_kernel_is_for_cpus_and_types_it_knows() -> None:
    assert not is_available(torch.float16, CPU)
    assert not is_available(torch.float32, torch.device("cuda"))


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (torch.ones(2, 40), torch.ones(2, 40).bfloat16()),
        (torch.ones(2, 40), torch.ones(2, 40)),
        (torch.ones(2, 40).bfloat16(), torch.ones(1, 40).bfloat16()),
    ],
    ids=["types", "type", "shape"],
)
def test_another_type_or_two_shapes_are_refused(gate: Tensor, up: Tensor) -> None:
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        Gate("silu", torch.bfloat16)(gate, up)
