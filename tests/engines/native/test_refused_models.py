"""Bases that cannot be served are refused at start, by name and with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conformance.cells import make_base, run_cell
from conformance.features import FEATURE
from conformance.shrinking import tiny_config
from safetensors.torch import load_file, save_file
from support.models import llama_config, make_model
from transformers import FalconConfig

from loraplex.config.settings import EngineSettings, Model, Settings
from loraplex.engines.context_length import context_length, stated_positions
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


@pytest.mark.filterwarnings("ignore")
def test_attention_in_chunks_is_refused_beyond_one_and_served_within(tmp_path: Path) -> None:
    config = tiny_config("llama4_text")
    config.attention_chunk_size = 64
    make_base(config, tmp_path / "within")
    load(tmp_path / "within")
    config.attention_chunk_size = 63
    make_base(config, tmp_path / "beyond")
    with pytest.raises(ModelNotServable, match="attention in chunks of 63 tokens is not served; set model"):
        load(tmp_path / "beyond")


def test_more_tokens_than_positions_are_refused_as_check_config_does(tmp_path: Path) -> None:
    make_model(llama_config(num_hidden_layers=1, max_position_embeddings=63), tmp_path)
    with pytest.raises(
        ModelNotServable, match=r"^model.max_model_len = 64 exceeds the checkpoint's 63 positions$"
    ) as told:
        load(tmp_path)
    positions = stated_positions(tmp_path)
    with pytest.raises(ModelNotServable, match=re.escape(str(told.value))):
        context_length(64, positions)


# what the checkpoint says, what transformers says it lacks, and where it asks whether that is there
QUANTISED: dict[str, tuple[dict[str, Any], str, str]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "AWQ quantized model requires gptqmodel",
        "transformers.quantizers.quantizer_awq.is_gptqmodel_available",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        "GPTQ quantized model requires optimum", "transformers.quantizers.quantizer_gptq.is_optimum_available",
    ),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
            },
        },
        "required for compressed-tensors quantization",
        "transformers.utils.quantization_config.is_compressed_tensors_available",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_base_whose_library_is_not_there_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config, says, is_there = QUANTISED[kind]
    monkeypatch.setattr(is_there, lambda: False)
    make_model(llama_config(num_hidden_layers=1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(ModelNotServable, match=says):
        load(tmp_path)


def test_checkpoint_with_too_few_tensors_or_of_other_shapes_is_refused_with_the_first(tmp_path: Path) -> None:
    """transformers would make the weights up and warn."""
    make_model(llama_config(num_hidden_layers=1), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotServable, match=f"lacks 1 of the model's tensors; the first is {name}"):
        load(tmp_path)
    save_file({**tensors, name: tensors[name][:8].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotServable, match=rf"1 of .* another shape .* {name}, \[8, \d+\] instead of"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_prompts_that_are_read_in_both_directions_are_refused_and_in_one_served_exactly(tmp_path: Path) -> None:
    make_base(tiny_config("hrm_text"), tmp_path / "both")
    with pytest.raises(ModelNotServable, match=r"hrm_text is not served: .* both directions"):
        load(tmp_path / "both")
    config = tiny_config("hrm_text")
    config.prefix_lm = False
    make_base(config, tmp_path / "one")
    outcome = run_cell(tmp_path / "one", FEATURE["lora"])
    assert outcome.is_forced
    assert outcome.is_exact
