"""Which of the base's weights are rounded at start, as `model.quantization` asks for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from loraplex.config.settings import Model
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.dense import is_plain
from loraplex.kernels.dense.linear import int8_size


def require_quantizable(settings: Model, device: torch.device) -> None:
    """Raises ModelNotServable where weights are to be rounded and the device has no kernel for it."""
    if settings.quantization != "none" and device.type != "cpu":
        raise ModelNotServable(
            f"model.quantization = {settings.quantization!r} rounds weights for a CPU, and the model is to be on "
            f"{device}; a checkpoint that is quantised is served there"
        )


def layers_to_round(settings: Model, model: PreTrainedModel, layers: Iterable[nn.Module]) -> frozenset[nn.Module]:
    """Of these layers, those whose weights become int8: all linear ones but the one that gives logits.

    Raises ModelNotServable where there is none.
    """
    if settings.quantization == "none":
        return frozenset()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear) and layer is not head]
    found = frozenset(layer for layer in linear if is_plain(layer) and int8_size(layer.weight))
    if not found:
        raise ModelNotServable(
            f"model.quantization = {settings.quantization!r} finds no weights to round: it takes linear layers in "
            f"float32 or bfloat16 that are not quantised already, a CPU with AVX2, and kernels that were built; the "
            f"model has {len(linear)} linear layers in {str(model.dtype).removeprefix('torch.')}"
        )
    return found
