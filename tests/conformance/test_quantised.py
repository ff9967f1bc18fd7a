"""Quantised bases with LoRA and DoRA beside them, against PEFT over the same weights dequantised.

GPTQ and AWQ are left out where `gptqmodel` and `optimum` are not: CI does not run them (`docs/quantised.md` says why).
"""

from __future__ import annotations

import statistics
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import Asked, expected_logprobs, make_base, make_core, prompts, relative_error, serve
from conformance.features import Feature, attention_only, make_feature_adapter
from conformance.quantising import (
    Form,
    awq,
    by_transformers,
    compressed_tensors,
    fp8_blocks,
    gptq,
    mxfp4_experts,
)
from conformance.shrinking import tiny_config
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.memory import unpacked_bytes
from loraplex.engines.protocol import Adapter

pytestmark = pytest.mark.usefixtures("quiet")

COMPRESSED = ("compressed_tensors",)
GPTQMODEL = ("gptqmodel", "optimum")
_MOSTLY = 0.05  # of most answers, whose numbers do not round the other way


def _torchao(kind: str, *options: Any) -> Any:
    return TorchAoConfig(getattr(import_module("torchao.quantization"), kind)(*options))


def _int4() -> Any:
    return _torchao("IntxWeightOnlyConfig", torch.int4, import_module("torchao.quantization").PerGroup(32))  # type: ignore[attr-defined]


def _bitsandbytes(**options: Any) -> Any:
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def _nf4() -> Any:
    return _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _of_nf4(layer: Any) -> torch.Tensor:
    functional = import_module("bitsandbytes.functional")
    weight: torch.Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return weight


def _of_llm_int8(layer: Any) -> torch.Tensor:
    scales = getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    data = layer.weight.data if layer.state.CB is None else layer.state.CB
    weight: torch.Tensor = data.float() * scales.float()[:, None] / 127
    return weight


