"""AdaLoRA, whose ranks were pruned apart, is served as PEFT computes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cells import make_base, make_core, run_few
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import Oracle, llama_config
from transformers import AutoModelForCausalLM

from loraplex.engines.adapters.peft import plan_adapter
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterMismatch, AdapterUnsupported
from loraplex.engines.native.core import EngineCore
from loraplex.engines.protocol import Adapter

# Of PEFT, about r, which it does not use, and about modules of which nothing is left.
pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

RANK = 6
QV = "model.layers.0.self_attn.{}_proj"
Q_PARTS = f"base_model.model.{QV.format('q')}.lora_{{}}"
# Which singular values are kept, by the module; of all others all.
KEPT = {QV.format("q"): [True, False, True, True, False, False], QV.format("v"): [False] * RANK}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adalora") / "base"
    make_base(llama_config(num_hidden_layers=2, vocab_size=264), directory)
    return directory


@pytest.fixture(scope="module")
def core(base: Path) -> Iterator[EngineCore]:
    made = make_core(base, num_blocks=None)
    yield made
    made.adapters.close()


def make_adalora(base: Path, directory: Path, *, is_pruned: bool, **options: Any) -> Adapter:
    """Random, with the rank pattern that PEFT's allocator would have written."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 20, **options}
    peft_model: Any = get_peft_model(model, AdaLoraConfig(init_r=RANK, target_r=3, total_step=9, **asked))
    layers = [name for name, layer in peft_model.base_model.model.named_modules() if hasattr(layer, "lora_E")]
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 1.0 if ".lora_E" in name else 0.5 / parameter.shape[-1] ** 0.5)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if is_pruned:
        kept = {f"{name}.lora_E.default": KEPT.get(name, [True] * RANK) for name in layers}
        peft_model.peft_config["default"].rank_pattern = kept
    peft_model.save_pretrained(str(directory))
    return Adapter(id=f"sha-{directory.name}", name=directory.name, path=str(directory))


FORMS: dict[str, dict[str, Any]] = {
    "pruned": {"is_pruned": True},
    "whole": {"is_pruned": False},
    "pruned-and-saved": {"is_pruned": True, "modules_to_save": ["lm_head"]},
    "what-peft-ignores": {"is_pruned": True, "use_rslora": True, "alpha_pattern": {"q_proj": 3}, "r": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_adalora_is_served_as_peft_computes_it(base: Path, core: EngineCore, tmp_path: Path, form: str) -> None:
    adapter = make_adalora(base, tmp_path / form, **FORMS[form])
    outcome = run_few(core, adapter, Oracle(base).model(adapter))
    assert outcome.is_exact
    assert outcome.changed


# fields of the config, the shape of a part of q's, and what is said
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, tuple[int, ...]] | None, type[AdapterError], str]] = {
    "E of another rank": ({}, ("E", (6, 1)), AdapterMismatch, r"lora_E of .* has shape \[6, 1\]; .* needs \[3, 1"),
    "A that was not pruned": ({}, ("A", (6, 64)), AdapterMismatch, r"lora_A of .* has shape \[6, 64\]"),
    "no E": ({}, ("E", ()), AdapterInvalid, "lacks lora_E"),
    "a plain LoRA with E": ({"peft_type": "LORA", "rank_pattern": {}}, None, AdapterInvalid, "is not ADALORA"),
    "ranks as numbers": ({"rank_pattern": {"q.lora_E": 3}}, None, AdapterInvalid, "not a list of init_r = 6 booleans"),
    "too few booleans": ({"rank_pattern": {"q.lora_E": [True]}}, None, AdapterInvalid, "not a list of init_r = 6"),
    "ranks of no E": ({"rank_pattern": {"q": [True] * 6}}, None, AdapterInvalid, "'q' does not name the lora_E"),
    "ranks twice": (
        {"rank_pattern": {"q.lora_E": [True] * 6, "q.lora_E.default": [True] * 6}}, None, AdapterInvalid, "one twice",
    ),
    "a list for ranks": ({"rank_pattern": [1]}, None, AdapterInvalid, "is not a map of names to lists"),
    "DoRA": ({"use_dora": True}, None, AdapterUnsupported, "use_dora = True is not supported with peft_type ADALORA"),
    "a rank of nought": ({"init_r": 0}, None, AdapterInvalid, "init_r = 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_adalora_that_peft_would_not_load_is_refused(base: Path, core: EngineCore, tmp_path: Path, case: str) -> None:
    fields, part, error, says = REFUSED[case]
    adapter = make_adalora(base, tmp_path / "bad", is_pruned=True)
    config, weights = tmp_path / "bad" / "adapter_config.json", tmp_path / "bad" / "adapter_model.safetensors"
    if case == "a plain LoRA with E":
        fields = {**fields, "r": RANK, **dict.fromkeys(("init_r", "target_r", "total_step", "deltaT"))}
        fields |= dict.fromkeys(("beta1", "beta2", "orth_reg_weight"))
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    tensors = load_file(weights)
    if part is not None:
        tensors.pop(Q_PARTS.format(part[0]))
        if part[1]:
            tensors[Q_PARTS.format(part[0])] = torch.ones(part[1])
    save_file(tensors, weights)
    with pytest.raises(error, match=says):
        plan_adapter(adapter, core._machine.base)
