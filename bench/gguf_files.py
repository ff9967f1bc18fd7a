"""The models and adapters of `shapes.py` as GGUF files, which llama.cpp reads; the precision stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file
from shapes import SHAPES

from loraplex.engines.protocol import Adapter

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_base(name: str, base: Path) -> Path:
    """Beside the directory `base`; an existing file is kept."""
    path = base.parent / "base.gguf"
    if path.is_file():
        return path
    shape = SHAPES[name]
    config = shape.config()
    unfinished = path.with_suffix(".part")
    writer = GGUFWriter(unfinished, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    rope: Any = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    _add_tokenizer(writer, shape.vocab)
    for key, tensor in load_file(base / "model.safetensors").items():
        layer, module = _place(key.removesuffix(".weight"))
        _add(writer, f"{layer}{NAMES[module]}.weight", _rotated(module, tensor, name))
    _finish(writer)
    unfinished.rename(path)
    return path


def write_adapter(name: str, adapter: Adapter) -> Path:
    """Beside the adapter's directory; an existing file is kept."""
    path = Path(f"{adapter.path}.gguf")
    if path.is_file():
        return path
    tensors = load_file(Path(adapter.path) / "adapter_model.safetensors")
    rank = next(len(tensor) for key, tensor in tensors.items() if "lora_A" in key)
    unfinished = path.with_suffix(".part")
    writer = GGUFWriter(unfinished, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for key, tensor in tensors.items():
        module_key, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        layer, module = _place(module_key)
        tensor = _rotated(module, tensor, name) if side == "lora_B" else tensor
        _add(writer, f"{layer}{NAMES[module]}.weight.{side.lower()}", tensor)
    _finish(writer)
    unfinished.rename(path)
    return path


def _place(key: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` -> (`blk.3.`, `mlp.up_proj`); what is in no layer as it is."""
    if not key.startswith("model.layers."):
        return "", key
    number, _, module = key.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.", module


def _rotated(module: str, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Queries and keys [heads * head, …] with the two that RoPE turns together side by side, not half a head apart."""
    heads = {"self_attn.q_proj": SHAPES[name].heads, "self_attn.k_proj": SHAPES[name].kv_heads}.get(module)
    return tensor if heads is None else tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 2)


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.bfloat16 and tensor.ndim > 1:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.float().contiguous().numpy())


def _add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    """SentencePiece's form of words w0, w1, …: a piece each."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\N{LOWER ONE EIGHTH BLOCK}w{number}" for number in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([TokenType.NORMAL] * vocab)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
