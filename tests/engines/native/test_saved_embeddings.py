"""Adapters with whole embeddings, saved by PEFT with `save_embedding_layers`: their weights stand in the file twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.core import make_core, prompt_of, request, run, tokens
from support.worlds import SmallWorld
from transformers import AutoModelForCausalLM

from loraplex.engines.errors import AdapterError
from loraplex.engines.protocol import Adapter

WEIGHTS = "adapter_model.safetensors"
NEW = "base_model.model.{}.modules_to_save.weight"
REPLACED = "base_model.model.{}.original_module.weight"


def save(small: SmallWorld, path: Path, modules: list[str], *, num_more_rows: int = 0) -> Adapter:
    """Whole embeddings that differ from the base's, and rows more where the vocabulary was enlarged."""
    torch.manual_seed(7)
    base: Any = AutoModelForCausalLM.from_pretrained(small.directory, dtype=torch.float32)
    if num_more_rows:
        base.resize_token_embeddings(base.config.vocab_size + num_more_rows)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(path), save_embedding_layers=True)
    return Adapter(id=f"sha-{path.name}", name=path.name, path=str(path))


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
def test_embeddings_that_are_told_twice_are_those_of_peft(
    small: SmallWorld, tmp_path: Path, modules: list[str]
) -> None:
    adapter = save(small, tmp_path, modules)
    told = load_file(tmp_path / WEIGHTS)
    assert any(name.endswith(".modules_to_save.weight") for name in told)  # or this would test nothing
    assert any(name.endswith(".original_module.weight") for name in told)
    core, prompt = make_core(small), prompt_of(5, 12)
    core.submit(request("one", prompt, adapter))
    core.submit(request("base", prompt))
    found = run(core)
    assert tokens(found["one"]) == small.oracle.greedy(prompt, 12, adapter)
    assert tokens(found["base"]) == small.oracle.greedy(prompt, 12, None)
    assert tokens(found["one"]) != tokens(found["base"])


def failure(small: SmallWorld, adapter: Adapter) -> AdapterError:
    core = make_core(small)
    core.submit(request("one", prompt_of(5, 12), adapter))
    error = run(core)["one"][-1].error
    assert isinstance(error, AdapterError)
    return error


@pytest.mark.parametrize(
    ("form", "message"),
    [(NEW, r"{}\.modules_to_save\.weight differs from {}\.weight"), (REPLACED, r"{}\.original_module\.weight differs")],
    ids=["the same once more", "what it replaces"],
)
def test_weights_that_contradict_each_other_are_refused(
    small: SmallWorld, tmp_path: Path, form: str, message: str
) -> None:
    adapter, module = save(small, tmp_path, ["embed_tokens"]), "model.embed_tokens"
    told = load_file(tmp_path / WEIGHTS)
    told[form.format(module)][3] += 1
    save_file(told, tmp_path / WEIGHTS)
    error = failure(small, adapter)
    with pytest.raises(AdapterError, match=message.format(module, module)):
        raise error


def test_enlarged_vocabulary_is_refused_as_such(small: SmallWorld, tmp_path: Path) -> None:
    adapter = save(small, tmp_path, ["embed_tokens", "lm_head"], num_more_rows=2)
    with pytest.raises(AdapterError, match=r"has 322 rows, the base 320: another vocabulary is not supported"):
        raise failure(small, adapter)
