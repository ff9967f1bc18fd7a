"""Which layers turn queries and keys by the kernel, that nothing else changes, and that other forms are left alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from loraplex.engines.native.rotary import use_rotary_kernel
from loraplex.kernels import triton_support
from loraplex.kernels.attention import cpu_rotary
from loraplex.kernels.attention.cpu_rotary import is_available

pytestmark = pytest.mark.skipif(
    not is_available(torch.float32, torch.device("cpu")), reason="the kernel was not built: no compiler"
)

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


def a_model(kind: str, dtype: torch.dtype = torch.float32, **other: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "pad_token_id": 0, **other})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(2, 22)[None]).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
def test_models_compute_the_same_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    model = a_model(kind, dtype)
    expected = logits(model)
    assert use_rotary_kernel(model, uses_kernels=False) == 2
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.skipif(not triton_support.is_available(torch.device("cpu")), reason="Triton is not interpreted here")
def test_tritons_kernel_computes_the_same_to_the_last_bit(kind: str) -> None:
    model = a_model(kind, torch.float16)
    expected = logits(model)
    assert use_rotary_kernel(model, uses_kernels=True) == 2
    assert torch.equal(logits(model), expected)


def test_kernel_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noting(q: torch.Tensor, k: torch.Tensor, *angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(q.shape)
        return modeling_llama.apply_rotary_pos_emb(q, k, *angles)  # type: ignore[no-any-return]

    model = a_model("llama")
    assert use_rotary_kernel(model, uses_kernels=False) == 2
    monkeypatch.setattr(cpu_rotary, "rotate", noting)
    logits(model)
    assert calls == [(1, 4, 20, 8)] * 2


def test_other_models_of_the_class_keep_theirs() -> None:
    theirs, other = modeling_llama.apply_rotary_pos_emb, a_model("llama")
    use_rotary_kernel(a_model("llama"), uses_kernels=False)
    assert modeling_llama.apply_rotary_pos_emb is theirs
    assert not any("forward" in vars(module) for module in other.modules())


@pytest.mark.parametrize("kind", ["gpt_neox", "phi"])
def test_heads_that_are_turned_in_part_go_the_old_way(kind: str) -> None:
    model = a_model(kind, rotary_pct=0.5, partial_rotary_factor=0.5)
    expected = logits(model)
    use_rotary_kernel(model, uses_kernels=False)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["cohere", "gptj", "gpt2"])
def test_another_formula_is_left_alone(kind: str) -> None:
    """Cohere turns neighbours against each other; GPT-2 has positions of its own."""
    assert use_rotary_kernel(a_model(kind), uses_kernels=False) == 0


def test_types_the_kernel_does_not_know_are_left_alone() -> None:
    assert use_rotary_kernel(a_model("llama", torch.float16), uses_kernels=False) == 0
