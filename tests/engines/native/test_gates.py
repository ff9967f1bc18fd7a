"""Which MLPs have their gate computed by the kernel, that nothing else changes, and that other forms are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.core import make_core
from support.mixes import DEVICE
from support.worlds import SmallWorld
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from loraplex.engines.native.capture import Capture, Pool
from loraplex.engines.native.gates import use_gate_kernel
from loraplex.kernels.built import listening
from loraplex.kernels.fused.cpu_gated import is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu")), reason="the kernel was not built: no compiler"
)

WIDTH = 32
SMALL = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-6}


def a_model(kind: str, dtype: torch.dtype = torch.float32, **other: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **other})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


class Holding(nn.Module):
    """What `use_gate_kernel` wants to know of a model, and one module."""

    def __init__(self, mlp: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mlp = mlp
        self.to(dtype).eval()
        self.dtype, self.device = dtype, torch.device("cpu")


def replaced(model: nn.Module, *, uses_kernels: bool = False) -> int:
    return use_gate_kernel(model, uses_kernels=uses_kernels)  # type: ignore[arg-type]


def an_mlp(kind: type[nn.Module] = LlamaMLP, activation: str = "silu") -> Any:
    torch.manual_seed(1)
    return kind(LlamaConfig(hidden_size=WIDTH, intermediate_size=48, hidden_act=activation))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(torch.arange(2, 22)[None]).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "granite"])
def test_models_compute_as_before(kind: str, dtype: torch.dtype) -> None:
    model = a_model(kind, dtype)
    expected = logits(model)
    assert use_gate_kernel(model, uses_kernels=False) == 2
    found, largest = logits(model), float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype] * largest)


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP])
@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_activation_is_computed_by_its_kernel(kind: type[nn.Module], activation: str, dtype: torch.dtype) -> None:
    mlp, x = an_mlp(kind, activation), torch.randn(2, 5, WIDTH).to(dtype)
    model = Holding(mlp, dtype)
    expected = mlp(x)
    assert replaced(model) == 1
    called: list[object] = []
    with listening(lambda kernel, arguments: called.append(kernel)):
        found = mlp(x)
    assert len(called) == 1
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * 0.1)


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates_are_computed_by_triton_where_it_is_used(
    kind: type[nn.Module], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, x = an_mlp(kind, activation).to(DEVICE), torch.randn(2, 5, WIDTH).to(DEVICE)
    model, expected = Holding(mlp).to(DEVICE), mlp(x)
    model.device = DEVICE
    assert replaced(model, uses_kernels=True) == 1
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def with_forward(forward: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """A module with Llama's layers that does something else with them."""
    return type("Other", (LlamaMLP,), {"forward": forward})


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "clamped": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).clamp(max=50.0) * m.up_proj(x)),
    "up clamped": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).clamp(-50.0, 50.0)),
    "scaled": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) * 2,
    "shifted": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) + 1)),
    "input scaled": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(2 * x)) * m.up_proj(x)),
    "residual": lambda m, x: x + m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    "changed places": lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
    "sparse": lambda m, x: m.down_proj(m.act_fn((g := m.gate_proj(x)) * (g > g.mean(-1, True))) * m.up_proj(x)),
    "normed": lambda m, x: m.down_proj(nn.functional.rms_norm(m.act_fn(m.gate_proj(x)) * m.up_proj(x), (48,))),
    "some of the rows": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x[..., :1, :])) * m.up_proj(x[..., :1, :])),
    "weights by name": lambda m, x: m.down_proj(m.act_fn(x @ m.gate_proj.weight.T) * m.up_proj(x)),
    "no gate": lambda m, x: m.down_proj(m.act_fn(m.up_proj(x))),
    "wide": lambda m, x: m.down_proj((m.act_fn(m.gate_proj(x)) * m.up_proj(x)).double()).float(),
    "several": lambda m, x: (m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)), x),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_formula_is_left_alone(name: str) -> None:
    mlp = an_mlp(with_forward(OTHERS[name]))
    assert replaced(Holding(mlp)) == 0
    assert "forward" not in vars(mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "gelu_10", "mish", "relu2", "laplace", "xielu"])
def test_another_activation_is_left_alone(activation: str, dtype: torch.dtype) -> None:
    """Also where bfloat16 could hardly tell it from one that is known."""
    assert replaced(Holding(an_mlp(activation=activation), dtype)) == 0


def learning(mlp: Any) -> None:
    mlp.scale = nn.Parameter(torch.ones(1))


def listened_to(mlp: Any) -> None:
    mlp.act_fn = ACT2FN["silu"]
    mlp.act_fn.register_forward_hook(lambda *call: None)


def replaced_before(mlp: Any) -> None:
    mlp.forward = mlp.forward


def dropping(mlp: Any) -> None:
    mlp.act_fn = nn.Sequential(ACT2FN["silu"], nn.Dropout(0.5))
    mlp.train()


@pytest.mark.parametrize("change", [learning, listened_to, replaced_before, dropping])
def test_module_with_more_to_it_is_left_alone(change: Callable[[Any], None]) -> None:
    model = Holding(mlp := an_mlp())
    change(mlp)
    assert replaced(model) == 0


def test_layers_are_called_as_modules_whatever_wraps_them_later() -> None:
    """As LoRA does, and hooks."""
    model, x = Holding(mlp := an_mlp()), torch.randn(3, WIDTH)
    assert replaced(model) == 1
    heard: list[nn.Module] = []
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.register_forward_hook(lambda module, args, output: heard.append(module))
        layer.forward = lambda x, forward=layer.forward: forward(x) + 1
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    heard.clear()
    torch.testing.assert_close(mlp(hidden := x), expected)
    assert heard == [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    torch.testing.assert_close(mlp(x=hidden), expected)  # by name the old way


def test_rows_of_another_type_are_computed_by_torch() -> None:
    model, x = Holding(mlp := an_mlp(activation="gelu")), torch.randn(3, WIDTH).half()
    replaced(model)
    expected = an_mlp(activation="gelu").half()(x)
    assert torch.equal(mlp.half()(x), expected)


def test_types_the_kernel_does_not_know_are_left_alone() -> None:
    assert replaced(Holding(an_mlp(), torch.float16)) == 0


@pytest.mark.parametrize("kind", [LlamaMLP, Phi3MLP])
@torch.inference_mode()
def test_replay_gives_the_bits_of_the_module(kind: type[nn.Module]) -> None:
    model, x = Holding(mlp := an_mlp(kind)), torch.randn(1, 5, WIDTH)
    assert replaced(model) == 1
    capture = Capture()
    with capture.capturing():
        result = mlp(x)
    graph = capture.graph(result, Pool())
    x.copy_(torch.randn(1, 5, WIDTH))
    assert torch.equal(graph.replay(), mlp(x))


def test_engine_replaces_them(small: SmallWorld) -> None:
    model: nn.Module = make_core(small)._machine.runner._model
    mlps = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    assert mlps
    assert all("forward" in vars(mlp) for mlp in mlps)
