"""Which linear layers the kernel computes, and for how many tokens."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from loraplex.engines.native import dense
from loraplex.engines.native.dense import multiplies_well, use_dense_kernel
from loraplex.kernels.built import Argument, listening
from loraplex.kernels.dense.linear import Linear, is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu")), reason="the kernel was not built: no compiler"
)


class Scaled(nn.Linear):
    """A layer with a forward pass of its own, as quantised ones have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def a_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), Scaled(48, 48), nn.Linear(48, 16, bias=False).half().float())


def torch_takes(monkeypatch: pytest.MonkeyPatch, *ratios: float) -> None:
    """How much longer than what is timed before it, for each of the pairs; nothing may be timed beyond."""
    timings = iter([timing for ratio in ratios for timing in (1.0, ratio)])
    monkeypatch.setattr(dense, "_seconds", lambda layers, x: next(timings))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((2, 2, 2, 2, 2, 2), range(1, sys.maxsize)),
        ((2, 2, 2, 2, 0.5), range(1, 17)),
        ((2, 0.5), range(1, 2)),
        ((0.95, 0.5), range(1, 2)),  # a tie
        ((0.5, 2, 2, 2, 2, 2), range(2, sys.maxsize)),  # where torch is faster for a token alone
        ((0.5, 2, 0.5), range(2, 5)),
        ((0.5, 0.5), range(0)),
    ],
)
def test_kernel_computes_as_many_tokens_as_it_is_faster_for(
    monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, ...], expected: range
) -> None:
    torch_takes(monkeypatch, *ratios)
    model = a_model()
    theirs = a_model()
    assert use_dense_kernel(model) == expected
    for num_tokens in (1, 2, 16, 17):
        x = torch.randn(num_tokens, 32)
        wanted = Linear(theirs[0].weight, theirs[0].bias)(x) if num_tokens in expected else theirs[0](x)
        assert torch.equal(model[0](x), wanted)
        torch.testing.assert_close(model(x), theirs(x))


def test_nothing_is_timed_where_every_start_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_takes(monkeypatch)
    model, theirs = a_model(), a_model()
    assert use_dense_kernel(model, always=True) == range(sys.maxsize)
    x = torch.randn(130, 32)
    assert torch.equal(model[0](x), Linear(theirs[0].weight, theirs[0].bias)(x))


def test_kernels_are_timed_as_captured_steps_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls over the same memory, without the layers' Python."""
    heard: list[tuple[Argument, ...]] = []
    kernels = [Linear(torch.randn(48, 32)), Linear(torch.randn(16, 32))]
    x = torch.randn(3, 32)
    with listening(lambda kernel, arguments: heard.append(arguments)):
        [together] = dense._as_replayed(kernels, x)
    expected = [kernel(x) for kernel in kernels]
    written = [argument for arguments in heard for argument in arguments[2:3] if isinstance(argument, torch.Tensor)]
    for y in written:
        y.zero_()
    monkeypatch.setattr(Linear, "__call__", None)
    together(x)
    assert [torch.equal(y, wanted) for y, wanted in zip(written, expected, strict=True)] == [True, True]


def test_layers_of_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_takes(monkeypatch, 2, 0.5)
    model = a_model()
    model.append(nn.Linear(16, 16))
    model[3].forward = theirs = torch.relu  # compressed-tensors rounds activations so
    use_dense_kernel(model)
    assert "forward" not in vars(model[1])
    assert "forward" in vars(model[2])
    assert model[3].forward is theirs


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4).half()), nn.Sequential(nn.Embedding(4, 4))])
def test_model_without_a_layer_for_the_kernel_is_left_as_it_is(model: Any) -> None:
    assert not use_dense_kernel(model)
    assert all("forward" not in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, True), (1.9, True), (8.0, False)])
def test_gemm_of_a_type_is_judged_by_that_of_float32(
    monkeypatch: pytest.MonkeyPatch, ratio: float, expected: bool
) -> None:
    torch_takes(monkeypatch, ratio)
    assert multiplies_well(torch.bfloat16, torch.device("cpu")) is expected


def test_gemm_of_float32_and_on_devices_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_takes(monkeypatch)
    assert multiplies_well(torch.float32, torch.device("cpu"))
    assert multiplies_well(torch.bfloat16, torch.device("cuda"))