# Where activations or products are rounded, each of the 28 layers adds about the rounding's step of its output, and the
# largest of ten thousand log-probabilities is held. Over the same quantised base PEFT rounds too, but where a number
# lies at the border of two steps the order of summation decides; LLM.int8() also takes outliers by the batch.
FORMS = (
    Form(
        "torchao-int8",
        by_transformers(lambda: _torchao("Int8WeightOnlyConfig"), lambda layer: layer.weight.dequantize()),
        ("torchao",),
    ),
    Form("torchao-int4", by_transformers(_int4, lambda layer: layer.weight.dequantize()), ("torchao",)),
    # activations in bfloat16, where the CPU multiplies in it: one that rounds the other way moves a row by 5e-3
    Form("bitsandbytes-nf4", by_transformers(_nf4, _of_nf4), ("bitsandbytes",), tolerance=0.1, exactly=0.02),
    # activations in 8 bits by the token
    Form(
        "bitsandbytes-int8",
        by_transformers(lambda: _bitsandbytes(load_in_8bit=True), _of_llm_int8),
        ("bitsandbytes",),
        tolerance=0.2,
        exactly=0.05,
    ),
    Form("compressed-tensors-int4", compressed_tensors("W4A16"), COMPRESSED),
    Form("compressed-tensors-int4-asymmetric", compressed_tensors("W4A16_ASYM"), COMPRESSED),
    Form("compressed-tensors-int8", compressed_tensors("W8A16"), COMPRESSED),
    # activations in 8 bits by the token, then in E4M3, which has steps of 1/8: one number of a prompt that rounds the
    # other way moves every answer to it by up to a tenth; the other answers are the same to the last bit
    Form("compressed-tensors-w8a8", compressed_tensors("W8A8"), COMPRESSED, tolerance=0.2, exactly=0.05),
    Form("compressed-tensors-fp8", compressed_tensors("FP8"), COMPRESSED, tolerance=0.4, exactly=0.15),
    Form("compressed-tensors-fp8-dynamic", compressed_tensors("FP8_DYNAMIC"), COMPRESSED, tolerance=0.4, exactly=0.15),
    Form("fp8-blocks", fp8_blocks),
    Form("mxfp4-experts", mxfp4_experts, architecture="gpt_oss"),
    # bfloat16, scales too, whatever the model's type
    Form("gptq", gptq(by_activation=False), GPTQMODEL, tolerance=0.1, exactly=0.02),
    Form("gptq-by-activation", gptq(by_activation=True), GPTQMODEL, tolerance=0.1, exactly=0.02),
    Form("awq", awq, GPTQMODEL, tolerance=0.1, exactly=0.02),
)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_quantised_base_with_adapters_gives_what_its_dequantised_weights_give(form: Form, tmp_path: Path) -> None:
    for module in form.needs:
        pytest.importorskip(module, exc_type=ImportError)
    config = tiny_config(form.architecture)
    config.intermediate_size = 128  # nf4 packs 64 numbers in a block
    plain, quantised, dense = tmp_path / "plain", tmp_path / "quantised", tmp_path / "dense"
    make_base(config, plain)
    weights = form.quantise(plain, quantised)
    assert len(weights) >= 2 * config.num_hidden_layers
    reference: Any = AutoModelForCausalLM.from_pretrained(plain)
    assert not any(torch.equal(weight, reference.get_parameter(name)) for name, weight in weights.items())
    is_dense = form.needs == COMPRESSED or not form.needs
    dense_bytes = sum(parameter.nbytes for parameter in reference.parameters())
    assert unpacked_bytes(quantised, torch.float32, torch.device("cpu")) == (dense_bytes if is_dense else 0)
    with torch.no_grad():
        for name, weight in weights.items():
            reference.get_parameter(name).copy_(weight)
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
        assert relative_error(answers[one.name], expected) <= form.tolerance, one.name
        if form.exactly is None:
            assert expected.argmax(-1).tolist() == answers[one.name].tokens
    if form.exactly is not None:
        errors = []
        for adapter in (None, trained[0].adapter):
            model = _over_quantised(quantised, tmp_path / adapter.name if adapter else None)
            for one in asked:
                if one.adapter == adapter:
                    expected = expected_logprobs(model, one, answers[one.name].tokens)
                    errors.append(relative_error(answers[one.name], expected))
        assert max(errors) <= form.exactly, errors
        assert statistics.median(errors) <= _MOSTLY, errors


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_that_come_in_another_type_are_refused_with_the_type_to_set(tmp_path: Path) -> None:
    for module in COMPRESSED:
        pytest.importorskip(module, exc_type=ImportError)
    make_base(tiny_config("llama"), tmp_path / "plain")
    compressed_tensors("MXFP4A16")(tmp_path / "plain", tmp_path / "quantised")
    with pytest.raises(ModelNotServable, match="in float32: quantised weights are computed in bfloat16"):
        make_core(tmp_path / "quantised")
    core = make_core(tmp_path / "quantised", "bfloat16", num_blocks=None)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16)
    one = Asked("one", prompts(3)[0], None)
    answer = serve(core, [one])["one"]
    core.adapters.close()
    assert relative_error(answer, expected_logprobs(model, one, answer.tokens)) <= 0.05  # of bfloat16


def _over_quantised(directory: Path, adapter: Path | None) -> Any:
    """As transformers reads it, with PEFT over it."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    # compressed-tensors makes its weights in the first pass, and PEFT asks for them; bitsandbytes packs its own then
    # where a CPU multiplies in bfloat16, and what PEFT wraps afterwards computes something else
    if model.config.quantization_config.quant_method != "bitsandbytes":
        with torch.no_grad():  # or gptqmodel takes it for training
            model(torch.tensor([[1]]))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def _dora(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "use_dora": True}


def _head(model: Any) -> dict[str, Any]:
    return {**attention_only(model), "modules_to_save": ["lm_head", "norm"]}
