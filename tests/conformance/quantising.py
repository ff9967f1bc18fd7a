"""Small checkpoints in each quantised form, and the weights they stand for.

Where a library quantises, and dequantises, it does so; the forms that only need writing down are written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.models import make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

GROUP = 32
BLOCK = 32
_NIBBLES = 8  # of an int32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

# (plain checkpoint, where to put the quantised one) -> the parameters it stands for, by name.
Quantise = Callable[[Path, Path], dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """`needs` are the modules it cannot be read without.

    `tolerance` is relative, as in the other cells, to the dequantised weights: by the order of summation alone where
    the multiplication is in float32. Where it is more, `exactly` is held against PEFT over the quantised base itself.
    """

    name: str
    quantise: Quantise
    needs: tuple[str, ...] = ()
    architecture: str = "llama"
    tolerance: float = 1e-4
    exactly: float | None = None


def by_transformers(config: Callable[[], Any], dequantise: Callable[[Any], Tensor]) -> Quantise:
    """Quantised while a plain checkpoint is read, and saved."""

    def quantise(plain: Path, directory: Path) -> dict[str, Tensor]:
        model: Any = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config(), dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        return {f"{name}.weight": dequantise(layer) for name, layer in _layers(model).items()}

    return quantise


def compressed_tensors(scheme: str) -> Quantise:
    """As llm-compressor writes them: scales by the range of each group, channel or tensor."""

    def quantise(plain: Path, directory: Path) -> dict[str, Tensor]:
        library, compressors = import_module("compressed_tensors.quantization"), import_module(
            "compressed_tensors.compressors"
        )  # fmt: skip
        chosen = library.preset_name_to_scheme(scheme, ["Linear"])
        if chosen.weights.strategy == "group":
            chosen.weights.group_size = GROUP
        model: Any = AutoModelForCausalLM.from_pretrained(plain)
        library.apply_quantization_config(
            model, library.QuantizationConfig(config_groups={"all": chosen}, ignore=["lm_head"])
        )
        for layer in _layers(model).values():
            _set_scales(layer, chosen.weights)
        compressor = compressors.ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(directory)
        make_tokenizer().save_pretrained(directory)
        compressor.decompress_model(model)
        return {f"{name}.weight": layer.weight.detach() for name, layer in _layers(model).items()}

    return quantise


def _set_scales(layer: Any, kind: Any) -> None:
    size = kind.group_size if kind.strategy == "group" else layer.weight.shape[1]
    groups = torch.unflatten(layer.weight.detach(), 1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    if kind.strategy == "tensor":
        low, high = low.amin().view(1), high.amax().view(1)
    utils = import_module("compressed_tensors.quantization.utils")
    scale, zero = utils.calculate_qparams(low, high, kind)
    layer.weight_scale.data.copy_(scale)
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.data.copy_(zero)
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.1)  # so that nothing is cut off


def gptq(*, by_activation: bool) -> Quantise:
    """4 bits, asymmetric, zero points stored less one. `by_activation`: groups take columns in an order of theirs."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        width = weight.shape[1]
        order = torch.randperm(width) if by_activation else torch.arange(width)
        codes, scales, zeros, dequantised = _four_bits(weight[:, order])
        place = order.argsort()
        stored = {
            "qweight": _packed(codes[place]),
            "qzeros": _packed((zeros - 1).t() % 16).t(),
            "scales": scales.half(),
            "g_idx": (place // GROUP).to(torch.int32),
        }
        return {f"{name}.{key}": tensor for key, tensor in stored.items()}, dequantised[:, place]

    said = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": by_activation, "sym": False}
    return lambda plain, directory: _write(plain, directory, said, pack)


def awq(plain: Path, directory: Path) -> dict[str, Tensor]:
    """4 bits, asymmetric, eight columns in AWQ's order in each int32."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, zeros, dequantised = _four_bits(weight)
        stored = {"qweight": _packed_as_awq(codes), "qzeros": _packed_as_awq(zeros), "scales": scales.half()}
        return {f"{name}.{key}": tensor for key, tensor in stored.items()}, dequantised

    said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return _write(plain, directory, said, pack)


def fp8_blocks(plain: Path, directory: Path) -> dict[str, Tensor]:
    """DeepSeek's: E4M3 with a scale for each square."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = torch.unflatten(torch.unflatten(weight, 1, (-1, BLOCK)), 0, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        stored = (weight / spread).to(torch.float8_e4m3fn)
        return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scales}, stored.float() * spread

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return _write(plain, directory, said, pack)


def mxfp4_experts(plain: Path, directory: Path) -> dict[str, Tensor]:
    """OpenAI's: experts alone, 4-bit floats with an exponent for each 32 along the input."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = torch.unflatten(weight.transpose(1, 2), 2, (-1, 32))
        exponents = (groups.abs().amax(-1, keepdim=True) / _FP4[7]).log2().ceil()
        codes = (groups[..., None] / exponents[..., None].exp2() - _FP4).abs().argmin(-1)
        stored = {
            "blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
            "scales": (exponents[..., 0] + 127).to(torch.uint8),
        }
        dequantised = (_FP4[codes] * exponents.exp2()).flatten(2).transpose(1, 2)
        return {f"{name}_{key}": tensor for key, tensor in stored.items()}, dequantised

    said = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    return _write(plain, directory, said, pack, num_dims=3)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes [in, out], scales and zero points [in / GROUP, out], the weight they stand for [out, in])."""
    groups = torch.unflatten(weight.t(), 0, (-1, GROUP))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    dequantised = ((codes - zeros[:, None]) * scales[:, None]).flatten(0, 1).t()
    return codes.flatten(0, 1), scales, zeros, dequantised


def _packed(codes: Tensor) -> Tensor:
    """Eight rows in each int32, the first lowest. codes: Shape [R, C]. Result: Shape [R / 8, C]."""
    shifts = torch.arange(0, 32, 4)[None, :, None]
    words = (torch.unflatten(codes.long(), 0, (-1, _NIBBLES)) << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _packed_as_awq(codes: Tensor) -> Tensor:
    ordered = torch.unflatten(codes, 1, (-1, _NIBBLES))[..., _AWQ_ORDER].flatten(1)
    return _packed(ordered.t()).t()


def _write(
    plain: Path,
    directory: Path,
    said: dict[str, Any],
    pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]],
    num_dims: int = 2,
) -> dict[str, Tensor]:
    """A checkpoint whose linear layers, but for the head, are packed; with three dimensions its experts instead."""
    stored: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if "proj" in key and tensor.dim() == num_dims:
            parts, dequantised[key] = pack(key.removesuffix(".weight"), tensor)
            stored |= {name: part.contiguous() for name, part in parts.items()}
        else:
            stored[key] = tensor
    directory.mkdir()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    make_tokenizer().save_pretrained(directory)
    return dequantised


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
