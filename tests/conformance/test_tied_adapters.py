"""`ensure_weight_tying` on bases whose head shares the embeddings' weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance.cells import make_base, make_core, run_few
from conformance.features import Feature, make_feature_adapter
from safetensors.torch import load_file, save_file
from support.models import llama_config
from torch import Tensor

from loraplex.engines.adapters.peft import load_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterUnsupported
from loraplex.engines.native.core import EngineCore
from loraplex.engines.protocol import Adapter

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]  # of PEFT, about tied weights

QV = ["q_proj", "v_proj"]
TIED = {"ensure_weight_tying": True}
FORMS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": [*QV, "embed_tokens"], **TIED},
    "head": {"target_modules": [*QV, "lm_head"], "alpha_pattern": {"lm_head": 3}, **TIED},
    "by-pattern": {"target_modules": r".*(q_proj|embed_tokens)", **TIED},
    "by-a-pattern-that-peft-does-not-tie": {"target_modules": r".*(q_proj|\.embed_tokens)", **TIED},
    "saved-embeddings": {"target_modules": QV, "modules_to_save": ["embed_tokens"], **TIED},
    "saved-head": {"target_modules": QV, "modules_to_save": ["lm_head", "norm"], **TIED},
    "tokens": {"target_modules": QV, "trainable_token_indices": [50, 3], **TIED},
    "tokens-of-both": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [50, 3]}},
    "tokens-of-the-head": {"target_modules": QV, "trainable_token_indices": {"lm_head": [50, 3]}},
    "other-tokens-of-the-head": {
        "target_modules": QV, "trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [7, 50, 3]},
    },
    "biases": {"target_modules": QV, "bias": "all", **TIED},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tied") / "base"
    make_base(
        llama_config(num_hidden_layers=2, vocab_size=264, tie_word_embeddings=True, attention_bias=True), directory
    )
    return directory


@pytest.fixture(scope="module")
def core(base: Path) -> Iterator[EngineCore]:
    made = make_core(base, num_blocks=None)
    yield made
    made.adapters.close()


@pytest.mark.parametrize("saves", ["as-peft-does", "with-embeddings", "state-dict"])
@pytest.mark.parametrize("form", FORMS)
def test_tied_adapter_is_served_as_peft_computes_it(
    base: Path, core: EngineCore, tmp_path: Path, form: str, saves: str
) -> None:
    trained = make_feature_adapter(base, Feature(form, 4, lambda model: FORMS[form]), tmp_path)
    if saves == "with-embeddings":
        trained.model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    elif saves == "state-dict":
        tensors = {name: tensor.clone().contiguous() for name, tensor in trained.model.state_dict().items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    outcome = run_few(core, Adapter(id=f"{form}-{saves}", name=form, path=str(tmp_path)), trained.model)
    assert outcome.is_exact
    assert outcome.changed


def plus_one(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name] + 1


A, HEAD = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.weight"
# a form, what is done to its tensors and its config, and what is said
REFUSED: dict[str, tuple[str, Any, dict[str, Any], type[AdapterError], str]] = {
    "a head of its own": (
        "embeddings", lambda tensors: plus_one(tensors, A), {}, AdapterInvalid,
        "lm_head.lora_A differs from model.embed_tokens.lora_embedding_B, which ensure_weight_tying says it is",
    ),
    "a saved head of its own": (
        "saved-embeddings", lambda tensors: plus_one(tensors, HEAD), {}, AdapterInvalid,
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "no head": (
        "embeddings", lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name], {},
        AdapterInvalid, "ensure_weight_tying ties lm_head, for which the file has no weights",
    ),
    "no saved head": ("saved-head", lambda tensors: tensors.pop(HEAD), {}, AdapterInvalid, "lacks lm_head.weight"),
    "a head that is not tied": (
        "embeddings", lambda tensors: None, {"ensure_weight_tying": False}, AdapterInvalid,
        "the file has weights for lm_head, which target_modules does not name",
    ),
    "other tokens of the head": (
        "tokens-of-both", lambda tensors: None, {"trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [3]}},
        AdapterInvalid, "the file lacks lm_head.token_adapter.trainable_tokens_delta",
    ),
    "other tokens of the head, tied": (
        "tokens-of-both", lambda tensors: None,
        {"trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [3]}, **TIED},
        AdapterInvalid, "names other tokens for lm_head, which ensure_weight_tying ties",
    ),
    "a LoRA on a saved head": (
        "embeddings", lambda tensors: None, {"modules_to_save": ["embed_tokens"]}, AdapterUnsupported,
        "LoRA on lm_head, which ensure_weight_tying has replaced",
    ),
    "other tokens beside a LoRA": (
        "embeddings", lambda tensors: None, {"trainable_token_indices": {"lm_head": [1]}}, AdapterUnsupported,
        "trainable_token_indices names lm_head, which has a LoRA as well",
    ),
    "tokens and a LoRA": (
        "embeddings", lambda tensors: None, {"trainable_token_indices": [1]}, AdapterUnsupported,
        "trainable_token_indices beside a LoRA on model.embed_tokens, tied,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_tied_is_refused_by_name(base: Path, core: EngineCore, tmp_path: Path, case: str) -> None:
    form, change, fields, error, says = REFUSED[case]
    trained = make_feature_adapter(base, Feature(form, 4, lambda model: FORMS[form]), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    with pytest.raises(error, match=says):
        load_adapter(trained.adapter, core._machine.base)


def test_what_a_tied_head_takes_from_the_embeddings_is_counted_once(
    base: Path, core: EngineCore, tmp_path: Path
) -> None:
    form = FORMS["saved-embeddings"]
    trained = make_feature_adapter(base, Feature("saved", 4, lambda model: form), tmp_path)
    card = load_adapter(trained.adapter, core._machine.base).plan.card(4)
    assert card.num_parameters == sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
