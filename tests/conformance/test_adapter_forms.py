"""Forms of adapters beside those of the table: features that meet in one module, and what PEFT takes for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conformance.cells import make_base, run_cell
from conformance.features import Feature
from conformance.shrinking import tiny_config
from support.models import llama_config
from transformers import PretrainedConfig

pytestmark = pytest.mark.usefixtures("quiet")

QV = ["q_proj", "v_proj"]
TIED, UNTIED = llama_config(tie_word_embeddings=True), llama_config()
# The base's config, and how PEFT is asked.
FORMS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "tokens-and-lora-of-tied-head": (
        TIED, {"target_modules": [*QV, "lm_head"], "trainable_token_indices": [50, 3]},
    ),
    "tokens-and-biased-lora-of-tied-head": (
        TIED, {"target_modules": [*QV, "lm_head"], "trainable_token_indices": [50, 3], "lora_bias": True},
    ),
    "other-tokens-of-head": (
        UNTIED, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [50, 3], "lm_head": [7, 50, 3]}},
    ),
    "saved-head-that-is-a-target": (UNTIED, {"target_modules": [*QV, "lm_head"], "modules_to_save": ["lm_head"]}),
    "saved-embeddings-that-are-a-target": (
        UNTIED, {"target_modules": [*QV, "embed_tokens"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved-parents-of-targets": (UNTIED, {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    "dora-of-one-output": (
        tiny_config("qwen2_moe"), {"target_modules": [*QV, "shared_expert_gate"], "use_dora": True},
    ),
    "initialised-by-null": (UNTIED, {"target_modules": QV, "init_lora_weights": None}),
    "initialised-by-nought": (UNTIED, {"target_modules": QV, "init_lora_weights": 0}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of PEFT, about tied weights
@pytest.mark.parametrize("name", FORMS)
def test_form_is_served_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    config, options = FORMS[name]
    make_base(config, tmp_path / "base")
    outcome = run_cell(tmp_path / "base", Feature(name, 4, lambda model: options))
    assert outcome.is_exact
    assert outcome.is_forced
