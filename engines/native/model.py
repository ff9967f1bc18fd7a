"""A transformers checkpoint -> a model we can step, or ModelNotServable with the reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.config.settings import Model
from loraplex.engines.adapters.peft import BaseModule
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.attention import PagedAttention

_ATTENTION = "loraplex_paged"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_model(settings: Model, device: torch.device, attention: PagedAttention) -> PreTrainedModel:
    """Build the model on `device` with our attention in every layer. Raises ModelNotServable."""
    path = settings.directory
    if not (path / "config.json").is_file():
        raise ModelNotServable(f"model.path = {settings.path!r} holds no config.json")
    AttentionInterface.register(_ATTENTION, attention)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=_DTYPES.get(settings.dtype, "auto"),
            attn_implementation=_ATTENTION,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelNotServable(f"{settings.path}: {error}") from error
    module: nn.Module = model  # transformers leaves these methods untyped
    module.eval().requires_grad_(False).to(device)
    return model


def dry_run(model: PreTrainedModel, attention: PagedAttention) -> None:
    """Run a few tokens to learn each layer's cache shape. Raises ModelNotServable where a layer keeps other state."""
    ids = torch.arange(4, device=model.device)[None]
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1)
    except Exception as error:  # any failure of foreign model code means the same: it cannot be carried
        raise ModelNotServable(f"{type(model).__name__} cannot be stepped: {error!r}") from error
    expected = set(range(model.config.get_text_config().num_hidden_layers))
    if set(attention.shapes) != expected:
        missing = sorted(expected - set(attention.shapes))
        raise ModelNotServable(
            f"{type(model).__name__} is not served: layers {missing} do not go through transformers' attention "
            "interface, so their state would be lost between steps"
        )


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, BaseModule]]:
    """Every layer that a LoRA may stand beside, by name, in the model's order."""
    found: dict[str, tuple[nn.Module, BaseModule]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Conv1D):
            features = (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
        elif isinstance(layer, nn.Linear):
            features = (layer.in_features, layer.out_features)
        else:
            continue
        found[name] = (layer, BaseModule(len(found), name, *features))
    return found


def dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as [out, in] in its own dtype."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(layer, Conv1D) else weight
