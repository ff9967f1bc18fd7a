"""Random-weight models of known shapes and LoRA adapters for them, written in Hugging Face and PEFT format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex.engines.protocol import Adapter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; `dtype` is what it is stored and run in."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
        )


SHAPES = {
    "toy": Shape(6, 256, 688, 8, 4, 2048, torch.float32),
    "135m": Shape(30, 576, 1536, 9, 3, 49152, torch.bfloat16),  # SmolLM2-135M
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000, torch.bfloat16),  # TinyLlama-1.1B
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, torch.bfloat16),  # Llama-3.1-8B
}


def make_base(name: str, directory: Path) -> Path:
    """Write the model's config and weights; returns its directory. An existing one is kept."""
    path = directory / name / "base"
    if not (path / "tokenizer.json").is_file():
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPES[name].config()).to(SHAPES[name].dtype)  # type: ignore[arg-type]
        model.save_pretrained(path, max_shard_size="100GB")
        _make_tokenizer(SHAPES[name].vocab).save_pretrained(path)
    return path


def _make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, …, one a token: every id has a text, so that every token shows in a stream."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="w1", chat_template=template
    )
    return made


def make_adapter(name: str, rank: int, number: int, directory: Path) -> Adapter:
    """Write a LoRA on all linear layers in PEFT's format."""
    shape = SHAPES[name]
    path = directory / name / f"lora-r{rank}-{number}"
    if not path.is_dir():
        path.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        head = shape.hidden // shape.heads
        sizes = {
            "self_attn.q_proj": (shape.hidden, shape.heads * head),
            "self_attn.k_proj": (shape.hidden, shape.kv_heads * head),
            "self_attn.v_proj": (shape.hidden, shape.kv_heads * head),
            "self_attn.o_proj": (shape.heads * head, shape.hidden),
            "mlp.gate_proj": (shape.hidden, shape.intermediate),
            "mlp.up_proj": (shape.hidden, shape.intermediate),
            "mlp.down_proj": (shape.intermediate, shape.hidden),
        }
        tensors = {}
        for layer in range(shape.layers):
            for module, (width_in, width_out) in sizes.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                a = torch.randn(rank, width_in, generator=generator) / width_in**0.5
                b = torch.randn(width_out, rank, generator=generator) * 0.01
                tensors[f"{key}.lora_A.weight"] = a.to(shape.dtype)
                tensors[f"{key}.lora_B.weight"] = b.to(shape.dtype)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
        config |= {"task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "base_model_name_or_path": name}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(id=f"{name}-r{rank}-{number}", name=path.name, path=str(path))
