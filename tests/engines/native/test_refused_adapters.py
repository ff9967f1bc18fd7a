"""Every form of adapter that this base cannot carry is refused by name, and a neighbour's request goes on as ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.core import make_core, prompt_of, request, run, tokens
from support.models import AdapterSpec, llama_config, make_adapter, make_model
from support.worlds import SmallWorld
from transformers import HunYuanMoEV1Config, MixtralConfig, PreTrainedModel

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.adapters.peft import Base, plan_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterMismatch, AdapterTooLarge, AdapterUnsupported
from loraplex.engines.native import loading
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.model import load_model
from loraplex.engines.protocol import Adapter

Tensors = dict[str, torch.Tensor]
Q = "base_model.model.model.layers.1.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"


def saying(**fields: object) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, tensors: config.update(fields)


def with_tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32, **fields: object) -> Any:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        config.update(fields)
        tensors[name] = torch.ones(shape, dtype=dtype)

    return change


def without(name: str) -> Any:
    return lambda config, tensors: tensors.pop(name)


def _a_second_half(config: dict[str, Any], tensors: Tensors) -> None:
    tensors[f"{Q}.lora_A"] = torch.ones(1, 64)


def _a_bare_row(config: dict[str, Any], tensors: Tensors) -> None:
    """As the name of A, and of a shape that would be copied into all of A's rows."""
    tensors[f"{Q}.lora_A"] = tensors.pop(f"{Q}.lora_A.weight")[:1].clone()


def _two_magnitudes(config: dict[str, Any], tensors: Tensors) -> None:
    config["use_dora"] = True
    for ending in ("", ".weight"):
        tensors[f"{Q}.lora_magnitude_vector{ending}"] = torch.ones(64)


def _two_heads(config: dict[str, Any], tensors: Tensors) -> None:
    config["modules_to_save"] = ["lm_head"]
    for infix in ("", ".base_layer"):
        tensors[f"base_model.model.lm_head{infix}.weight"] = torch.ones(320, 64)


def _empty(config: dict[str, Any], tensors: Tensors) -> None:
    config["target_modules"] = ["nothing"]
    tensors.clear()


