"""What PEFT's LoRA can be: for each feature how to ask PEFT for it, on any architecture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.engines.protocol import Adapter


@dataclass(frozen=True)
class Feature:
    """`options(model)` is what LoraConfig is given besides the rank."""

    name: str
    rank: int = 4
    options: Callable[[PreTrainedModel], dict[str, Any]] = lambda model: all_linear(model)


def attention_only(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers beside which transformers' attention interface is called, by their names' ends."""
    names = {name.rpartition(".")[2] for name, layer in model.named_modules()
             if isinstance(layer, (nn.Linear, Conv1D)) and re.search("att", name.rpartition(".")[0])}  # fmt: skip
    names -= {"gate_proj", "up_proj", "down_proj"}  # PEFT takes them for experts wherever they are
    return {"target_modules": sorted(names)}


def all_linear(model: PreTrainedModel) -> dict[str, Any]:
    return {"target_modules": "all-linear"}


def _patterns(model: PreTrainedModel) -> dict[str, Any]:
    """Another rank in one layer, another alpha for one kind of module."""
    targets = attention_only(model)["target_modules"]
    return {
        "target_modules": targets, "rank_pattern": {rf".*\.1\..*{targets[0]}": 7},
        "alpha_pattern": {rf".*\.2\..*{targets[0]}": 13, targets[-1]: 3},  # in the order that PEFT saves them in
    }  # fmt: skip


def _some_layers(model: PreTrainedModel) -> dict[str, Any]:
    return {**attention_only(model), "layers_to_transform": [0, 2]}


def _exclude(model: PreTrainedModel) -> dict[str, Any]:
    targets = attention_only(model)["target_modules"]
    return {"target_modules": targets, "exclude_modules": rf".*\.1\..*{targets[0]}"}


def _name_of(model: PreTrainedModel, layer: nn.Module | None) -> str:
    """Raises NotApplicable where the model has no such layer."""
    for name, found in model.named_modules():
        if found is layer:
            return str(name)
    raise NotApplicable


def _embeddings(model: PreTrainedModel) -> dict[str, Any]:
    name = _name_of(model, model.get_input_embeddings())
    return {"target_modules": [*attention_only(model)["target_modules"], name.rpartition(".")[2]]}


def _head(model: PreTrainedModel) -> dict[str, Any]:
    name = _name_of(model, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return {"target_modules": [*attention_only(model)["target_modules"], name.rpartition(".")[2]]}


def _biased(kind: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
    def options(model: PreTrainedModel) -> dict[str, Any]:
        targets = attention_only(model)["target_modules"]
        if not any(layer.bias is not None for name, layer in model.named_modules()
                   if name.rpartition(".")[2] in targets and hasattr(layer, "bias")):  # fmt: skip
            raise NotApplicable
        return {"target_modules": targets, "bias": kind}

    return options


def _modules_to_save(model: PreTrainedModel) -> dict[str, Any]:
    """The head, and the norms of one name."""
    head = _name_of(model, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    norms = {name.rpartition(".")[2] for name, layer in model.named_modules()
             if "norm" in type(layer).__name__.lower() and list(layer.parameters(recurse=False))}  # fmt: skip
    named = sorted(name for name in norms if not name.isdigit())  # a place in a list would name other modules too
    return {**attention_only(model), "modules_to_save": [head.rpartition(".")[2], *named[:1]]}


def _saved_embeddings(model: PreTrainedModel) -> dict[str, Any]:
    name = _name_of(model, model.get_input_embeddings())
    return {**attention_only(model), "modules_to_save": [name.rpartition(".")[2]]}


def _tokens(model: PreTrainedModel) -> dict[str, Any]:
    name = _name_of(model, model.get_input_embeddings())
    return {**attention_only(model), "trainable_token_indices": {name.rpartition(".")[2]: list(range(3, 90, 2))}}


def _experts(model: PreTrainedModel) -> dict[str, Any]:
    """Every stacked weight of the experts, next to the attention."""
    names = sorted({name.rpartition(".")[2] for name, parameter in model.named_parameters()
                    if "expert" in name and parameter.dim() == 3})  # fmt: skip
    if not names:
        raise NotApplicable
    return {**attention_only(model), "target_parameters": [f"experts.{name}" for name in names]}


class NotApplicable(Exception):
    """The architecture has nothing that the feature could be about."""


@dataclass(frozen=True)
class Trained:
    """An adapter's files, and the PEFT model they were saved from: the oracle, for it never went through a file."""

    adapter: Adapter
    model: Any


def make_feature_adapter(base: Path, feature: Feature, directory: Path, dtype: torch.dtype = torch.float32) -> Trained:
    """An adapter with random numbers wherever PEFT trains some, saved by PEFT."""
    torch.manual_seed(len(feature.name))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(r=feature.rank, **feature.options(model)))
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    _randomise(parameter)
        peft_model.save_pretrained(str(directory))
    return Trained(Adapter(id=f"sha-{feature.name}", name=feature.name, path=str(directory)), peft_model.eval())


def _randomise(parameter: nn.Parameter) -> None:
    if parameter.dim() > 1 and not parameter.any():
        parameter.normal_(0.0, 0.3 / parameter.shape[-1] ** 0.5)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.1 * (parameter.std() if parameter.numel() > 1 else 1.0))


def _with(
    base: Callable[[PreTrainedModel], dict[str, Any]], **more: Any
) -> Callable[[PreTrainedModel], dict[str, Any]]:
    return lambda model: {**base(model), **more}


FEATURES = (
    Feature("lora", 4, attention_only),
    Feature("all-linear", 4, all_linear),
    Feature("rank-1", 1, attention_only),
    Feature("rank-256", 256, attention_only),
    Feature("rslora", 16, _with(attention_only, use_rslora=True, lora_alpha=12)),
    Feature("dora", 4, _with(attention_only, use_dora=True)),
    Feature("patterns", 4, _patterns),
    Feature("layers", 4, _some_layers),
    Feature("exclude", 4, _exclude),
    Feature("lora-bias", 4, _with(attention_only, lora_bias=True)),
    Feature("bias-lora-only", 4, _biased("lora_only")),
    Feature("bias-all", 4, _biased("all")),
    Feature("embeddings", 4, _embeddings),
    Feature("lm-head", 4, _head),
    Feature("modules-to-save", 4, _modules_to_save),
    Feature("saved-embeddings", 4, _saved_embeddings),
    Feature("token-indices", 4, _tokens),
    Feature("experts", 4, _experts),
)
FEATURE = {feature.name: feature for feature in FEATURES}
