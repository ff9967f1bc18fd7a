"""Adapter files as bytes, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "base",
}
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def weights(seed: int = 0, *, size: int = 16) -> bytes:
    """A safetensors file with the A [4, size] and B [size, 4] of one module."""
    random = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": random.standard_normal((4, size), dtype=np.float32),
        f"{prefix}.lora_B.weight": random.standard_normal((size, 4), dtype=np.float32),
    }
    return save(tensors)


def adapter_files(seed: int = 0, *, size: int = 16) -> dict[str, bytes]:
    """name -> bytes of a sound adapter; another seed is another adapter."""
    return {CONFIG_NAME: json.dumps(CONFIG).encode(), WEIGHTS_NAME: weights(seed, size=size)}


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def read_files(directory: str | Path) -> dict[str, bytes]:
    """What the cache holds of an adapter, its manifest left out."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != "manifest.json"}
