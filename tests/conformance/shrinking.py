"""Any decoder configuration that transformers knows -> the same architecture, small enough to compute in a moment."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 128
LAYERS = 4
WINDOW = 8
# Sizes by the names configurations give them, none a multiple of all the others so that a mix-up shows.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "emb_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "embedding_dim", "hidden_dim", "lm_head_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_feedforward"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size", "dim_ff", "dff"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_layers", "decoder_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_global_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "swa_num_key_value_heads", "attention_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("global_head_dim", "swa_head_dim", "swa_v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": 24,
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "dt_rank", "lora_rank"), 12),
    "q_lora_rank": 20,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), VOCABULARY),
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_dense_layers", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("sliding_window", "attention_window", "sliding_window_size", "window_size"), WINDOW),
    "attention_chunk_size": 16,
    "index_topk": 4,
    "index_n_heads": 2,
    "num_kv_shared_layers": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm", "lru_width", "attention_hidden_size", "mamba_intermediate"), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_n_groups", "n_groups"), 4),
    **dict.fromkeys(("image_size", "video_size"), 32),
    "patch_size": 16,
    "entry_hidden_size": 64,
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# Where sizes depend on one another in a way of the architecture's own.
_SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "bamba": {"mamba_n_heads": 8},
    "longcat_flash": {"head_dim": _SIZES["qk_rope_head_dim"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
        },
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "llama4_text": {"attention_chunk_size": _SIZES["max_position_embeddings"]},  # served as far as one chunk goes
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32)},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of an architecture, made small; a composite's parts each on their own."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_small_values(kind()), **_SPECIAL.get(model_type, {})})


def _small_values(config: PretrainedConfig) -> dict[str, Any]:
    """What to construct the configuration with: only fields it has, so that it derives the others itself."""
    values: dict[str, Any] = {}
    aliases = getattr(type(config), "attribute_map", {})
    fields = _fields(config, aliases)
    num_layers = next((fields[name] for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            values[name] = type(value)(**{**_small_values(value), **_SPECIAL.get(value.model_type, {})})
        elif name == "head_dim" and "qk_rope_head_dim" in fields:
            continue  # derived
        elif name == "num_key_value_heads" and "qk_rope_head_dim" in fields:
            values[name] = _SIZES["num_attention_heads"]  # latent attention has as many as queries
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            values[aliases.get(name, name)] = _SIZES[name]
        elif name in ("head_dim", "num_key_value_heads", "num_experts_per_tok") and value is None:
            values[name] = _SIZES[name]
        elif name == "attention_multiplier" and value == 1:
            # Granite's default, which no checkpoint keeps. Scores get so large (60) that the rounding of float32 alone
            # moves transformers itself 1.5e-4 away from float64 (`test_float64.py`).
            values[name] = 0.2
        elif isinstance(value, list) and value and num_layers and value == list(range(num_layers)):
            values[name] = value[:LAYERS]  # the places of layers, here of all
        elif isinstance(value, list) and value and num_layers and len(value) == num_layers:
            values[name] = _of_every_kind([_SIZES[name]] * num_layers if name in _SIZES else value)
        elif name.endswith("token_id") and isinstance(value, int):
            values[name] = min(value, VOCABULARY - 1)
        elif name.endswith("token_id") and isinstance(value, list):
            values[name] = [min(token, VOCABULARY - 1) for token in value]
    if "is_decoder" in fields:
        values["is_decoder"] = True
    return values


def _fields(config: PretrainedConfig, aliases: dict[str, str]) -> dict[str, Any]:
    """Every field that can be given to the constructor, by the name it is stored under, then by its aliases."""
    fields: dict[str, Any] = {}
    for name in [*config.to_dict(), *aliases]:
        if not isinstance(getattr(type(config), aliases.get(name, name), None), property):
            with contextlib.suppress(AttributeError, RuntimeError):  # some may only be asked for layer by layer
                fields[name] = getattr(config, name)
    return fields


def _of_every_kind(layers: list[Any]) -> list[Any]:
    """LAYERS of a list that says something of each layer: its first ones, but each kind at least once."""
    kept = list(layers[:LAYERS])
    for kind in (value for place, value in enumerate(layers) if value not in layers[:place]):
        if kind not in kept:
            kept[max(place for place, value in enumerate(kept) if kept.count(value) > 1)] = kind
    return kept
