"""Quantised bases with LoRA and DoRA beside them, against PEFT over the same weights dequantised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import Asked, expected_logprobs, make_base, make_core, prompts, relative_error, serve
from conformance.features import Feature, attention_only, make_feature_adapter
from conformance.shrinking import tiny_config
from support.models import make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from loraplex.engines.protocol import Adapter

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")


@dataclass(frozen=True)
class Route:
    """A way to quantise; `dequantise(layer)` is the library's own. Tolerance: relative, as in the other cells.

    Routes that multiply in float32 differ from their dequantised weights by the order of summation. The kernel of
    bitsandbytes for CPUs multiplies in bfloat16 where they can, and LLM.int8() rounds each token's activations to
    8 bits: each of the 28 layers adds about 2⁻⁸ of its output, and the largest of ten thousand log-probabilities
    is held.
    """

    name: str
    config: Callable[[], Any]
    dequantise: Callable[[Any], torch.Tensor]
    tolerance: float = 1e-4


def _bitsandbytes(**options: Any) -> Any:
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def _llm_int8(layer: Any) -> torch.Tensor:
    scales = getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    data = layer.weight.data if layer.state.CB is None else layer.state.CB
    weight: torch.Tensor = data.float() * scales.float()[:, None] / 127
    return weight


def _nf4(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return weight


ROUTES = (
    Route(
        "torchao-int8", lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()), lambda layer: layer.weight.dequantize()
    ),
    Route(
        "torchao-int4",
        lambda: TorchAoConfig(
            torchao.IntxWeightOnlyConfig(
                torch.int4,  # type: ignore[attr-defined]
                torchao.PerGroup(32),
            )
        ),
        lambda layer: layer.weight.dequantize(),
    ),
    Route(
        "bitsandbytes-nf4",
        lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        _nf4,
        tolerance=0.1,
    ),
    Route("bitsandbytes-int8", lambda: _bitsandbytes(load_in_8bit=True), _llm_int8, tolerance=0.2),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_quantised_base_with_adapters_gives_what_its_dequantised_weights_give(route: Route, tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.intermediate_size = 128  # nf4 packs 64 numbers in a block
    plain, quantised, dense = tmp_path / "plain", tmp_path / "quantised", tmp_path / "dense"
    make_base(config, plain)
    model: Any = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=route.config(), dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(quantised)
    make_tokenizer().save_pretrained(quantised)
    weights = {name: route.dequantise(layer) for name, layer in _quantised_layers(model).items()}
    assert len(weights) == 4 * 7
    reference: Any = AutoModelForCausalLM.from_pretrained(plain)
    assert any(not torch.equal(weights[name], reference.get_submodule(name).weight) for name in weights)
    with torch.no_grad():
        for name, weight in weights.items():
            reference.get_submodule(name).weight.copy_(weight)
    reference.save_pretrained(dense)
    features = [Feature("lora", 5, attention_only), Feature("dora", 3, _dora), Feature("head", 4, _head)]
    trained = [make_feature_adapter(dense, feature, tmp_path / feature.name) for feature in features]
    models: dict[Adapter | None, Any] = {None: reference.eval()}
    models |= {one.adapter: one.model for one in trained}
    asked = [
        Asked(f"{number}-{adapter.name if adapter else None}", prompt, adapter)
        for number, prompt in enumerate(prompts(3)[:3]) for adapter in models
    ]  # fmt: skip
    core = make_core(quantised, num_blocks=None)
    answers = serve(core, asked)
    core.adapters.close()
    for one in asked:
        expected = expected_logprobs(models[one.adapter], one, answers[one.name].tokens)
        assert relative_error(answers[one.name], expected) <= route.tolerance, one.name
        if route.tolerance <= 1e-4:
            assert expected.argmax(-1).tolist() == answers[one.name].tokens


def _quantised_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}


def _dora(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "use_dora": True}


def _head(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "modules_to_save": ["lm_head", "norm"]}
