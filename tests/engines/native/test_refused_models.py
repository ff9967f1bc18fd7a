"""Bases that cannot be served are refused at start, by name and with the reason."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.models import llama_config, make_model
from transformers import FalconConfig

from loraplex.config.settings import EngineSettings, Model, Settings
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.loading import load_machine


def load(directory: Path) -> None:
    settings = Settings(
        model=Model(path=str(directory), name="m", dtype="float32", device="cpu", max_model_len=64),
        engine=EngineSettings(kv_block_size=4, num_threads=1, kv_cache_bytes=2**20),
    )
    load_machine(settings, lambda progress: None)


def falcon(**changes: Any) -> FalconConfig:
    return FalconConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        **changes,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations this small
def test_falcon_with_alibi_is_refused_and_without_it_served(tmp_path: Path) -> None:
    make_model(falcon(alibi=False), tmp_path / "rotary")
    load(tmp_path / "rotary")
    make_model(falcon(alibi=True), tmp_path / "alibi")
    with pytest.raises(
        ModelNotServable, match=r"FalconForCausalLM is not served: .* make attention masks of their own"
    ):
        load(tmp_path / "alibi")


# what the checkpoint says, what transformers says it lacks, and the module that would read it
QUANTISED: dict[str, tuple[dict[str, Any], str, str]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "AWQ quantized model requires gptqmodel", "gptqmodel",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        "GPTQ quantized model requires optimum", "optimum",
    ),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
            },
        },
        "required for compressed-tensors quantization", "compressed_tensors",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_base_whose_library_is_not_there_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    """transformers loads each of them through another library, which this project does not bring."""
    config, says, module = QUANTISED[kind]
    if find_spec(module) is not None:
        pytest.skip(f"{module} is there")
    make_model(llama_config(num_hidden_layers=1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(ModelNotServable, match=says):
        load(tmp_path)
