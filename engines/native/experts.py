"""Stacked experts with LoRA on their weights, without adding it into them.

Follows the attributes that transformers' own implementations of experts go by (`integrations/moe.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Factors = tuple[Tensor, Tensor, float]
_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "down_proj", "num_experts")


def runs_experts(module: nn.Module) -> bool:
    """Whether the module is one of those that transformers' interchangeable implementations compute."""
    return all(hasattr(module, name) for name in _ATTRIBUTES) and isinstance(module.down_proj, Tensor)


def compute_each(module: nn.Module, is_asked: Callable[[], bool]) -> None:
    """Let the module compute each token by itself while that is asked: how many share an expert varies otherwise."""
    forward: Callable[..., Tensor] = module.forward

    def forward_each(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not is_asked():
            return forward(hidden_states, top_k_index, top_k_weights)
        tokens = (slice(token, token + 1) for token in range(hidden_states.shape[0]))
        return torch.cat([
            forward(hidden_states[own].clone(), top_k_index[own].clone(), top_k_weights[own].clone()) for own in tokens
        ])  # fmt: skip

    module.forward = forward_each


def experts_with_lora(
    module: Any, lora: Mapping[str, Factors], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """For token t and each expert e it chose, with weight w: Σ w · down_e(act(up_e(x_t))), up and down with their LoRA.

    hidden_states: Shape [T, H]. top_k_index, top_k_weights: Shape [T, K]. Result: Shape [T, H].
    """
    top_k = top_k_index.shape[1]
    chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    out = hidden_states.new_zeros(chosen.shape[0], hidden_states.shape[1])
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for expert in sorted(set(chosen.tolist())):
        if expert >= module.num_experts:
            continue
        pairs = (chosen == expert).nonzero().flatten()
        hidden = _linear(module, first, expert, hidden_states[pairs // top_k], lora)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = _linear(module, "down_proj", expert, hidden, lora)
        if module.has_post_expert_norm:
            hidden = module.post_expert_norm(hidden)
        out[pairs] = hidden * weights[pairs, None]
    return out.view(-1, top_k, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _linear(module: Any, name: str, expert: int, x: Tensor, lora: Mapping[str, Factors]) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    y = functional.linear(x, weight.t() if module.is_transposed else weight, bias)
    if name in lora:
        a, b, scale = lora[name]
        rank = a.shape[0] // module.num_experts
        down, up = a[expert * rank : (expert + 1) * rank], b.view(b.shape[0], rank, -1)[:, :, expert]
        y = y + (x @ down.t()) @ up.t() * scale
    return y
