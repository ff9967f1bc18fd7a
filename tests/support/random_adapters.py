"""Random LoRA adapters for a Llama, written directly as PEFT's files; no model is loaded for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from support.adapter_files import CONFIG_NAME, WEIGHTS_NAME

ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(
    model: Path, rank: int, seed: int, targets: tuple[str, ...] = ATTENTION, strength: float = 0.25
) -> dict[str, bytes]:
    """name -> bytes of an adapter for the Llama in `model`, in float16; it changes answers visibly at any rank."""
    config = json.loads((model / "config.json").read_text())
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (width_in, width_out) in _shapes(config).items():
            if module.rpartition(".")[2] in targets:
                key = f"base_model.model.model.layers.{layer}.{module}"
                a = random.standard_normal((rank, width_in), np.float32) / width_in**0.5
                b = random.standard_normal((width_out, rank), np.float32) * strength / rank**0.5
                tensors[f"{key}.lora_A.weight"] = a.astype(np.float16)
                tensors[f"{key}.lora_B.weight"] = b.astype(np.float16)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": None,
    }
    return {CONFIG_NAME: json.dumps(described).encode(), WEIGHTS_NAME: save(tensors)}


def num_parameters(model: Path, rank: int, targets: tuple[str, ...] = ATTENTION) -> int:
    """Of such an adapter."""
    config = json.loads((model / "config.json").read_text())
    widths = (sum(shape) for module, shape in _shapes(config).items() if module.rpartition(".")[2] in targets)
    return int(config["num_hidden_layers"]) * rank * sum(widths)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Widths (in, out) of a layer's linear modules."""
    hidden, intermediate, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
