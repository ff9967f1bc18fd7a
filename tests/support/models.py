"""Small random models and PEFT adapters, made by transformers and PEFT themselves; seeded, a few hundred kB each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from loraplex.engines.protocol import Adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA to make: what PEFT's LoraConfig is given."""

    name: str
    rank: int
    targets: tuple[str, ...] = tuple(ATTENTION)
    options: tuple[tuple[str, Any], ...] = ()


SPECS = (
    AdapterSpec("rank-4", 4),
    AdapterSpec("rank-8", 8, tuple(ALL_LINEAR)),
    AdapterSpec("rank-16-rslora", 16, ("q_proj", "v_proj"), (("use_rslora", True),)),
    AdapterSpec("rank-32-dora", 32, tuple(ALL_LINEAR), (("use_dora", True),)),
    AdapterSpec("rank-64-mlp", 64, ("gate_proj", "up_proj", "down_proj"), (("lora_alpha", 24),)),
)


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = dict(  # noqa: C408
        vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def make_model(config: PretrainedConfig, directory: Path, seed: int = 0) -> PreTrainedModel:
    """A random model whose greedy answers vary: weights are larger than an initialisation's. Saved with a tokenizer."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 2.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few special tokens behind them: id 0 … 255 is the byte of the byte-level alphabet's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_adapter(model_directory: Path, spec: AdapterSpec, directory: Path, seed: int | None = None) -> Adapter:
    """Random A and B of visible size, saved by PEFT."""
    torch.manual_seed(spec.rank if seed is None else seed)
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    options = {"lora_alpha": 2 * spec.rank, "target_modules": list(spec.targets), **dict(spec.options)}
    peft_model = get_peft_model(base, LoraConfig(r=spec.rank, **options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.normal_(0.0, 0.4 / parameter.shape[-1] ** 0.5)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    path = directory / spec.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks the hub about the base's vocabulary
        peft_model.save_pretrained(str(path))
    return Adapter(id=f"sha-{spec.name}", name=spec.name, path=str(path))


class Oracle:
    """transformers + PEFT on the same files: greedy tokens and logits of one adapter alone."""

    def __init__(self, model_directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self._directory = model_directory
        self._dtype = dtype
        self._models: dict[str | None, Any] = {}

    def model(self, adapter: Adapter | None) -> Any:
        key = adapter.id if adapter else None
        if key not in self._models:
            model = AutoModelForCausalLM.from_pretrained(self._directory, dtype=self._dtype)
            self._models[key] = (PeftModel.from_pretrained(model, adapter.path) if adapter else model).eval()
        return self._models[key]

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int, adapter: Adapter | None, **options: object) -> list[int]:
        """Up to `num_tokens` tokens, the end token included; `options` are those of transformers' `generate`."""
        output = self.model(adapter).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            **options,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    def agrees(self, prompt: list[int], told: list[int], num_tokens: int, adapter: Adapter | None) -> bool:
        """Whether `told` is the greedy answer, or leaves it where the two best logits are within 1e-3.

        Two orders of float32 sums part such logits by chance; what follows is another answer then.
        """
        expected = self.greedy(prompt, num_tokens, adapter)
        if told == expected:
            return True
        place = next((place for place, pair in enumerate(zip(told, expected, strict=False)) if pair[0] != pair[1]), -1)
        if place < 0:
            return False
        best = self.logits([*prompt, *expected[:place]], adapter)[-1].topk(2)
        return told[place] in best.indices.tolist() and float(best.values[0] - best.values[1]) < 1e-3

    @torch.inference_mode()
    def logits(self, token_ids: list[int], adapter: Adapter | None) -> torch.Tensor:
        """Shape [T, V]."""
        logits: torch.Tensor = self.model(adapter)(input_ids=torch.tensor([token_ids])).logits[0]
        return logits