# how an adapter of rank 4 on q, k, v and o is changed, and what is said of it
REFUSED: dict[str, tuple[Callable[[dict[str, Any], Tensors], object], type[AdapterError], str]] = {
    "another method": (saying(peft_type="IA3"), AdapterUnsupported, "peft_type is 'IA3'; only LORA"),
    "an initialisation that changed the base": (
        saying(init_lora_weights="pissa"), AdapterUnsupported, "init_lora_weights = 'pissa' changed the base",
    ),
    "a field of the future": (saying(r_squared=2), AdapterUnsupported, "r_squared = 2 is not supported"),
    "modules never resolved": (
        saying(target_modules="all-linear"), AdapterUnsupported, "target_modules = 'all-linear' was not resolved",
    ),
    "a target without weights": (
        saying(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]), AdapterInvalid,
        "target_modules names model.layers.0.mlp.up_proj, for which the file has no weights",
    ),
    "weights that are no target": (
        saying(target_modules=["q_proj", "k_proj", "v_proj"]), AdapterInvalid,
        "the file has weights for model.layers.0.self_attn.o_proj, which target_modules does not name",
    ),
    "nothing at all": (_empty, AdapterInvalid, "holds no LoRA weights"),
    "A without B": (without(f"{Q}.lora_B.weight"), AdapterInvalid, "model.layers.1.self_attn.q_proj lacks lora_B"),
    "a magnitude without DoRA": (
        with_tensor(f"{Q}.lora_magnitude_vector", 64), AdapterInvalid, "lora_magnitude_vector, but use_dora is not set",
    ),
    "DoRA without magnitudes": (saying(use_dora=True), AdapterInvalid, "lacks lora_magnitude_vector"),
    "weights of another rank": (
        with_tensor(f"{Q}.lora_A.weight", 5, 64), AdapterMismatch,
        "lora_A of model.layers.1.self_attn.q_proj has shape [5, 64]; the base needs [4, 64]",
    ),
    "weights of another width": (
        with_tensor(f"{Q}.lora_A.weight", 4, 65), AdapterMismatch, "has shape [4, 65]; the base needs [4, 64]",
    ),
    "a half of another shape, without an ending": (
        _a_bare_row, AdapterMismatch,
        "lora_A of model.layers.1.self_attn.q_proj has shape [1, 64]; the base needs [4, 64]",
    ),
    "a half twice": (
        _a_second_half, AdapterInvalid, f"two tensors for one thing: {Q}.lora_A and {Q}.lora_A.weight",
    ),
    "a magnitude twice": (
        _two_magnitudes, AdapterInvalid,
        f"two tensors for one thing: {Q}.lora_magnitude_vector and {Q}.lora_magnitude_vector.weight",
    ),
    "a saved weight twice": (
        _two_heads, AdapterInvalid, "two tensors for one thing: lm_head.base_layer.weight and lm_head.weight",
    ),
    "a layer too many": (
        with_tensor("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", 4, 64), AdapterMismatch,
        "the base model has no linear layer model.layers.7.self_attn.q_proj",
    ),
    "a rank beyond the limit": (saying(r=512), AdapterTooLarge, "rank 512 of model.layers.0.self_attn.q_proj exceeds"),
    "integers": (
        with_tensor(f"{Q}.lora_A.weight", 4, 64, dtype=torch.int32), AdapterUnsupported, "lora_A.weight is I32",
    ),
    "a tensor from elsewhere": (with_tensor("prompt.weight", 2), AdapterUnsupported, "prompt.weight is not part of a"),
    "a tensor of no module": (
        with_tensor("base_model.model.model.gate.weight", 2), AdapterUnsupported,
        "tensor model.gate.weight is not part of a LoRA that this base can carry",
    ),
    "a bias that was not announced": (
        with_tensor(f"{Q}.lora_B.bias", 64), AdapterInvalid, "q_proj has lora_B.bias, but lora_bias is not set",
    ),
    "an embedding without weights": (
        saying(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"]), AdapterInvalid,
        "the file lacks model.embed_tokens.lora_embedding_A",
    ),
    "a token beyond the vocabulary": (
        saying(trainable_token_indices=[320]), AdapterMismatch, "names token 320; model.embed_tokens has 320",
    ),
    "tokens of no embedding": (
        saying(trainable_token_indices={"wte": [1]}), AdapterUnsupported, "names wte, which is no embedding",
    ),
    "a saved module without weights": (
        saying(modules_to_save=["lm_head"]), AdapterInvalid, "modules_to_save names the module of lm_head.weight",
    ),
    "a saved module that there is not": (
        saying(modules_to_save=["score"]), AdapterUnsupported, "modules_to_save names score, which the base does not",
    ),
    "another vocabulary": (
        with_tensor(f"{EMBEDDING}.weight", 330, 64, modules_to_save=["embed_tokens"]), AdapterUnsupported,
        "model.embed_tokens.weight has 330 rows, the base 320: another vocabulary is not supported",
    ),
    "a parameter that is no matrix": (
        saying(target_parameters=["layers.0.input_layernorm.weight"]), AdapterUnsupported, "which has 1 dimensions",
    ),
    "an invocation beside a saved module": (
        with_tensor("base_model.model.lm_head.weight", 320, 64, modules_to_save=["lm_head"],
                    alora_invocation_tokens=[1]),
        AdapterUnsupported, "alora_invocation_tokens is not supported with changes to lm_head",
    ),
    "another base's weight": (
        with_tensor(f"{Q}.base_layer.weight", 64, 64), AdapterUnsupported,
        "q_proj.base_layer.weight differs from the base's: an adapter over other weights",
    ),
    "infinities": (
        lambda config, tensors: tensors[f"{Q}.lora_A.weight"].fill_(torch.inf), AdapterInvalid, "are not all finite",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def core(small: SmallWorld) -> EngineCore:
    return make_core(small)


def changed(small: SmallWorld, case: str, directory: Path) -> Adapter:
    shutil.copytree(small.adapters["rank-4"].path, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    REFUSED[case][0](config, tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(id=f"sha-{case}", name=case, path=str(directory))


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_is_refused_by_name_and_its_neighbour_undisturbed(
    small: SmallWorld, core: EngineCore, tmp_path: Path, case: str
) -> None:
    _, kind, says = REFUSED[case]
    bad, good, prompt = changed(small, case, tmp_path / "bad"), small.adapters["rank-8"], prompt_of(3, 9)
    core.submit(request("good", prompt, good, max_tokens=6))
    core.submit(request("bad", prompt, bad))
    emissions = run(core)
    [refusal] = [one.error for one in emissions["bad"]]
    assert type(refusal) is kind
    assert says in str(refusal)
    assert tokens(emissions["good"]) == small.oracle.greedy(prompt, 6, good)
    assert bad.id not in {one.adapter_id for one in core.adapters.residents()}
    assert not core.has_work


def base_in(directory: Path, dtype: Literal["float32", "bfloat16"]) -> Base:
    settings = Settings(
        model=Model(path=str(directory), name="moe", dtype=dtype, device="cpu"),
        engine=EngineSettings(kv_block_size=4, num_threads=1, kv_cache_bytes=2**20),
        adapters=Adapters(device_bytes=2**20),
    )
    return load_machine(settings, lambda progress: None).base


def test_lora_of_a_layer_in_another_type_than_the_models_is_refused_by_name(tmp_path: Path) -> None:
    """This model's router stays in float32; of an adapter in bfloat16 it would read what lies behind it too."""
    config = HunYuanMoEV1Config(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, moe_topk=2, max_position_embeddings=64,
    )  # fmt: skip
    make_model(config, tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", AdapterSpec("router", 4, ("q_proj", "wg")), tmp_path)
    plan_adapter(adapter, base_in(tmp_path / "base", "float32"))
    with pytest.raises(
        AdapterUnsupported,
        match=r"gate\.wg cannot .* is computed in float32, adapters in bfloat16",
    ):
        plan_adapter(adapter, base_in(tmp_path / "base", "bfloat16"))


def test_lora_of_a_layer_that_gives_another_type_is_refused_by_name(
    small: SmallWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_odd_model(*arguments: Any) -> PreTrainedModel:
        model = load_model(*arguments)
        layer = model.get_submodule("model.layers.1.self_attn.o_proj")
        layer.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        return model

    monkeypatch.setattr(loading, "load_model", load_odd_model)
    base = load_machine(small.settings(), lambda progress: None).base
    with pytest.raises(AdapterUnsupported, match=r"1\.self_attn\.o_proj cannot .* in bfloat16, adapters in float32"):
        plan_adapter(small.adapters["rank-4"], base)


def test_lora_of_single_experts_beside_stacked_ones_is_refused_by_name(tmp_path: Path) -> None:
    """As they were saved while every expert had layers of its own."""
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    make_model(config, tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", AdapterSpec("experts", 4, ("q_proj",)), tmp_path)
    path = Path(adapter.path)
    tensors = load_file(path / "adapter_model.safetensors")
    for part, shape in {"lora_A": (4, 32), "lora_B": (32, 4)}.items():
        tensors[f"base_model.model.model.layers.0.block_sparse_moe.experts.2.w1.{part}.weight"] = torch.ones(shape)
    save_file(tensors, path / "adapter_model.safetensors")
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**said, "target_modules": ["q_proj", "w1"]}))
    base = base_in(tmp_path / "base", "float32")
    with pytest.raises(AdapterUnsupported, match=r"block_sparse_moe\.experts\.2\.w1 is a layer of one expert"):
        plan_adapter(adapter, base)


TRAINED_TOKENS = ("trainable_token_indices", [50, 3])
# Adapters that a base with tied embeddings cannot carry, as PEFT is asked for them, and what is said of each.
ON_TIED = {
    "DoRA beside trained tokens": (
        AdapterSpec("dora", 4, ("q_proj", "lm_head"), (("use_dora", True), TRAINED_TOKENS)),
        "use_dora = True on lm_head, which trainable_token_indices changes as well",
    ),
    "the weight beside trained tokens": (
        AdapterSpec("weight", 4, ("q_proj",), (("target_parameters", ["lm_head.weight"]), TRAINED_TOKENS)),
        "target_parameters names lm_head.weight, which trainable_token_indices changes as well",
    ),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base]:
    """A base's directory, and what adapters are checked against."""
    directory = tmp_path_factory.mktemp("tied")
    make_model(llama_config(num_hidden_layers=1, tie_word_embeddings=True), directory)
    world = SmallWorld(directory, {}, None)  # type: ignore[arg-type]
    return directory, load_machine(world.settings(kv_cache_bytes=2**20), lambda progress: None).base


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings", "ignore:You have requested")  # PEFT's words on it
@pytest.mark.parametrize("case", ON_TIED)
def test_what_a_base_with_tied_embeddings_cannot_carry_is_refused_by_name(
    tied: tuple[Path, Base], tmp_path: Path, case: str
) -> None:
    (spec, says), (directory, base) = ON_TIED[case], tied
    adapter = make_adapter(directory, spec, tmp_path)
    with pytest.raises(AdapterUnsupported, match=says):
        plan_adapter(adapter, base)


def test_bias_under_its_old_and_its_new_name_is_refused_by_both(tmp_path: Path) -> None:
    make_model(llama_config(num_hidden_layers=1, attention_bias=True), tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", AdapterSpec("bias", 4, ("q_proj",), (("bias", "lora_only"),)), tmp_path)
    weights = Path(adapter.path) / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({**tensors, f"{name}.bias": tensors[f"{name}.base_layer.bias"] + 2}, weights)
    world = SmallWorld(tmp_path / "base", {}, None)  # type: ignore[arg-type]
    base = load_machine(world.settings(kv_cache_bytes=2**20), lambda progress: None).base
    with pytest.raises(
        AdapterInvalid, match=r"two tensors for one thing: .*q_proj\.base_layer\.bias and .*q_proj\.bias"
    ):
        plan_adapter(adapter, base)
